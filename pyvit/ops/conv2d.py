"""Unfold-based 2-D convolution: forward, its gradients, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit.ops import _backends, _checks, _library

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, bool channels_last"
_library.define(f"conv2d(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor")
_library.define(
    f"conv2d_input_grad(Tensor grad, Tensor weight, int[] input_size, {_GEOMETRY}) -> Tensor"
)
_library.define(
    f"conv2d_weight_grad(Tensor grad, Tensor x, int[] weight_size, {_GEOMETRY}) -> Tensor"
)
_backends.gpu_kernels("conv2d", "conv2d", "conv2d_input_grad", "conv2d_weight_grad", tf32="conv")


def _output_extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


@_library.fake("conv2d")
def _(x, weight, bias, stride, padding, dilation, groups, channels_last):
    extents = [
        _output_extent(
            x.shape[2 + axis],
            weight.shape[2 + axis],
            stride[axis],
            padding[2 * axis] + padding[2 * axis + 1],
            dilation[axis],
        )
        for axis in range(2)
    ]
    size = (x.shape[0], weight.shape[0], *extents)
    return torch.empty(
        size, dtype=x.dtype, device=x.device, memory_format=_library.memory_format(channels_last)
    )


@_library.fake("conv2d_input_grad")
def _(grad, weight, input_size, stride, padding, dilation, groups, channels_last):
    return torch.empty(
        input_size,
        dtype=grad.dtype,
        device=grad.device,
        memory_format=_library.memory_format(channels_last),
    )


@_library.fake("conv2d_weight_grad")
def _(grad, x, weight_size, stride, padding, dilation, groups, channels_last):
    return torch.empty(
        weight_size,
        dtype=grad.dtype,
        device=grad.device,
        memory_format=_library.memory_format(channels_last),
    )


# A geometry is (stride, padding, dilation, groups); padding is (top, bottom, left, right).
# The three operations below are each other's derivatives: conv2d is linear in x and in weight.


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.geometry = geometry
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        ctx.x_size, ctx.weight_size = tuple(x.shape), tuple(weight.shape)
        ctx.x_last, ctx.weight_last = (
            _library.is_channels_last(x),
            _library.is_channels_last(weight),
        )
        return _forward_op(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        asked_x, asked_weight, asked_bias, _ = _library.asked_for(ctx)
        grad_x = grad_weight = grad_bias = None
        if asked_x:
            grad_x = _input_grad(grad, weight, ctx.x_size, ctx.x_last, ctx.geometry)
        if asked_weight:
            grad_weight = _weight_grad(grad, x, ctx.weight_size, ctx.weight_last, ctx.geometry)
        if asked_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


class _InputGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weight, input_size, channels_last, geometry):
        ctx.geometry = geometry
        wants_grad, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if wants_weight else None, weight if wants_grad else None)
        ctx.weight_size, ctx.weight_last = tuple(weight.shape), _library.is_channels_last(weight)
        return torch.ops.pyvit.conv2d_input_grad(grad, weight, input_size, *geometry, channels_last)

    @staticmethod
    def backward(ctx, grad_of_result):
        grad, weight = ctx.saved_tensors
        grad_grad = grad_weight = None
        if weight is not None:
            grad_grad = _forward(grad_of_result, weight, None, ctx.geometry)
        if grad is not None:
            grad_weight = _weight_grad(
                grad, grad_of_result, ctx.weight_size, ctx.weight_last, ctx.geometry
            )
        return grad_grad, grad_weight, None, None, None


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x, weight_size, channels_last, geometry):
        ctx.geometry = geometry
        wants_grad, wants_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if wants_x else None, x if wants_grad else None)
        ctx.x_size, ctx.x_last = tuple(x.shape), _library.is_channels_last(x)
        return torch.ops.pyvit.conv2d_weight_grad(grad, x, weight_size, *geometry, channels_last)

    @staticmethod
    def backward(ctx, grad_of_result):
        grad, x = ctx.saved_tensors
        grad_grad = grad_x = None
        if x is not None:
            grad_grad = _forward(x, grad_of_result, None, ctx.geometry)
        if grad is not None:
            grad_x = _input_grad(grad, grad_of_result, ctx.x_size, ctx.x_last, ctx.geometry)
        return grad_grad, grad_x, None, None, None


def _forward_op(x, weight, bias, geometry):
    channels_last = _library.is_channels_last(x) or _library.is_channels_last(weight)
    return torch.ops.pyvit.conv2d(x, weight, bias, *geometry, channels_last)


def _forward(x, weight, bias, geometry):
    if _library.needs_grad(x, weight, bias):
        return _Conv2d.apply(x, weight, bias, geometry)
    return _forward_op(x, weight, bias, geometry)


def _input_grad(grad, weight, input_size, channels_last, geometry):
    if _library.needs_grad(grad, weight):
        return _InputGrad.apply(grad, weight, input_size, channels_last, geometry)
    return torch.ops.pyvit.conv2d_input_grad(grad, weight, input_size, *geometry, channels_last)


def _weight_grad(grad, x, weight_size, channels_last, geometry):
    if _library.needs_grad(grad, x):
        return _WeightGrad.apply(grad, x, weight_size, channels_last, geometry)
    return torch.ops.pyvit.conv2d_weight_grad(grad, x, weight_size, *geometry, channels_last)


def _padding(padding, kernel, stride, dilation) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of an int, a pair, 'valid' or 'same'."""
    if isinstance(padding, str):
        _checks.choice("conv2d", "padding", padding, ("valid", "same"))
        if padding == "valid":
            return (0, 0, 0, 0)
        if stride != (1, 1):
            _checks.fail(ValueError, "conv2d", "stride", "1 where padding is 'same'", stride)
        vertical, horizontal = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        # Where the total is odd the extra row goes below, the extra column right, as in torch.
        return (
            vertical // 2,
            vertical - vertical // 2,
            horizontal // 2,
            horizontal - horizontal // 2,
        )
    height, width = _checks.pair("conv2d", "padding", padding, minimum=0)
    return (height, height, width, width)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution, as ``torch.nn.functional.conv2d``, without a column matrix in memory.

    The patches of the image are unfolded one cache panel at a time, inside the packing stage of
    a matrix product, so the extra memory is at most 2 MB a thread whatever the input. On a GPU
    the patches never leave registers and shared memory; a weight that is not ``channels_last``
    is copied to that order, and its gradient takes partial sums of at most 64 MB, or of the
    weight's size in float32 where that is more.

    Args:
        x: images ``[B, C, H, W]``, or one image ``[C, H, W]``; any strides. ``channels_last``
            in gives ``channels_last`` out.
        weight: ``[O, C / groups, kh, kw]``, of x's dtype.
        bias: ``[O]``, of x's dtype, or None.
        stride: step of the window in pixels, an int or (vertical, horizontal).
        padding: rows and columns of zeros on each side, or 'valid' (none) or 'same' (output as
            large as the input; stride 1 only).
        dilation: distance between kernel elements in pixels.
        groups: x's channels and weight's output channels are split into this many groups.

    Returns:
        ``[B, O, H', W']`` with ``H' = (H + 2·padding - dilation·(kh - 1) - 1) // stride + 1``.

    Dtypes: float32, float64, bfloat16, float16; products are summed in float32 (float64 for
    float64). Under autocast the arguments are cast as for ``F.conv2d``.

    Differentiable, twice, with respect to x, weight and bias; each gradient is computed only
    where it is wanted, and x is kept for backward only where weight's gradient is.

    Deterministic and batch-invariant: the result for one image is the same bits alone and in
    any batch.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost: ``2·B·O·H'·W'·(C / groups)·kh·kw`` floating-point operations for the forward pass and
    for each of the gradients of x and weight; inputs and outputs are read and written once or,
    where they exceed the cache, once for every 500 output channels (every 256 pixels for the
    weight).

    Source: the blocked product is Goto's and BLIS's (Van Zee, van de Geijn, 2015); convolution
    with the unfold in the packing stage follows cuDNN's implicit GEMM (Chetlur et al., 2014).

    Example:
        >>> import torch, pyvit
        >>> x = torch.randn(2, 3, 32, 32)
        >>> weight = torch.randn(8, 3, 5, 5)
        >>> pyvit.conv2d(x, weight, stride=2, padding=2).shape
        torch.Size([2, 8, 16, 16])
    """
    op = "conv2d"
    _checks.tensor(op, "x", x, ndim=(3, 4))
    _checks.tensor(op, "weight", weight, ndim=4)
    if bias is not None:
        _checks.tensor(op, "bias", bias, ndim=1)
    x, weight, bias = _library.autocast(x, weight, bias)
    _checks.like(op, "weight", weight, "x", x)
    _backends.require_kernels(op, x)
    stride = _checks.pair(op, "stride", stride, minimum=1)
    dilation = _checks.pair(op, "dilation", dilation, minimum=1)
    groups = _checks.integer(op, "groups", groups, minimum=1)
    out_channels, channels_per_group, *kernel = weight.shape
    if min(kernel) < 1 or channels_per_group < 1:
        _checks.fail(
            ValueError,
            op,
            "weight",
            "without empty dimensions but the first",
            _checks.shape_of(weight),
        )
    margins = _padding(padding, kernel, stride, dilation)
    if x.shape[-3] != channels_per_group * groups:
        wanted = f"an image of {channels_per_group * groups} channels (weight's × groups)"
        _checks.fail(ValueError, op, "x", wanted, _checks.shape_of(x))
    if out_channels % groups != 0:
        _checks.fail(
            ValueError, op, "groups", f"a divisor of weight's {out_channels} outputs", groups
        )
    if bias is not None:
        _checks.like(op, "bias", bias, "x", x)
        _checks.shape(op, "bias", bias, (out_channels,), " (one value an output channel)")
        bias = bias.contiguous()
    for axis, name in enumerate(("rows", "columns")):
        padded = x.shape[axis - 2] + margins[2 * axis] + margins[2 * axis + 1]
        span = dilation[axis] * (kernel[axis] - 1) + 1
        if padded < span:
            wanted = f"of at least {span} {name} with padding, the kernel's span"
            _checks.fail(ValueError, op, "x", wanted, padded)
    geometry = (stride, margins, dilation, groups)
    if x.dim() == 3:
        return _forward(x.unsqueeze(0), weight, bias, geometry).squeeze(0)
    return _forward(x, weight, bias, geometry)
