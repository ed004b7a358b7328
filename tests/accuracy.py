"""The error bar of every comparison: ours against PyTorch's own, both against float64 truth."""

from __future__ import annotations

import torch
from torch import Tensor


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from the truth; NaN and infinity must stand where they stand."""
    value, truth = value.double(), truth.double()
    odd = ~torch.isfinite(truth)
    same = (value[odd] == truth[odd]) | (value[odd].isnan() & truth[odd].isnan())
    if not bool(same.all()):
        return float("inf")
    difference = (value[~odd] - truth[~odd]).abs()
    if difference.isnan().any():
        return float("inf")
    return float(difference.max()) if difference.numel() else 0.0


def one_ulp(dtype: torch.dtype, truth: Tensor) -> float:
    """One unit in the last place of ``dtype`` at the scale of the largest finite value."""
    finite = truth[torch.isfinite(truth)]
    if finite.numel() == 0:
        return 0.0
    return float(finite.abs().max()) * torch.finfo(dtype).eps


def assert_as_accurate(
    ours: Tensor, theirs: Tensor, truth: Tensor, factor: float, name: str = "result"
) -> None:
    """Our error is at most ``factor`` times PyTorch's own, plus one ulp of the result's scale."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)} for {tuple(truth.shape)}"
    bar = factor * max_error(theirs, truth) + one_ulp(ours.dtype, truth)
    error = max_error(ours, truth)
    assert error <= bar, f"{name}: error {error:.3g} above the bar {bar:.3g} ({factor} x PyTorch's)"


def assert_within_rounding(
    ours: Tensor, truth: Tensor, magnitude: Tensor, terms: int, name: str = "result"
) -> None:
    """For float64, where PyTorch's result is the truth: both are sums of ``terms`` products.

    A sum of n products in any order errs by at most n · eps/2 · Σ|products| to first order, and
    the truth was summed so too. ``magnitude`` is Σ|products|: the same op on absolute values.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)} for {tuple(truth.shape)}"
    bar = (terms + 1) * torch.finfo(ours.dtype).eps * magnitude.abs()
    excess = ((ours - truth).abs() - bar).max() if ours.numel() else torch.tensor(0.0)
    assert bool(excess <= 0), f"{name}: error exceeds the rounding of {terms} products"
