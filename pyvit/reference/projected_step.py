"""One step of a projected-gradient attack as a chain of PyTorch operators, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def projected_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: float | Tensor,
    eps: float | Tensor,
    bounds: tuple[float, float] = (0.0, 1.0),
    targeted: bool = False,
    momentum: Tensor | None = None,
    decay: float = 1.0,
    step: str = "sign",
    quantile: float = 0.99,
) -> Tensor | tuple[Tensor, Tensor]:
    """What ``pyvit.projected_step`` computes, in the dtype of its arguments."""
    direction = grad
    if momentum is not None:
        direction = momentum_update(grad, momentum, decay)
    steps: dict[str, Callable[..., Tensor]] = {"linf": linf_step, "l2": l2_step, "l1": l1_step}
    images = []
    for i in range(len(x)):
        alpha = float(step_size[i]) if isinstance(step_size, Tensor) else step_size
        radius = float(eps[i]) if isinstance(eps, Tensor) else eps
        ascent = -direction[i] if targeted else direction[i]
        extra = (quantile,) if norm == "l1" else ()
        images.append(
            steps[norm](x[i], ascent, x0[i], alpha, radius, bounds, step == "raw", *extra)
        )
    y = torch.stack(images) if images else x.clone()
    return y if momentum is None else (y, direction)


def momentum_update(grad: Tensor, momentum: Tensor, decay: float) -> Tensor:
    """decay·v + grad / mean|grad|, an all-zero gradient adding nothing."""
    within_image = tuple(range(1, grad.dim()))
    mean = grad.abs().mean(within_image, keepdim=True) if within_image else grad.abs()
    return grad / torch.where(mean == 0, torch.ones_like(mean), mean) + momentum * decay


def linf_step(x, ascent, x0, alpha, eps, bounds, raw):
    adv = x + alpha * (ascent if raw else ascent.sign())
    if eps == math.inf:
        return torch.clamp(adv, *bounds)
    delta = torch.clamp(adv - x0, min=-eps, max=eps)
    return torch.clamp(x0 + delta, *bounds)


def l2_step(x, ascent, x0, alpha, eps, bounds, raw):
    norm = ascent.norm()
    unit = ascent if raw or norm == 0 else ascent / norm
    adv = x + alpha * unit
    if eps == math.inf:
        return torch.clamp(adv, *bounds)
    delta = adv - x0
    length = delta.norm()
    if not length <= eps:
        delta = delta * (eps / length)
    return torch.clamp(x0 + delta, *bounds)


def l1_step(x, ascent, x0, alpha, eps, bounds, raw, quantile):
    lo, hi = bounds
    if raw:
        step = alpha * ascent
    else:
        blocked = ((ascent > 0) & (x >= hi)) | ((ascent < 0) & (x <= lo))
        score = torch.where(blocked, torch.zeros_like(ascent), ascent.abs()).flatten()
        wanted = max(1, math.floor((1 - quantile) * score.numel() + 0.5))
        chosen = score.argsort(descending=True, stable=True)[:wanted]
        chosen = chosen[score[chosen] > 0]
        step = torch.zeros_like(score)
        step[chosen] = ascent.flatten()[chosen].sign() * alpha / max(1, len(chosen))
        step = step.reshape(x.shape)
    w = x + step - x0
    if eps == math.inf:
        return torch.clamp(x0 + w, lo, hi)
    room = torch.where(w > 0, hi - x0, x0 - lo)
    threshold = l1_threshold(w.abs().flatten().double(), room.flatten().double(), eps)
    delta = w.sign() * torch.clamp(w.abs() - threshold, min=0)
    return torch.clamp(x0 + delta, lo, hi)


def l1_threshold(size: Tensor, room: Tensor, eps: float) -> float:
    """The λ >= 0 at which Σ min(max(size - λ, 0), room) falls to eps, from its sorted kinks."""

    def total(threshold):
        return torch.minimum((size - threshold).clamp(min=0), room).sum()

    if total(0.0) <= eps:
        return 0.0
    kinks = torch.cat([size, size - room, size.new_zeros(1)]).clamp(min=0).unique()
    low, high = 0, len(kinks) - 1  # total(kinks[low]) > eps >= total(kinks[high])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(kinks[middle]) > eps else (low, middle)
    above, below = total(kinks[low]), total(kinks[high])
    share = (above - eps) / (above - below)  # linear between neighbouring kinks
    return float(kinks[low] + share * (kinks[high] - kinks[low]))
