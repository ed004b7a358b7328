"""Random points of a ball around the images, uniform in it."""

from __future__ import annotations

import torch
from torch import Tensor


def random_start(
    images: Tensor,
    norm: str,
    eps: float | Tensor,
    bounds: tuple[float, float],
    generator: torch.Generator | None,
) -> Tensor:
    """``images`` plus noise that is uniform in the ball of radius eps, clipped to the bounds.

    - linf: each pixel uniform in [-eps, eps]; with one eps for all images these are the numbers
      that torchattacks draws from the same seed.
    - l2: a normal direction, and the radius eps·u^(1/d) for d pixels: a plain eps·u would crowd
      the centre.
    - l1: d exponential variables over the sum of d + 1 of them, with random signs.
    """
    if norm == "linf" and not isinstance(eps, Tensor):
        noise = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
        return torch.clamp(images + noise, *bounds)
    if isinstance(eps, Tensor):
        eps = per_image(eps, images)
    if norm == "linf":
        noise = torch.empty_like(images).uniform_(-1, 1, generator=generator) * eps
    else:
        draw = _l2_noise if norm == "l2" else _l1_noise
        # A norm of many bfloat16 or float16 numbers needs more digits than theirs.
        wide = torch.promote_types(images.dtype, torch.float32)
        noise = draw(torch.empty_like(images, dtype=wide), generator) * eps
    return torch.clamp(images + noise.to(images.dtype), *bounds)


def per_image(value: Tensor, images: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]`` in the images' dtype."""
    return value.to(images.dtype).reshape(-1, *[1] * (images.dim() - 1))


def _pixels(noise: Tensor) -> tuple[int, ...]:
    return tuple(range(1, noise.dim()))


def _l2_noise(noise: Tensor, generator: torch.Generator | None) -> Tensor:
    noise.normal_(generator=generator)
    length = torch.linalg.vector_norm(noise, dim=_pixels(noise), keepdim=True)
    radius = torch.empty_like(length).uniform_(generator=generator)
    pixels = max(1, noise[:1].numel())
    return noise * (radius ** (1 / pixels) / length.clamp(min=torch.finfo(noise.dtype).tiny))


def _l1_noise(noise: Tensor, generator: torch.Generator | None) -> Tensor:
    noise.exponential_(generator=generator)
    total = noise.sum(_pixels(noise), keepdim=True)
    total = total + torch.empty_like(total).exponential_(generator=generator)
    sign = torch.empty_like(noise).uniform_(-1, 1, generator=generator).sign()
    return noise * sign / total
