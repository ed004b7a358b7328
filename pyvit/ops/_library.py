"""The ``pyvit`` op library: what each op file shares in declaring its ops and their gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Kept for the life of the process: dropping it would take the schemas away.
LIBRARY = torch.library.Library("pyvit", "FRAGMENT")


schemas: list[str] = []


def define(schema: str) -> None:
    """Declare ``pyvit::<schema>``, an op that torch.compile may trace."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    schemas.append(schema)


def fake(name: str):
    """Decorator that registers the shape function of ``pyvit::<name>``."""
    return torch.library.register_fake(f"pyvit::{name}", lib=LIBRARY)


def is_channels_last(value: Tensor) -> bool:
    """As torch reads it: ambiguous sizes (one channel, one pixel) count as NCHW."""
    return not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def device_type(value: Tensor) -> str:
    return "cpu" if value.is_cpu else value.device.type  # a device makes its string anew


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd Function.

    Also wherever forward-mode derivatives are being taken: the Function refuses them, while the
    bare op would let them pass as zeros.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def asked_for(ctx) -> tuple[bool, ...]:
    """In a backward: for each argument, whether the present pass will use its gradient.

    ``needs_input_grad`` is True for every parameter that requires grad, although
    ``torch.autograd.grad(loss, image)`` drops what it gets for them (pytorch#56500): the attack
    loops of other libraries would pay for weight gradients that no one reads.
    """
    if sum(ctx.needs_input_grad) == 1 or torch.compiler.is_compiling():
        return ctx.needs_input_grad  # a single one is the reason for this call
    # Tensors alone have a place among the next functions, a node those that need a gradient.
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    asked = list(ctx.needs_input_grad)
    used = False
    for place in reversed(range(len(asked))):
        if asked[place]:
            node = nodes.pop()
            # Where no other is used, the first one is the reason for this call. It is the image,
            # a leaf in attacks, for which the answer would come as an exception and take long.
            asked[place] = _will_run(node) if nodes or used else True
            used |= asked[place]
    return tuple(asked)


def _will_run(node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # it refuses to say for a leaf that was asked for
        return True


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, grad):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            f"pyvit.{ctx.op}: second derivatives are not offered; its gradients can be used, not "
            "differentiated (pyvit.conv2d, unfold and fold are twice differentiable)"
        )


def once_differentiable(op: str):
    """Decorator for the backward of an autograd Function that is differentiable once.

    torch's own of this name says nothing where the incoming gradient needs no gradient, as under
    ``f(x).sum().backward(create_graph=True)``: the second-order term is then silently missing.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def once(ctx, *grads):
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            return tuple(
                _NoSecondDerivative.apply(op, r.detach().requires_grad_())
                if isinstance(r, Tensor)
                else r
                for r in results
            )

        return once

    return decorate


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast floating tensors as ``F.conv2d`` and SDPA do where autocast is on; else unchanged."""
    device = device_type(tensors[0])
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        # float64 is left alone, as torch's own autocast leaves it.
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
