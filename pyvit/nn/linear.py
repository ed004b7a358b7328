"""A ``torch.nn.Linear`` on pyvit's kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit.ops import _checks
from pyvit.ops.linear import linear

_NAME = "nn.Linear"


class Linear(nn.Linear):
    """``x @ weight.T + bias``: ``torch.nn.Linear`` computed by :func:`pyvit.linear`.

    Arguments, defaults, initialisation, parameters, state-dict keys and ``repr`` are those of
    ``torch.nn.Linear``; it is one to ``isinstance``. Unlike torch's, a row of its output is the
    same bits in a batch of any size.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``.
    Errors: ``TypeError`` or ``ValueError`` naming the layer and the argument.
    Cost: see :func:`pyvit.linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer(_NAME, "in_features", in_features, minimum=1)
        _checks.integer(_NAME, "out_features", out_features, minimum=1)
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
