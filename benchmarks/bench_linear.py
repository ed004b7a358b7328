"""linear at the sizes of ViT-Ti and ViT-B, against F.linear."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Options, Row, against_truth, generator, run_under_pytest

import pyvit

TOKENS = 8 * 197  # eight images
# rows, inputs, outputs: qkv, proj, fc1, fc2 of ViT-Ti and of ViT-B, and a head
SIZES = [
    (TOKENS, 192, 576),
    (TOKENS, 192, 192),
    (TOKENS, 192, 768),
    (TOKENS, 768, 192),
    (TOKENS, 768, 2304),
    (TOKENS, 768, 768),
    (TOKENS, 768, 3072),
    (TOKENS, 3072, 768),
    (8, 768, 1000),
]
GPU_SIZES = [(rows * 8, inputs, outputs) for rows, inputs, outputs in SIZES[4:]]
GROUPS = ("forward", "backward", "input gradient")


def cases(options: Options) -> list[Case]:
    sizes = GPU_SIZES if options.gpu_rows else SIZES
    dtypes = [torch.bfloat16, torch.float32] if options.gpu_rows else [torch.float32]
    if options.quick:
        sizes = [(min(rows, 197), inputs, outputs) for rows, inputs, outputs in sizes]
    return [
        Case("linear", _title(group, dtype), _name(size), partial(build, group, size, dtype))
        for dtype in dtypes
        for group in GROUPS
        for size in sizes
    ]


def _title(group: str, dtype: torch.dtype) -> str:
    return group if dtype is torch.float32 else f"{group}, {dtype}".replace("torch.", "")


def _name(size: tuple[int, int, int]) -> str:
    rows, inputs, outputs = size
    return f"{rows}x{inputs} to {outputs}"


def _work(group: str, linear, size: tuple[int, int, int], dtype, rounded=None):
    """A callable that does the group's work with ``linear`` alone: backward excludes forward.

    Its arguments are of ``dtype``, with values that ``rounded`` has too.
    """
    rows, inputs, outputs = size
    draw = partial(torch.randn, generator=generator(0))
    x, weight, bias, grad = map(draw, ((rows, inputs), (outputs, inputs), outputs, (rows, outputs)))
    tensors = (x, weight / inputs**0.5, bias, grad)
    x, weight, bias, grad = (t.to(rounded or dtype).to(dtype) for t in tensors)
    if group == "forward":
        return lambda: linear(x, weight, bias)
    wanted = [x] if group == "input gradient" else [x, weight, bias]
    for tensor in wanted:
        tensor.requires_grad_()
    y = linear(x, weight, bias)
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def build(group: str, size: tuple[int, int, int], dtype: torch.dtype) -> Row:
    rows, inputs, outputs = size
    x, weight, y = rows * inputs, inputs * outputs, rows * outputs
    numbers = x + weight + y if group != "backward" else 2 * x + 2 * weight + y
    work = partial(_work, group, size=size)
    return Row(
        ours=work(pyvit.linear, dtype=dtype),
        peers={"F.linear": work(F.linear, dtype=dtype)},
        flops=2.0 * rows * weight * (2 if group == "backward" else 1),
        bytes=float(dtype.itemsize * numbers),
        check=against_truth(
            lambda: work(F.linear, dtype=torch.float64, rounded=dtype)(),
            2.0 if group == "forward" else 3.0,
        ),
        dtype=dtype,
    )


def test_linear(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
