"""Position embeddings: the fixed tables, and the way from one image size to another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.ops import _checks

_BASE = 10000.0


def sincos1d(length: int, dim: int) -> Tensor:
    """Table ``[length, dim]``, float64: column 2k is sin(ω_k t), 2k+1 is cos(ω_k t).

    ω_k = 10000^(-2k / dim), t the row. ``dim`` is even. Source: Vaswani et al., 2017.
    """
    if dim % 2:
        _checks.fail(ValueError, "models.sincos1d", "dim", "a multiple of 2", dim)
    phase = _phases(torch.arange(length, dtype=torch.float64), dim // 2)
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(1)


def sincos2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Table ``[height · width, dim]``, float64, rows in raster order.

    Four blocks of dim / 4 columns: sin and cos of the column's phases, then of the row's, as in
    MAE (He et al., 2021), whose checkpoints it therefore fits. ``dim`` is a multiple of 4.
    """
    if dim % 4:
        _checks.fail(ValueError, "models.sincos2d", "dim", "a multiple of 4", dim)
    height, width = grid
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    x, y = _phases(column.flatten(), dim // 4), _phases(row.flatten(), dim // 4)
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)


def _phases(position: Tensor, count: int) -> Tensor:
    frequency = _BASE ** (-torch.arange(count, dtype=torch.float64) / count)
    return position[:, None] * frequency


def resize_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Learned positions for another grid of patches: antialiased bicubic interpolation.

    Args:
        pos_embed: ``[1, num_prefix_tokens + h·w, D]``, any floating dtype (computed in float32
            at least).
        new_grid: (height, width) in patches.
        old_grid: (h, w) in patches; None for a square grid.
        num_prefix_tokens: rows in front that belong to no patch and are kept.

    Returns:
        ``[1, num_prefix_tokens + height·width, D]``, ``pos_embed`` itself where nothing changes.
    """
    name = "models.resize_pos_embed"
    _checks.tensor(name, "pos_embed", pos_embed, ndim=3)
    count = pos_embed.shape[1] - num_prefix_tokens
    if old_grid is None:
        old_grid = (math.isqrt(max(count, 0)),) * 2
    if count < 1 or old_grid[0] * old_grid[1] != count:
        wanted = f"a grid of {count} patches (a non-square one has to be given)"
        _checks.fail(ValueError, name, "old_grid", wanted, old_grid)
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = patches.unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2)
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", antialias=True)
    return torch.cat((prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)), dim=1)
