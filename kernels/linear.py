"""A linear layer on a GPU: the 1×1 convolution that it is (conv2d.py), and its weight's gradient.

The sums of a row run in one order whatever the number of rows, unlike those of a library that picks
another kernel for another size: a row's result is the same bits alone and among any others.
"""

from __future__ import annotations

from torch import Tensor

from pyvit.kernels import conv2d

POINT = ((1, 1), (0, 0, 0, 0), (1, 1), 1)  # stride, padding, dilation, groups


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``pyvit::linear`` for CUDA tensors: x of two dimensions, or contiguous."""
    outputs, inputs = weight.shape
    out = x.new_empty((*x.shape[:-1], outputs))
    pixels = _pixels(x, inputs)
    point = weight[:, :, None, None]
    conv2d.conv2d_into(_pixels(out, outputs), pixels, point, bias, *POINT, layer="linear")
    return out


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """``pyvit::linear_weight_grad`` for CUDA tensors, laid out as for :func:`linear`."""
    outputs, inputs = grad.shape[-1], x.shape[-1]
    size = (outputs, inputs, 1, 1)
    gradient = conv2d.conv2d_weight_grad(
        _pixels(grad, outputs), _pixels(x, inputs), size, *POINT, False, layer="linear"
    )
    return gradient.view(outputs, inputs)


def _pixels(x: Tensor, features: int) -> Tensor:
    """Rows as one column of pixels: ``[1, features, rows, 1]``, features side by side."""
    rows = x if x.dim() == 2 else x.view(-1, features)
    return rows.t()[None, :, :, None]
