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
    batch, out_channels, kernel = len(x), len(weight), weight.shape[2:]

    def both(value: int | tuple[int, int]) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    out_size = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], kernel, both(stride), both(padding), both(dilation), strict=True
        )
    ]
    columns = F.unfold(x, tuple(kernel), dilation, padding, stride)
    columns = columns.reshape(batch, groups, -1, out_size[0] * out_size[1])
    rows = weight.reshape(groups, out_channels // groups, -1)
    y = torch.einsum("gok,bgkp->bgop", rows, columns)
    y = y.reshape(batch, out_channels, *out_size)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)
