"""Patch embedding as the chain of operations that models spell out, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    stride: int | tuple[int, int] | None = None,
) -> Tensor:
    """Scale, normalise, convolve, flatten, transpose, concatenate, add: each its own tensor."""
    if image.dtype == torch.uint8:
        image = image.to(weight.dtype) / 255
    if mean is not None:
        image = image - mean.reshape(-1, 1, 1).to(weight.dtype)
    if std is not None:
        image = image / std.reshape(-1, 1, 1).to(weight.dtype)
    step = weight.shape[2:] if stride is None else stride
    tokens = F.conv2d(image, weight, bias, step).flatten(2).transpose(1, 2)
    if cls_token is not None:
        tokens = torch.cat([cls_token.reshape(1, 1, -1).expand(len(tokens), -1, -1), tokens], 1)
    return tokens if pos_embed is None else tokens + pos_embed
