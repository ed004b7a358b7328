"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from pyvit.ops import _checks


class DropPath(nn.Module):
    """Drop a residual branch, image by image, with probability ``rate``, in training alone.

    The kept branches are scaled by 1 / (1 - rate), so that the mean stays. Shapes: ``[B, ...]``
    in and out. Source: Huang et al., Deep Networks with Stochastic Depth, 2016.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if _checks.number("nn.DropPath", "rate", rate, minimum=0) >= 1:
            _checks.fail(ValueError, "nn.DropPath", "rate", "below 1", rate)
        self.rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
