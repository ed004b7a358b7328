"""A model that takes images in [0, 1] from one that takes normalised images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvit.ops import _checks


class Normalized(nn.Module):
    """``model((x - mean) / std)``; see ``normalized``."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        # Not in the state dict: its keys are then the model's own, behind "model.".
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        channels = self.mean.shape[1]
        if x.dim() != 4 or channels not in (1, x.shape[1]):
            wanted = f"of shape [B, {channels}, H, W] (mean and std have {channels} values)"
            _checks.fail(ValueError, "attacks.normalized", "x", wanted, _checks.shape_of(x))
        return self.model((x - self.mean.to(x.dtype)) / self.std.to(x.dtype))


def normalized(
    model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Normalized:
    """A model for images in [0, 1], from ``model``, which wants ``(image - mean) / std``.

    Attacks measure eps in image units; this puts the normalisation inside the model, where the
    gradient goes through it. ``model`` is wrapped, not copied.

    Args:
        model: takes ``[B, C, H, W]``.
        mean, std: one value a channel, ``[C]``, or one for all; in image units; std above 0.

    Example:
        >>> import torch, pyvit.attacks
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
        >>> model = pyvit.attacks.normalized(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        >>> model(torch.rand(2, 3, 4, 4)).shape
        torch.Size([2, 10])
    """
    op = "attacks.normalized"
    if not isinstance(model, nn.Module):
        _checks.fail(TypeError, op, "model", "a torch.nn.Module", type(model).__name__)
    device = next((p.device for p in model.parameters()), None)
    channels = []
    for name, value in (("mean", mean), ("std", std)):
        try:
            tensor = torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone()
        except (TypeError, ValueError, RuntimeError):
            _checks.fail(TypeError, op, name, "one number a channel", repr(value))
        if tensor.dim() != 1 or not bool(torch.isfinite(tensor).all()):
            _checks.fail(ValueError, op, name, "one finite number a channel", repr(value))
        channels.append(tensor)
    if channels[0].shape != channels[1].shape:
        wanted = f"of mean's {channels[0].numel()} values"
        _checks.fail(ValueError, op, "std", wanted, channels[1].numel())
    if not bool((channels[1] > 0).all()):
        _checks.fail(ValueError, op, "std", "above 0", repr(std))
    mean, std = (c.reshape(1, -1, 1, 1) for c in channels)
    return Normalized(model, mean, std)
