"""linear at the sizes of ViT-Ti and ViT-B, against F.linear."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Options, Row, against_truth, run_under_pytest

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
GROUPS = ("forward", "backward", "input gradient")


def cases(options: Options) -> list[Case]:
    sizes = [(min(rows, 197), i, o) for rows, i, o in SIZES] if options.quick else SIZES
    return [
        Case("linear", group, f"{rows}x{inputs} to {outputs}", partial(build, group, size))
        for group in GROUPS
        for size in sizes
        for rows, inputs, outputs in [size]
    ]


def _work(group: str, linear, size: tuple[int, int, int], dtype=torch.float32):
    """A callable that does the group's work with ``linear`` alone: backward excludes forward."""
    rows, inputs, outputs = size
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    x, weight, bias, grad = (t.to(dtype) for t in (x, weight / inputs**0.5, bias, grad))
    if group == "forward":
        return lambda: linear(x, weight, bias)
    wanted = [x] if group == "input gradient" else [x, weight, bias]
    for tensor in wanted:
        tensor.requires_grad_()
    y = linear(x, weight, bias)
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def build(group: str, size: tuple[int, int, int]) -> Row:
    rows, inputs, outputs = size
    x, weight, y = rows * inputs, inputs * outputs, rows * outputs
    numbers = x + weight + y if group != "backward" else 2 * x + 2 * weight + y
    work = partial(_work, group, size=size)
    return Row(
        ours=work(pyvit.linear),
        peers={"F.linear": work(F.linear)},
        flops=2.0 * rows * weight * (2 if group == "backward" else 1),
        bytes=4.0 * numbers,
        check=against_truth(
            lambda: work(F.linear, dtype=torch.float64)(), 2.0 if group == "forward" else 3.0
        ),
    )


def test_linear(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
