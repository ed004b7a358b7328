"""The launches that ``make aot`` compiles: every op, in each configuration that is shipped.

A case calls a launcher of ``kernels/`` on meta tensors: sizes without memory. Its sizes are those
of the project's targets, one for each class that a launch policy tells apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import cost
import torch
from torch import Tensor

from pyvit.kernels import (
    attention_backward,
    conv2d,
    linear,
    patch_embed,
    projected_step,
    topk_attention,
    unfold,
)


@dataclass(frozen=True)
class Case:
    """One call of a launcher."""

    op: str
    name: str
    dtype: str  # "tf32": float32 tensors, with torch's switches for TF32 on
    call: Callable[[], Any]
    cost: cost.Cost
    # Why a kernel may do without what the gate asks for: ("kernel", arch) to a sentence.
    allowed: Mapping[tuple[str, int], str] = field(default_factory=dict)
    measured: bool = False  # whether it is used only where it was measured to be fast

    @property
    def id(self) -> str:
        return f"{self.op} {self.name} {self.dtype}"


def cases() -> Iterator[Case]:
    yield from _attention()
    yield from _attention_gradients()
    yield from _conv2d()
    yield from _linear()
    yield from _patch_embed()
    yield from _unfold()
    yield from _projected_step()


def _meta(*sizes: int, dtype: str = "float32", channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    return torch.empty(sizes, dtype=kind, device="meta", memory_format=layout)


# ---- attention ----------------------------------------------------------------------------------


def _attention() -> Iterator[Case]:
    of_bfloat16 = [
        (64, 12, 50, 64, 16),
        (64, 12, 197, 64, 16),
        (64, 12, 197, 64, 197),
        (64, 12, 197, 32, 16),
        (64, 16, 257, 80, 32),
        (16, 12, 577, 64, 32),
        (16, 12, 785, 64, 32),
        (16, 8, 577, 128, 32),
        (4, 12, 4096, 64, 64),
        (4, 12, 4096, 128, 64),
        (16, 4, 577, 256, 32),
    ]
    rows = [("bfloat16", *row) for row in of_bfloat16]
    rows += [("float16", 64, 12, 197, 64, 16), ("tf32", 64, 12, 197, 64, 16)]
    rows += [("float32", *row) for row in ((64, 12, 197, 64, 16), (4, 12, 4096, 64, 64))]
    rows += [("float32", 16, 8, 577, 128, 32)]
    for dtype, b, h, n, d, k in rows:

        def call(b=b, h=h, n=n, d=d, k=k, dtype=dtype):
            q = _meta(b, h, n, d, dtype=dtype)
            topk_attention.topk_attention(q, q, q, k, d**-0.5, True)

        name = f"forward {b}x{h}x{n}x{d} k={k}"
        yield Case("topk_attention", name, dtype, call, cost.attention(b, h, n, d, dtype, k))
    for dtype, b, h, n, d in (
        ("bfloat16", 64, 12, 197, 64),
        ("bfloat16", 4, 12, 4096, 64),
        ("float32", 64, 12, 197, 64),
    ):

        def penalty(b=b, h=h, n=n, d=d, dtype=dtype):
            q = _meta(b, h, n, d, dtype=dtype)
            topk_attention.attention_with_penalty(q, q, q, 32, d**-0.5, True)

        name = f"forward {b}x{h}x{n}x{d} k=32"
        work = cost.attention(b, h, n, d, dtype, 32)
        yield Case("attention_with_penalty", name, dtype, penalty, work)


def _attention_gradients() -> Iterator[Case]:
    for dtype, b, h, n, d in (
        ("bfloat16", 64, 12, 197, 64),
        ("bfloat16", 64, 16, 257, 80),
        ("bfloat16", 64, 12, 197, 32),
        ("bfloat16", 16, 4, 577, 256),
        ("tf32", 64, 12, 197, 64),
        ("tf32", 16, 8, 577, 128),
        ("float32", 64, 12, 197, 64),
        ("float32", 16, 8, 577, 128),
    ):

        def selected(b=b, h=h, n=n, d=d, dtype=dtype):
            q = _meta(b, h, n, d, dtype=dtype)
            bits = torch.empty(b, h, n, (n + 7) // 8, dtype=torch.uint8, device="meta")
            attention_backward.topk_attention_backward(
                *(q, q, q, q, q, bits, _meta(b, h, n, 2), 16, n, d**-0.5, False, True, True, True)
            )

        name = f"backward {b}x{h}x{n}x{d}"
        work = cost.attention_gradients(b, h, n, d, dtype, bits=True, again=False)
        yield Case("topk_attention", name, dtype, selected, work)
    for dtype, op in (
        ("bfloat16", "topk_attention"),
        ("bfloat16", "attention_with_penalty"),
        ("float32", "attention_with_penalty"),
    ):
        b, h, n, d = 64, 12, 197, 64

        def dense(b=b, h=h, n=n, d=d, op=op, dtype=dtype):
            q = _meta(b, h, n, d, dtype=dtype)
            terms = (None, None, None)
            if op == "attention_with_penalty":
                bits = torch.empty(b, h, n, (n + 7) // 8, dtype=torch.uint8, device="meta")
                terms = (_meta(b, h, n), _meta(b, h, n), bits)
            attention_backward.attention_dense_backward(
                *(q, q, q, q, *terms, d**-0.5, False, True, True, True)
            )

        way = "dense backward" if op == "topk_attention" else "backward"
        work = cost.attention_gradients(b, h, n, d, dtype, bits=op != "topk_attention", again=True)
        yield Case(op, f"{way} {b}x{h}x{n}x{d}", dtype, dense, work)


# ---- convolution and linear layers --------------------------------------------------------------

# batch, channels, height and width, out channels, kernel, stride, padding, groups
STEM = (256, 3, 224, 64, 7, 2, 3, 1)
SQUARE = (256, 64, 56, 64, 3, 1, 1, 1)
WIDE = (256, 256, 14, 256, 3, 1, 1, 1)
STRIDED = (256, 128, 56, 128, 3, 2, 1, 1)
POINT = (256, 64, 56, 256, 1, 1, 0, 1)
GROUPS = (256, 128, 28, 128, 3, 1, 1, 32)


def _conv2d() -> Iterator[Case]:
    rows = [("forward", "bfloat16", s, True) for s in (STEM, SQUARE, WIDE, POINT, GROUPS)]
    rows += [("forward", "bfloat16", SQUARE, False), ("forward", "float32", SQUARE, True)]
    rows += [("forward", "tf32", SQUARE, True), ("forward", "float16", SQUARE, True)]
    rows += [("image gradient", "bfloat16", s, True) for s in (STEM, SQUARE, STRIDED)]
    rows += [("image gradient", "float32", SQUARE, True)]
    rows += [("weight gradient", "bfloat16", s, True) for s in (STEM, SQUARE, GROUPS)]
    rows += [("weight gradient", "float32", SQUARE, True)]
    for way, dtype, shape, last in rows:
        b, c, size, o, k, s, p, g = shape
        geometry = ((s, s), (p, p, p, p), (1, 1), g, last)

        def call(way=way, dtype=dtype, shape=shape, last=last, geometry=geometry):
            b, c, size, o, k, s, p, g = shape
            after = (size + 2 * p - k) // s + 1
            x = _meta(b, c, size, size, dtype=dtype, channels_last=last)
            weight = _meta(o, c // g, k, k, dtype=dtype, channels_last=last)
            grad = _meta(b, o, after, after, dtype=dtype, channels_last=last)
            if way == "forward":
                conv2d.conv2d(x, weight, None, *geometry)
            elif way == "image gradient":
                conv2d.conv2d_input_grad(grad, weight, x.shape, *geometry)
            else:
                conv2d.conv2d_weight_grad(grad, x, weight.shape, *geometry)

        layout = "" if last else " NCHW"
        groups = f" groups {g}" if g > 1 else ""
        name = f"{way} {b}x{c}x{size}x{size} {k}x{k}/{s} to {o}{groups}{layout}"
        yield Case("conv2d", name, dtype, call, cost.conv2d(*shape, dtype))


def _linear() -> Iterator[Case]:
    rows, inputs, outputs = 64 * 197, 768, 3072
    work = cost.linear(rows, inputs, outputs, "bfloat16")

    def forward():
        weight = _meta(outputs, inputs, dtype="bfloat16")
        linear.linear(_meta(rows, inputs, dtype="bfloat16"), weight, weight[:, 0])

    def weight_gradient():
        grad = _meta(rows, outputs, dtype="bfloat16")
        linear.linear_weight_grad(grad, _meta(rows, inputs, dtype="bfloat16"))

    name = f"{rows}x{inputs} to {outputs}"
    yield Case("linear", f"forward {name}", "bfloat16", forward, work)
    yield Case("linear", f"weight gradient {name}", "bfloat16", weight_gradient, work)


# ---- patch embedding, columns, attack steps -----------------------------------------------------


def _patch_embed() -> Iterator[Case]:
    b, c, size, dim, patch = 256, 3, 224, 768, 16
    stride, tokens = (patch, patch), (size // patch) ** 2

    def forward(dtype, pixel):
        image = _meta(b, c, size, size, dtype=pixel)
        weight = _meta(dim, c, patch, patch, dtype=dtype)
        position, scalar = _meta(tokens + 1, dim, dtype=dtype), _meta(c)
        mean = (scalar, scalar) if pixel == "uint8" else (None, None)
        bias = weight[:, 0, 0, 0]
        patch_embed.patch_embed(image, weight, bias, position, position, *mean, stride)

    def image_gradient(dtype):
        grad, weight = _meta(b, tokens, dim, dtype=dtype), _meta(dim, c, patch, patch, dtype=dtype)
        sizes = (b, c, size, size)
        patch_embed.patch_embed_image_grad(grad, weight, _meta(c), sizes, stride, False)

    def weight_gradient(dtype, pixel):
        grad, image = _meta(b, tokens, dim, dtype=dtype), _meta(b, c, size, size, dtype=pixel)
        mean = (_meta(c), _meta(c)) if pixel == "uint8" else (None, None)
        sizes = (dim, c, patch, patch)
        patch_embed.patch_embed_weight_grad(grad, image, *mean, sizes, stride, False)

    ways = [
        ("forward", forward, ("bfloat16", "bfloat16")),
        ("forward", forward, ("bfloat16", "uint8")),
        ("forward", forward, ("float32", "float32")),
        ("image gradient", image_gradient, ("bfloat16",)),
        ("image gradient", image_gradient, ("float32",)),
        ("weight gradient", weight_gradient, ("bfloat16", "bfloat16")),
        ("weight gradient", weight_gradient, ("bfloat16", "uint8")),
        ("weight gradient", weight_gradient, ("float32", "float32")),
    ]
    for way, launch, types in ways:
        of_bytes = " uint8" if types[-1] == "uint8" else ""
        name = f"{way} {b}x{c}x{size}x{size}/{patch} to {dim}{of_bytes}"
        work = cost.patch_embed(b, c, size, dim, patch, types[0], types[-1])
        yield Case("patch_embed", name, types[0], lambda f=launch, t=types: f(*t), work)


def _unfold() -> Iterator[Case]:
    b, c, size, k = 64, 64, 56, 3
    elements, patches = c * k * k, size * size
    window = ((k, k), (1, 1), (1, 1), (1, 1))
    moved = b * (c * size * size + elements * patches) / 2  # elements of one tensor of two

    def columns():
        unfold.unfold(_meta(b, c, size, size, dtype="bfloat16"), *window)

    def image():
        unfold.fold(_meta(b, elements, patches, dtype="bfloat16"), (size, size), *window)

    name = f"{b}x{c}x{size}x{size} {k}x{k}"
    work = cost.elementwise(moved, 2, "bfloat16", operations=1)
    yield Case("unfold", name, "bfloat16", columns, work)
    yield Case("fold", name, "bfloat16", image, work)


def _projected_step() -> Iterator[Case]:
    shape = (64, 3, 224, 224)
    elements = 64 * 3 * 224 * 224
    for dtype, norm in (
        ("float32", "linf"),
        ("bfloat16", "linf"),
        ("float32", "l2"),
        ("float32", "l1"),
    ):

        def call(dtype=dtype, norm=norm):
            x = _meta(*shape, dtype=dtype)
            place = ("linf", "l2", "l1").index(norm)
            of_step = (x, x, x, place, False, False, 0.1, 0.3, None, None, 0.0, 1.0, 0.99)
            if norm == "linf":
                projected_step.projected_step_momentum(*of_step, x, 1.0)
            else:
                projected_step.projected_step(*of_step)

        momentum = " with momentum" if norm == "linf" else ""
        work = cost.elementwise(elements, 6 if norm == "linf" else 4, dtype)
        name = f"{norm}{momentum} {'x'.join(map(str, shape))}"
        yield Case("projected_step", name, dtype, call, work)
