"""A ``torch.nn.Conv2d`` whose convolution is pyvit's."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.ops import _checks
from pyvit.ops.conv2d import conv2d

_NAME = "nn.Conv2d"
_PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2d(nn.Conv2d):
    """2-D convolution: ``torch.nn.Conv2d`` computed by :func:`pyvit.conv2d`.

    Arguments, defaults, initialisation, parameters, state-dict keys and ``repr`` are those of
    ``torch.nn.Conv2d``; it is one to ``isinstance``. Any ``padding_mode`` other than "zeros"
    pads a copy of the input first, as torch does.

    Shapes: input ``[B, C, H, W]`` or ``[C, H, W]``, output ``[B, D, H', W']`` or ``[D, H', W']``.
    Errors: ``TypeError`` or ``ValueError`` naming the layer and the argument.
    Cost: see :func:`pyvit.conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _checks.choice(_NAME, "padding_mode", padding_mode, get_args(_PaddingMode))
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        # torch types its pairs as tuples of any length.
        geometry: Any = (self.stride, padding, self.dilation, self.groups)
        return conv2d(input, weight, bias, *geometry)


def _check(
    in_channels: object,
    out_channels: object,
    kernel_size: object,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
) -> None:
    """What torch's own constructor lets through until the first call."""
    channels_in = _checks.integer(_NAME, "in_channels", in_channels, minimum=1)
    channels_out = _checks.integer(_NAME, "out_channels", out_channels, minimum=1)
    _checks.pair(_NAME, "kernel_size", kernel_size, minimum=1)
    strides = _checks.pair(_NAME, "stride", stride, minimum=1)
    _checks.pair(_NAME, "dilation", dilation, minimum=1)
    count = _checks.integer(_NAME, "groups", groups, minimum=1)
    if channels_in % count or channels_out % count:
        wanted = f"a divisor of in_channels ({channels_in}) and out_channels ({channels_out})"
        _checks.fail(ValueError, _NAME, "groups", wanted, count)
    if not isinstance(padding, str):
        _checks.pair(_NAME, "padding", padding, minimum=0)
        return
    _checks.choice(_NAME, "padding", padding, ("same", "valid"))
    if padding == "same" and strides != (1, 1):
        _checks.fail(ValueError, _NAME, "stride", "1 where padding is 'same'", strides)
