"""The column matrix of an image's patches, and the sum back: ``unfold`` and ``fold``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit.ops import _backends, _checks, _library

_GEOMETRY = "int[] kernel_size, int[] dilation, int[] padding, int[] stride"
_library.define(f"unfold(Tensor x, {_GEOMETRY}) -> Tensor")
_library.define(f"fold(Tensor cols, int[] output_size, {_GEOMETRY}) -> Tensor")
_backends.gpu_kernels("unfold", "unfold", "fold")

# A geometry is (kernel_size, dilation, padding, stride), each (vertical, horizontal).


def _grid(image_size, kernel_size, dilation, padding, stride) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = (
        (image_size[a] + 2 * padding[a] - dilation[a] * (kernel_size[a] - 1) - 1) // stride[a] + 1
        for a in range(2)
    )
    return rows, columns


@_library.fake("unfold")
def _(x, kernel_size, dilation, padding, stride):
    batch, channels, *image_size = x.shape
    rows, columns = _grid(image_size, kernel_size, dilation, padding, stride)
    return x.new_empty((batch, channels * kernel_size[0] * kernel_size[1], rows * columns))


@_library.fake("fold")
def _(cols, output_size, kernel_size, dilation, padding, stride):
    batch, elements, _ = cols.shape
    return cols.new_empty((batch, elements // (kernel_size[0] * kernel_size[1]), *output_size))


# The two are each other's transpose, so each is the other's gradient.


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, geometry):
        ctx.image_size, ctx.geometry = tuple(x.shape[2:]), geometry
        return torch.ops.pyvit.unfold(x, *geometry)

    @staticmethod
    def backward(ctx, grad):
        return _fold(grad, ctx.image_size, ctx.geometry), None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cols, output_size, geometry):
        ctx.geometry = geometry
        return torch.ops.pyvit.fold(cols, output_size, *geometry)

    @staticmethod
    def backward(ctx, grad):
        return _unfold(grad, ctx.geometry), None, None


def _unfold(x, geometry):
    if _library.needs_grad(x):
        return _Unfold.apply(x, geometry)
    return torch.ops.pyvit.unfold(x, *geometry)


def _fold(cols, output_size, geometry):
    if _library.needs_grad(cols):
        return _Fold.apply(cols, output_size, geometry)
    return torch.ops.pyvit.fold(cols, output_size, *geometry)


def _check_geometry(op, kernel_size, dilation, padding, stride):
    return (
        _checks.pair(op, "kernel_size", kernel_size, minimum=1),
        _checks.pair(op, "dilation", dilation, minimum=1),
        _checks.pair(op, "padding", padding, minimum=0),
        _checks.pair(op, "stride", stride, minimum=1),
    )


def _check_span(op, argument, image_size, geometry) -> None:
    """The window, spread by its dilation, fits the padded image at least once."""
    kernel_size, dilation, padding, _ = geometry
    for axis, name in enumerate(("rows", "columns")):
        span = dilation[axis] * (kernel_size[axis] - 1) + 1
        padded = image_size[axis] + 2 * padding[axis]
        if padded < span:
            wanted = f"of at least {span} {name} with padding, the kernel's span"
            _checks.fail(ValueError, op, argument, wanted, padded)


def unfold(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    stride: int | tuple[int, int] = 1,
) -> Tensor:
    """The patches of images as the columns of a matrix, as ``torch.nn.functional.unfold``.

    Args:
        x: images ``[B, C, H, W]``, or one image ``[C, H, W]``; NCHW or ``channels_last`` (any
            strides are right, those two are fast).
        kernel_size: (kh, kw) of a patch in pixels, or one int for both.
        dilation: distance between a patch's elements in pixels.
        padding: rows and columns of zeros on each side.
        stride: distance between patches in pixels.

    Returns:
        ``[B, C·kh·kw, L]`` (``[C·kh·kw, L]`` for one image), contiguous, of x's dtype. Row
        ``(c·kh + i)·kw + j`` holds element (i, j) of channel c; column l is patch l, of
        ``L = H'·W'`` row by row, ``H' = (H + 2·padding - dilation·(kh - 1) - 1) // stride + 1``.

    Dtypes: float32, float64, bfloat16, float16; values are copied exactly.

    Differentiable any number of times; the gradient is :func:`fold`.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost: no arithmetic; the result, kh·kw / stride² times the size of x, is written once.

    Example:
        >>> import torch, pyvit
        >>> pyvit.unfold(torch.randn(2, 3, 8, 8), kernel_size=4, stride=4).shape
        torch.Size([2, 48, 4])
    """
    op = "unfold"
    _checks.tensor(op, "x", x, ndim=(3, 4))
    _backends.require_kernels(op, x)
    geometry = _check_geometry(op, kernel_size, dilation, padding, stride)
    if x.shape[-3] < 1:
        _checks.fail(ValueError, op, "x", "an image of at least 1 channel", _checks.shape_of(x))
    _check_span(op, "x", x.shape[-2:], geometry)
    if x.dim() == 3:
        return _unfold(x.unsqueeze(0), geometry).squeeze(0)
    return _unfold(x, geometry)


def fold(
    cols: Tensor,
    output_size: int | tuple[int, int],
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    stride: int | tuple[int, int] = 1,
) -> Tensor:
    """The sum of patches back into images, as ``torch.nn.functional.fold``.

    Each pixel is the sum of the elements of ``cols`` that :func:`unfold` would have copied it
    to; a pixel that no patch covers is 0. It is not the inverse of ``unfold`` where patches
    overlap.

    Args:
        cols: ``[B, C·kh·kw, L]``, or ``[C·kh·kw, L]`` for one image; any strides.
        output_size: (H, W) of the image in pixels, or one int for both.
        kernel_size, dilation, padding, stride: as for :func:`unfold`.

    Returns:
        ``[B, C, H, W]`` (``[C, H, W]`` for one image), contiguous, of cols' dtype.

    Dtypes: float32, float64, bfloat16, float16; summed in float32 (float64 for float64).

    Differentiable any number of times; the gradient is :func:`unfold`.

    Deterministic: each pixel gathers its sum in one order, without atomics, whatever the batch
    and the number of threads.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost: one addition for each element of ``cols``, which is read once.

    Example:
        >>> import torch, pyvit
        >>> pyvit.fold(torch.ones(1, 9, 16), output_size=4, kernel_size=3, padding=1)[0, 0, :2]
        tensor([[4., 6., 6., 4.],
                [6., 9., 9., 6.]])
    """
    op = "fold"
    _checks.tensor(op, "cols", cols, ndim=(2, 3))
    _backends.require_kernels(op, cols)
    output_size = _checks.pair(op, "output_size", output_size, minimum=1)
    geometry = _check_geometry(op, kernel_size, dilation, padding, stride)
    _check_span(op, "output_size", output_size, geometry)
    taps = geometry[0][0] * geometry[0][1]
    elements, patches = cols.shape[-2:]
    if elements < 1 or elements % taps != 0:
        wanted = f"of a multiple of {taps} rows (kernel_size's elements)"
        _checks.fail(ValueError, op, "cols", wanted, elements)
    rows, columns = _grid(output_size, *geometry)
    if patches != rows * columns:
        wanted = f"of {rows} x {columns} = {rows * columns} columns, the patches of output_size"
        _checks.fail(ValueError, op, "cols", wanted, patches)
    if cols.dim() == 2:
        return _fold(cols.unsqueeze(0), output_size, geometry).squeeze(0)
    return _fold(cols, output_size, geometry)
