"""A linear layer, computed as the 1×1 convolution that it is; and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit.ops import _backends, _checks, _library

_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("linear_weight_grad(Tensor grad, Tensor x) -> Tensor")
_backends.gpu_kernels("linear", "linear", "linear_weight_grad", tf32="matmul")


@_library.fake("linear")
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_library.fake("linear_weight_grad")
def _(grad, x):
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


def _in_rows(x: Tensor) -> Tensor:
    """As the kernels take it: two dimensions with the features side by side, or contiguous."""
    in_rows = x.stride(1) == 1 if x.dim() == 2 else x.is_contiguous()
    # Not contiguous(): that leaves the strides of a tensor without elements as they are.
    return x if in_rows else x.clone(memory_format=torch.contiguous_format)


class _Linear(torch.autograd.Function):
    """Its derivatives are linear layers again: dx = dy · W and dW = dyᵀ · x."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return torch.ops.pyvit.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        asked_x, asked_weight, asked_bias = _library.asked_for(ctx)
        grad = _in_rows(grad)
        grad_x = grad_weight = grad_bias = None
        if asked_x:
            grad_x = _linear(grad, weight.t(), None)
        if asked_weight:
            grad_weight = _weight_grad(grad, x)
        if asked_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x):
        wants_grad, wants_x = ctx.needs_input_grad
        ctx.save_for_backward(grad if wants_x else None, x if wants_grad else None)
        return torch.ops.pyvit.linear_weight_grad(grad, x)

    @staticmethod
    def backward(ctx, grad_of_result):
        grad, x = ctx.saved_tensors
        asked_grad, asked_x = _library.asked_for(ctx)
        return (
            _linear(x, grad_of_result, None) if asked_grad else None,
            _linear(grad, grad_of_result.t(), None) if asked_x else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _library.needs_grad(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return torch.ops.pyvit.linear(x, weight, bias)


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    if _library.needs_grad(grad, x):
        return _WeightGrad.apply(grad, x)
    return torch.ops.pyvit.linear_weight_grad(grad, x)


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
    _backends.require_kernels(op, x)
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
    return _linear(_in_rows(x), weight, bias)
