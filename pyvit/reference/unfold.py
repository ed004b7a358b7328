"""unfold and fold by indexing, one kernel element at a time, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def _windows(image_size, kernel, dilation, padding, stride) -> Iterator[tuple[int, slice, slice]]:
    """For each kernel element, the pixels of the padded image that it meets."""

    def pixels(axis: int, offset: int) -> slice:
        last = image_size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1)
        return slice(offset * dilation[axis], offset * dilation[axis] + last, stride[axis])

    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield i * kernel[1] + j, pixels(0, i), pixels(1, j)


def unfold(x: Tensor, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Tensor:
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = _windows(x.shape[2:], kernel, dilation, padding, stride)
    elements = [padded[:, :, rows, columns].flatten(2) for _, rows, columns in windows]
    return torch.stack(elements, 2).flatten(1, 2)


def fold(
    cols: Tensor, output_size: Pair, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair
) -> Tensor:
    batch, elements, _ = cols.shape
    taps = kernel[0] * kernel[1]
    cols = cols.reshape(batch, elements // taps, taps, -1)
    height, width = (n + 2 * p for n, p in zip(output_size, padding, strict=True))
    padded = cols.new_zeros(batch, elements // taps, height, width)
    for tap, rows, columns in _windows(output_size, kernel, dilation, padding, stride):
        window = padded[:, :, rows, columns]
        window += cols[:, :, tap].reshape(window.shape)
    top, left = padding
    return padded[:, :, top : height - top, left : width - left]
