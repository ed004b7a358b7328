"""Convolution as a matrix product with the column matrix, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``F.unfold`` then one matrix product a group: the textbook form, with all its memory."""
    batch, channels, height, width = x.shape
    out_channels, channels_per_group, kernel_height, kernel_width = weight.shape

    def both(value):
        return value if isinstance(value, tuple) else (value, value)

    stride, padding, dilation = both(stride), both(padding), both(dilation)
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            (height, width), (kernel_height, kernel_width), stride, padding, dilation, strict=True
        )
    )
    columns = F.unfold(x, (kernel_height, kernel_width), dilation, padding, stride)
    columns = columns.reshape(batch, groups, -1, out_height * out_width)
    rows = weight.reshape(groups, out_channels // groups, -1)
    y = torch.einsum("gok,bgkp->bgop", rows, columns)
    y = y.reshape(batch, out_channels, out_height, out_width)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)
