"""A linear layer, computed as the 1×1 convolution that it is; and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit.ops import _checks, _library
from pyvit.ops.conv2d import _weight_grad

# Of a 1×1 convolution: stride, padding, dilation, groups.
_POINTWISE = ((1, 1), (0, 0, 0, 0), (1, 1), 1)


def _rows(x: Tensor) -> Tensor:
    """``[M, features]`` whose features lie side by side; a copy only where strides demand one."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return x if x.stride(1) == 1 else x.contiguous()


def _image(rows: Tensor) -> Tensor:
    """``[1, features, M, 1]``: rows as the pixels of an image, channels last."""
    return rows.view(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)


def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (outputs, inputs) = _rows(x), weight.shape
    kernel = weight.view(outputs, inputs, 1, 1)
    y = torch.ops.pyvit.conv2d(_image(rows), kernel, bias, *_POINTWISE, True)
    return y.permute(0, 2, 3, 1).view(*x.shape[:-1], outputs)


class _Linear(torch.autograd.Function):
    """Its derivatives are linear layers again, but for the weight's, a sum over all rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        ctx.weight_size = (*weight.shape, 1, 1)
        return _forward_op(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        asked_x, asked_weight, asked_bias = _library.asked_for(ctx)
        grad_x = grad_weight = grad_bias = None
        if asked_x:
            grad_x = _linear(grad, weight.t(), None)
        if asked_weight:
            grad_weight = _weight_grad(
                _image(_rows(grad)), _image(_rows(x)), ctx.weight_size, False, _POINTWISE
            ).view(ctx.weight_size[:2])
        if asked_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _library.needs_grad(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return _forward_op(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as ``torch.nn.functional.linear``, by conv2d's kernel.

    Unlike torch's, whose sums change with the number of rows, it is batch-invariant: a row of
    the result is the same bits alone and among any others. A model whose convolutions,
    attention and linear layers are pyvit's treats an image alike in every batch.

    Args:
        x: ``[..., I]``; any leading shape. Where its rows have no common stride, or the
            features do not lie side by side, it is copied.
        weight: ``[O, I]``, of x's dtype, any strides.
        bias: ``[O]``, of x's dtype, or None.

    Returns:
        ``[..., O]``, contiguous.

    Dtypes: float32, float64, bfloat16, float16; products are summed in float32 (float64 for
    float64). Under autocast the arguments are cast as for ``F.linear``.

    Differentiable, twice, with respect to x, weight and bias; each gradient is computed only
    where it is wanted, and x is kept for backward only where weight's gradient is.

    Deterministic, and batch-invariant as said above; so is the gradient of x. The weight's
    gradient is a sum over all rows.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost: ``2·M·I·O`` floating-point operations for M rows, forward and for each of the
    gradients of x and weight; at most 2 MB of memory a thread beside the result.

    Example:
        >>> import torch, pyvit
        >>> pyvit.linear(torch.randn(2, 197, 192), torch.randn(576, 192)).shape
        torch.Size([2, 197, 576])
    """
    op = "linear"
    _checks.tensor(op, "x", x)
    _checks.tensor(op, "weight", weight, ndim=2)
    if bias is not None:
        _checks.tensor(op, "bias", bias, ndim=1)
    x, weight, bias = _library.autocast(x, weight, bias)
    _checks.like(op, "weight", weight, "x", x)
    _library.require_kernels(op, x)
    outputs, inputs = weight.shape
    if inputs < 1:
        wanted = "of at least one input feature (its second dimension)"
        _checks.fail(ValueError, op, "weight", wanted, _checks.shape_of(weight))
    if x.dim() == 0 or x.shape[-1] != inputs:
        wanted = f"of width {inputs} (weight's second dimension)"
        _checks.fail(ValueError, op, "x", wanted, _checks.shape_of(x))
    if bias is not None:
        _checks.like(op, "bias", bias, "x", x)
        _checks.shape(op, "bias", bias, (outputs,), " (one value an output)")
        bias = bias.contiguous()
    return _linear(x, weight, bias)
