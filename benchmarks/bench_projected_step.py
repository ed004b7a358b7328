"""projected_step against the chains of operators that torchattacks runs for the same step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from harness import OURS, Case, Options, Row, against_truth, generator, run_under_pytest
from torch import Tensor

import pyvit
from pyvit.reference.projected_step import projected_step as reference

SHAPES = {"64x3x224x224": (64, 3, 224, 224), "128x3x32x32": (128, 3, 32, 32)}
GPU_SHAPES = {"256x3x224x224": (256, 3, 224, 224)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# step and radius; L1 a tenth of its usual ball, so that projecting has something to do
SIZES = {"linf": (2 / 255, 8 / 255), "l2": (0.2, 1.0), "l1": (1.0, 12.0)}
GROUPS = {"L-infinity": "linf", "L-infinity momentum": "linf", "L2": "l2", "L1": "l1"}


def cases(options: Options) -> list[Case]:
    return [
        Case("projected_step", group, f"{name} {dtype}", partial(build, group, shape, dtype))
        for group in GROUPS
        for name, shape in _shapes(group, options).items()
        for dtype in DTYPES
    ]


def _shapes(group: str, options: Options) -> dict[str, tuple[int, ...]]:
    if options.quick:
        return {"4x3x64x64": (4, 3, 64, 64)}
    if group == "L1":  # its peer goes image by image, and sorts
        return {"8x3x224x224": (8, 3, 224, 224)}
    return GPU_SHAPES if options.gpu_rows else SHAPES


def eager_linf(x, grad, x0, momentum=None, *, norm, step_size, eps):
    if momentum is not None:
        grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
        grad = grad + momentum * 1.0
    adv = x + step_size * grad.sign()
    delta = torch.clamp(adv - x0, min=-eps, max=eps)
    y = torch.clamp(x0 + delta, min=0, max=1)
    return y if momentum is None else (y, grad)


def eager_l2(x, grad, x0, *, norm, step_size, eps):
    grad = grad / (torch.norm(grad.flatten(1), p=2, dim=1) + 1e-10).view(-1, 1, 1, 1)
    delta = x + step_size * grad - x0
    factor = eps / torch.norm(delta.flatten(1), p=2, dim=1)
    delta = delta * torch.min(factor, torch.ones_like(factor)).view(-1, 1, 1, 1)
    return torch.clamp(x0 + delta, min=0, max=1)


def _same_bits(results: Mapping[str, Any]) -> dict[str, str]:
    theirs = next(value for name, value in results.items() if name != OURS)
    same = torch.equal(results[OURS], theirs)
    return {} if same else {OURS: "not the eager chain's bits"}


def build(group: str, shape: tuple[int, ...], dtype_name: str) -> Row:
    norm, dtype = GROUPS[group], DTYPES[dtype_name]
    step_size, eps = SIZES[norm]
    numbers_of = generator(0)

    def draw(kind) -> Tensor:
        return kind(shape, generator=numbers_of)

    x0 = draw(torch.rand)
    x = (x0 + 0.02 * draw(torch.randn)).clamp(0, 1)
    operands = [t.to(dtype) for t in (x, draw(torch.randn), x0)]
    options: dict[str, Any] = dict(norm=norm, step_size=step_size, eps=eps)
    eager = {"linf": eager_linf, "l2": eager_l2, "l1": reference}[norm]
    if group.endswith("momentum"):
        momentum = draw(torch.randn).to(dtype)
        ours = partial(pyvit.projected_step, *operands, momentum=momentum, **options)
        theirs = partial(eager, *operands, momentum, **options)
    else:
        ours = partial(pyvit.projected_step, *operands, **options)
        theirs = partial(eager, *operands, **options)

    def truth() -> Tensor | tuple[Tensor, ...]:
        exact = [t.double() for t in operands]
        if not group.endswith("momentum"):
            return reference(*exact, **options)
        # The sign of the momentum turns at its rounding to the dtype: step along the rounded one.
        _, v = pyvit.projected_step(*operands, momentum=momentum, **options)
        kept = momentum.double()
        return reference(exact[0], v.double(), exact[2], **options), (
            exact[1] / exact[1].abs().mean((1, 2, 3), keepdim=True) + kept
        )

    numbers = operands[0].numel()
    return Row(
        ours=ours,
        peers={"eager chain": theirs},
        flops=6.0 * numbers,
        bytes=float(operands[0].element_size() * numbers * (6 if "momentum" in group else 4)),
        check=_same_bits if group == "L-infinity" else against_truth(truth),
        dtype=dtype,
    )


def test_projected_step(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
