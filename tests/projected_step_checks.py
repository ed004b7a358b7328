"""Arguments of projected_step, and the chain of PyTorch operators that L-infinity equals."""

from __future__ import annotations

import math

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = ("linf", "l2", "l1")
SHAPES = [(3, 3, 17, 19), (2, 3, 160, 140), (4, 33), (5,), (1, 2, 1, 3, 4), (2, 1, 1, 1)]


def tensors(shape, dtype=torch.float32):
    """(x, grad, x0, momentum): x near x0, some pixels of each at the bounds."""
    x0 = (torch.rand(shape) * 1.2 - 0.1).clamp(0, 1)
    x = (x0 + 0.02 * torch.randn(shape)).clamp(0, 1)
    grad = torch.randn(shape) * (torch.rand(shape) > 0.1)
    return tuple(t.to(dtype) for t in (x, grad, x0, torch.randn(shape)))


SMALL_SHAPES = [(3, 3, 17, 19), (4, 33), (5,)]  # for Triton's interpreter


def sizes(norm, shape):
    """A step and a radius at which some images leave the ball and others don't."""
    pixels = math.prod(shape[1:])
    eps = {"linf": 8 / 255, "l2": 0.02 * math.sqrt(pixels), "l1": 0.012 * pixels}[norm]
    return dict(norm=norm, step_size=eps / 4, eps=eps)


def eager_chain(x, grad, x0, step_size, eps, targeted):
    """torchattacks' lines, which pyvit promises bit for bit."""
    grad = -grad if targeted else grad
    adv = x + step_size * grad.sign()
    delta = torch.clamp(adv - x0, min=-eps, max=eps)
    return torch.clamp(x0 + delta, min=0, max=1)
