"""``torch.nn.MultiheadAttention`` with top-k attention inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit.nn._attend import attend, check_topk
from pyvit.ops import _checks
from pyvit.ops.linear import linear

_NAME = "nn.TopKMultiheadAttention"

# In eval mode nn.TransformerEncoderLayer takes the weights out of its attention layer and
# computes dense attention by itself, unless the layer's `_qkv_same_embed_dim` is this.
HIDDEN_FROM_FAST_PATH = False


class TopKMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` by :func:`pyvit.topk_attention`.

    Parameters, keys and initialisation are torch's. Called as torch's: query ``[B, Nq, dim]``,
    key and value ``[B, Nk, dim]`` where ``batch_first``, else ``[N, B, dim]``; or unbatched
    ``[N, dim]``. Returns ``(output, None)``: the weights are never in memory, so
    ``need_weights=True`` (torch's default) raises ``NotImplementedError``, as do key padding
    masks, nested tensors and, with top-k, ``attn_mask`` and dropout in training. Dense attention
    with a mask or dropout goes to PyTorch's own kernel.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first: as torch's. Its ``add_bias_kv``,
            ``add_zero_attn``, ``kdim`` and ``vdim`` are not offered.
        topk: keys that each query keeps (ties go to the lowest index); None keeps all.
        backward: "selected" or "dense", as :class:`pyvit.nn.TopKAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        topk: int | None = None,
        backward: str = "selected",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer(_NAME, "embed_dim", embed_dim, minimum=1)
        _checks.integer(_NAME, "num_heads", num_heads, minimum=1)
        if embed_dim % num_heads:
            wanted = f"a divisor of embed_dim ({embed_dim})"
            _checks.fail(ValueError, _NAME, "num_heads", wanted, num_heads)
        check_topk(_NAME, topk, backward)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.topk = topk
        self.backward = backward
        self._qkv_same_embed_dim = HIDDEN_FROM_FAST_PATH

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        self._check_call(query, key_padding_mask, need_weights)
        out = attend(
            _NAME,
            *self._project(query, key, value),
            topk=self.topk,
            backward=self.backward,
            dropout=self.dropout if self.training else 0.0,
            dropout_argument="dropout",
            attn_mask=self._sdpa_mask(attn_mask),
            # torch's is_causal is a hint about attn_mask, which is there and is applied.
            is_causal=is_causal and attn_mask is None,
        )
        out = linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if query.dim() == 2:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _check_call(
        self, query: Tensor, key_padding_mask: Tensor | None, need_weights: bool
    ) -> None:
        if need_weights:
            wanted = "False: the attention weights are never in memory"
            _checks.fail(NotImplementedError, _NAME, "need_weights", wanted, True)
        if key_padding_mask is not None:
            got = _checks.shape_of(key_padding_mask)
            _checks.fail(NotImplementedError, _NAME, "key_padding_mask", "None", got)
        if query.is_nested:
            _checks.fail(NotImplementedError, _NAME, "query", "a dense tensor", "a nested one")
        _checks.tensor(_NAME, "query", query, ndim=(2, 3))
        if query.shape[-1] != self.embed_dim:
            wanted = f"of width {self.embed_dim}"
            _checks.fail(ValueError, _NAME, "query", wanted, _checks.shape_of(query))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v as ``[B, H, N, D]``; slices of one projection where the inputs are one."""
        if query is key and key is value:
            packed = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            packed = tuple(map(linear, (query, key, value), weights, biases))
        return tuple(self._heads(x) for x in packed)

    def _heads(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _sdpa_mask(self, mask: Tensor | None) -> Tensor | None:
        """torch's mask as scaled_dot_product_attention wants it: True keeps, ``[B, H, N, N]``."""
        if mask is None:
            return None
        if mask.dtype is torch.bool:
            mask = ~mask
        return mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, topk={self.topk}, backward={self.backward!r}"
