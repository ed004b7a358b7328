"""patch_embed at ViT sizes, against the chain of PyTorch operations in both layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from harness import Case, Options, Row, against_truth, generator, run_under_pytest
from torch import Tensor

import pyvit
from pyvit.reference.patch_embed import patch_embed as chain


@dataclass(frozen=True)
class Embedding:
    model: str
    batch: int
    size: int  # height and width in pixels
    patch: int
    dim: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}/{self.patch} {self.batch}x3x{self.size}x{self.size} {dtype}"

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 + 1

    @property
    def flops(self) -> float:
        """Of the forward pass, and of each of the gradients of image and weight."""
        return 2.0 * self.batch * (self.tokens - 1) * self.dim * 3 * self.patch**2


EMBEDDINGS = [
    Embedding("ViT-B", 8, 224, 16, 768),
    Embedding("ViT-Ti", 8, 224, 16, 192),
    Embedding("ViT-B", 8, 224, 32, 768),
    Embedding("ViT-H", 2, 224, 14, 1280),
    Embedding("ViT-Ti", 64, 32, 4, 192),  # CIFAR
    Embedding("ViT-B", 1, 224, 16, 768),
    Embedding("ViT-B", 8, 224, 16, 768, torch.bfloat16),
]
GPU_EMBEDDINGS = [
    Embedding("ViT-B", 256, 224, 16, 768, torch.bfloat16),
    Embedding("ViT-H", 64, 224, 14, 1280, torch.bfloat16),
    Embedding("ViT-Ti", 1024, 32, 4, 192, torch.bfloat16),
    Embedding("ViT-B", 256, 224, 16, 768),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS = ("forward", "backward", "image gradient")
BYTES = "uint8"  # images as a decoder gives them; in the forward group alone


def cases(options: Options) -> list[Case]:
    embeddings = GPU_EMBEDDINGS if options.gpu_rows else EMBEDDINGS
    if options.quick:
        embeddings = [replace(e, batch=1) for e in embeddings]
    return [
        Case("patch_embed", group, f"{e}, {kind}", partial(build, group, e, kind, options))
        for group in GROUPS
        for e in embeddings
        for kind in ([*LAYOUTS, BYTES] if group == "forward" else LAYOUTS)
    ]


def _arguments(e: Embedding, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every argument of the function; the same values whatever the layout."""
    numbers = generator(0)
    draw = partial(torch.randn, generator=numbers)
    image = torch.rand(e.batch, 3, e.size, e.size, generator=numbers)
    floats = {
        "weight": draw(e.dim, 3, e.patch, e.patch) / (3 * e.patch**2) ** 0.5,
        "bias": draw(e.dim),
        "pos_embed": draw(1, e.tokens, e.dim),
        "cls_token": draw(1, 1, e.dim),
    }
    # Rounded to the benchmark's dtype first, so that a float64 run sees the same numbers.
    floats = {name: value.to(e.dtype).to(dtype) for name, value in floats.items()}
    if kind == BYTES:
        image = (image * 255).to(torch.uint8)
    else:
        image = image.to(e.dtype).to(dtype).contiguous(memory_format=LAYOUTS[kind])
    statistics = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    of_pixels = torch.float64 if dtype is torch.float64 else torch.float32
    values = {name: torch.tensor(v).to(of_pixels) for name, v in statistics.items()}
    return {"image": image, **floats, **values}


def _work(group: str, embed, e: Embedding, kind: str, dtype: torch.dtype | None = None):
    """A callable that does the group's work with ``embed`` alone: backward excludes forward."""
    arguments = _arguments(e, kind, dtype or e.dtype)
    names = {
        "forward": (),
        "backward": ("image", "weight", "bias", "pos_embed", "cls_token"),
        "image gradient": ("image",),
    }[group]
    wanted = [arguments[name].requires_grad_() for name in names]
    forward = partial(embed, **arguments)
    if group == "forward":
        return forward
    tokens = forward()
    grad = torch.randn(tokens.shape, generator=generator(1))
    grad = grad.to(e.dtype).to(tokens.dtype)
    return lambda: torch.autograd.grad(tokens, wanted, grad, retain_graph=True)


def _bytes(group: str, e: Embedding, kind: str) -> float:
    item = e.dtype.itemsize
    image = e.batch * 3 * e.size**2 * (1 if kind == BYTES else item)
    tokens = e.batch * e.tokens * e.dim * item
    weight, position = e.dim * 3 * e.patch**2 * item, e.tokens * e.dim * item
    # Backward reads the tokens' gradient, image and weight and writes all the gradients.
    return float(
        {
            "forward": image + weight + position + tokens,
            "backward": tokens + 2 * image + 2 * weight + position,
            "image gradient": tokens + weight + image,
        }[group]
    )


def build(group: str, e: Embedding, kind: str, options: Options) -> Row:
    work = partial(_work, group, e=e)
    peers = {"eager chain": work(chain, kind=kind)}
    if kind != BYTES:
        other = next(layout for layout in LAYOUTS if layout != kind)
        peers["eager chain, other layout"] = work(chain, kind=other)
    if (
        e.dtype is torch.bfloat16 and not options.gpu_rows
    ):  # the same values; 1x: widening costs nothing
        peers["our float32"] = work(pyvit.patch_embed, kind=kind, dtype=torch.float32)
    if options.compile:
        peers["compiled chain"] = work(torch.compile(chain), kind=kind)

    def truth() -> Tensor | tuple[Tensor, ...]:
        return work(chain, kind=BYTES if kind == BYTES else "NCHW", dtype=torch.float64)()

    return Row(
        ours=work(pyvit.patch_embed, kind=kind),
        peers=peers,
        flops=e.flops * (2 if group == "backward" else 1),
        bytes=_bytes(group, e, kind),
        # Gradients sum over more terms than the forward pass: the tests' factor for them is 3.
        check=against_truth(truth, factor=2.0 if group == "forward" else 3.0),
        dtype=e.dtype,
    )


def test_patch_embed(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
