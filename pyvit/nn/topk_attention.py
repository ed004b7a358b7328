"""Multi-head self-attention with timm's parameters, each query keeping its top-k keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.nn._attend import attend, check_topk
from pyvit.nn.linear import Linear
from pyvit.ops import _checks

_NAME = "nn.TopKAttention"


class TopKAttention(nn.Module):
    """Self-attention ``[B, N, dim] -> [B, N, dim]`` by :func:`pyvit.topk_attention`.

    State-dict keys are those of timm's ``Attention``: ``qkv``, ``q_norm``, ``k_norm``, ``proj``.
    q, k and v are slices of the packed projection; no copy is made of them.

    Args:
        dim: width of a token; a multiple of ``num_heads``.
        num_heads: H.
        qkv_bias: learned bias of the q, k, v projection.
        qk_norm: normalise each head's q and k with ``norm_layer(head_dim)``.
        proj_bias: learned bias of the output projection.
        attn_drop: dropout rate of the attention weights. The kernel drops none: in training,
            dense attention goes to PyTorch's own, and top-k attention raises
            ``NotImplementedError``.
        proj_drop: dropout rate after the output projection.
        norm_layer: makes the norm of q and of k; takes the head's width, ``device``, ``dtype``.
        topk: keys that each query keeps (ties go to the lowest index); None keeps all.
        backward: "selected" sends the gradient through the kept keys alone; "dense" lets the
            gradient of dense attention through, for honest attacks.

    An ``attn_mask`` or ``is_causal`` given to ``forward`` is honoured where topk is None (by
    PyTorch's own attention) and raises ``NotImplementedError`` where it is not.
    Cost: 8·B·N·dim² + 4·B·N²·dim FLOPs, the second term 2·B·N²·dim + 2·B·N·topk·dim with top-k.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        topk: int | None = None,
        backward: str = "selected",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.integer(_NAME, "dim", dim, minimum=1)
        _checks.integer(_NAME, "num_heads", num_heads, minimum=1)
        if dim % num_heads:
            _checks.fail(ValueError, _NAME, "num_heads", f"a divisor of dim ({dim})", num_heads)
        check_topk(_NAME, topk, backward)
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if _checks.number(_NAME, name, rate, minimum=0) > 1:
                _checks.fail(ValueError, _NAME, name, "at most 1", rate)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.topk = topk
        self.backward = backward
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.q_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        # The norm of the output and the gate that timm's newer Attention may own: never made
        # here, but a timm layer that replace_layers() turned into this class brings them along.
        self.norm: nn.Module | None = None
        self.gate: nn.Module | None = None
        self.proj = Linear(dim, dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _checks.tensor(_NAME, "x", x, ndim=3)
        if x.shape[-1] != self.qkv.in_features:
            wanted = f"of width {self.qkv.in_features}"
            _checks.fail(ValueError, _NAME, "x", wanted, _checks.shape_of(x))
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        # Unbound before the heads move: the gradients then meet in one stack, and in no copy.
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
        out = attend(
            _NAME,
            self.q_norm(q),
            self.k_norm(k),
            v,
            topk=self.topk,
            backward=self.backward,
            scale=self.scale,
            dropout=self.attn_drop.p if self.training else 0.0,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        out = out.transpose(1, 2).flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, topk={self.topk}, backward={self.backward!r}"
