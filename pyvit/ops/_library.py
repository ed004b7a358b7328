"""The ``pyvit`` op library: what each op file shares in registering and calling its kernels."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyvit import _native

# Kept for the life of the process: dropping it would take the schemas away.
_LIBRARY = torch.library.Library("pyvit", "FRAGMENT")


def define(schema: str) -> None:
    """Declare ``pyvit::<schema>``, an op that torch.compile may trace."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def fake(name: str):
    """Decorator that registers the shape function of ``pyvit::<name>``."""
    return torch.library.register_fake(f"pyvit::{name}", lib=_LIBRARY)


TRITON_MINIMUM = (3, 6)

# What runs an op on CUDA tensors: a launcher of ``kernels/``, by the op's name.
triton_launchers: dict[str, Callable] = {}


def triton_kernels(module: str, *names: str) -> None:
    """Let ``kernels/<module>.py`` run ``pyvit::<name>`` for CUDA tensors.

    It is imported at the first call: importing pyvit needs neither Triton nor a GPU.
    """
    for name in names:
        triton_launchers[name] = functools.partial(_launch, module, name)
        _LIBRARY.impl(name, triton_launchers[name], "CUDA")


@functools.cache
def _launcher(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"pyvit.kernels.{module}"), name)


def _launch(module: str, name: str, value: Tensor, *arguments: Any) -> Any:
    """On the device of the first argument: Triton would take the current one."""
    launcher = _launcher(module, name)
    if value.is_cuda and value.device.index != torch.cuda.current_device():
        with torch.cuda.device(value.device):
            return launcher(value, *arguments)
    return launcher(value, *arguments)


def runs_on_gpu(value: Tensor) -> bool:
    """Whether the kernels that take ``value`` are a GPU's."""
    return value.is_cuda


@functools.cache
def triton_problem() -> str:
    """Why Triton kernels cannot run here; "" where they can."""
    wanted = f"pip install 'triton>={TRITON_MINIMUM[0]}.{TRITON_MINIMUM[1]}'"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {wanted}"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON_MINIMUM:
        return f"Triton {version} is too old: {wanted}"
    return ""


def is_channels_last(value: Tensor) -> bool:
    """As torch reads it: ambiguous sizes (one channel, one pixel) count as NCHW."""
    return not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _device_type(value: Tensor) -> str:
    return "cpu" if value.is_cpu else value.device.type  # a device makes its string anew


def require_kernels(op: str, value: Tensor) -> None:
    """Raise, naming the way out, where no kernel of ours can take ``value``'s device."""
    device = _device_type(value)
    if device == "cpu":
        if _native.loaded_isa is None:
            raise NotImplementedError(
                f"pyvit.{op}: the CPU kernels are not available ({_native.load_problem}); "
                "`python -m pyvit info` says more"
            )
    elif device == "cuda" and op in triton_launchers:
        if triton_problem():
            raise NotImplementedError(f"pyvit.{op}: no kernel for CUDA tensors; {triton_problem()}")
        if value.dtype is torch.float64:
            raise NotImplementedError(
                f"pyvit.{op}: float64 runs on the CPU alone; move the tensors there with .cpu()"
            )
    elif device != "meta":
        raise NotImplementedError(
            f"pyvit.{op}: no kernel for device '{device}' is built; move the tensors to the "
            "CPU with .cpu(); `python -m pyvit info` lists the kernels this installation has"
        )


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
    device = _device_type(tensors[0])
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
