"""Borrowing a model: whatever an attack does to it, it is given back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def borrowed(model: Callable[..., Tensor], *, evaluating: bool) -> Iterator[None]:
    """Freeze the parameters and, with ``evaluating``, put every module in eval mode.

    Frozen, because an autograd Function cannot see otherwise that only the image's gradient is
    wanted (pytorch#56500), and would compute the parameters' too. On the way out, also after an
    exception: each module's mode, each parameter's ``requires_grad``, and the buffers (batch
    norm's statistics, where a module stayed in train mode) are what they were. ``.grad`` is never
    touched. Modes are set module by module, not by ``model.train()``, which modules override and
    which would wake modules that were frozen singly.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    frozen = [
        p for module in modules for p in module.parameters(recurse=False)
        if p.requires_grad and p.is_leaf and not p.is_inference()  # such cannot be thawed here
    ]  # fmt: skip
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
        if not buffer.is_inference()  # nothing can write to those here
    ]
    try:
        for module in modules:
            if evaluating:
                module.training = False
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # Only what was written: a copy would invalidate graphs that the caller holds. The
                # version counter does not tell: batch norm writes its statistics past it.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def global_random_state(device: torch.device, *, kept: bool) -> Iterator[None]:
    """Give the global generators back as they were, where ``kept``."""
    if not kept:
        yield
        return
    on_device = [] if device.type in ("cpu", "meta") else [device]
    device_type = device.type if on_device else "cuda"
    with torch.random.fork_rng(devices=on_device, device_type=device_type):
        yield


def hooked(model: nn.Module) -> bool:
    """Whether calling the model runs functions that its modules do not know of."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)


def fingerprint(model: Callable[..., Tensor]) -> Hashable:
    """Its modules, their modes, and where its parameters and buffers lie; not their values."""
    if not isinstance(model, nn.Module):
        return id(model)
    tensors = (*model.parameters(), *model.buffers())
    return (
        tuple((id(module), module.training) for module in model.modules()),
        tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors),
    )
