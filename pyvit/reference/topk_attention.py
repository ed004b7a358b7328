"""Exact top-k attention, and dense attention with its penalty terms, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """``[B, H, Nq, Nk]`` in float32 (float64 for float64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale


def select(s: Tensor, topk: int) -> Tensor:
    """The topk largest of each row, as a mask; equal scores in the order of their index."""
    order = s.argsort(dim=-1, descending=True, stable=True)[..., :topk]
    return torch.zeros_like(s, dtype=torch.bool).scatter_(-1, order, True)


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    scale: float | None = None,
    selection: Tensor | None = None,
) -> Tensor:
    """Softmax over the selected scores alone. ``selection`` overrides the choice: a mask."""
    s = scores(q, k, scale)
    if selection is None:
        selection = select(s.detach(), topk)
    w = s.masked_fill(~selection, -math.inf).softmax(-1)
    # A key outside the selection takes no part, whatever its value: 0 · NaN would.
    if v.isnan().any():
        return _gathered(w, selection, v).to(q.dtype)
    return (w @ v.to(w.dtype)).to(q.dtype)


def _gathered(w: Tensor, selection: Tensor, v: Tensor) -> Tensor:
    products = w.unsqueeze(-1) * v.to(w.dtype).unsqueeze(-3)
    return torch.where(selection.unsqueeze(-1), products, 0.0).sum(-2)


def attention_with_penalty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    scale: float | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention; the sum of squared weights outside the selection; the Hoyer sparsity."""
    s = scores(q, k, scale)
    if selection is None:
        selection = select(s.detach(), topk)
    w = s.softmax(-1)
    tail_energy = w.square().masked_fill(selection, 0.0).sum(-1)
    keys = k.shape[-2]
    if keys == 1:
        hoyer = 1.0 + 0.0 * tail_energy
    else:
        root = math.sqrt(keys)
        hoyer = (root - 1 / w.square().sum(-1).sqrt()) / (root - 1)
    return (w @ v.to(w.dtype)).to(q.dtype), tail_energy, hoyer
