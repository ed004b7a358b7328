"""What the attention layers share: the call of the kernel, and what it cannot do."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyvit.ops import _checks
from pyvit.ops.topk_attention import topk_attention

BACKWARDS = ("selected", "dense")


def check_topk(layer: str, topk: int | None, backward: str) -> None:
    if topk is not None:
        _checks.integer(layer, "topk", topk, minimum=1)
    _checks.choice(layer, "backward", backward, BACKWARDS)


def attend(
    layer: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int | None,
    backward: str,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_argument: str = "attn_drop",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention of q ``[B, H, Nq, D]`` on k ``[B, H, Nk, D]`` and v ``[B, H, Nk, Dv]``.

    A mask and dropout of the weights are outside what the kernel computes. Dense attention
    then goes to PyTorch's ``scaled_dot_product_attention``, which means the same; top-k
    attention has no such equal, and says so.
    """
    if topk is None:
        if dropout > 0 or is_causal or attn_mask is not None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout, is_causal, scale=scale
            )
        return topk_attention(q, k, v, k.shape[-2], scale=scale, backward=backward)
    if attn_mask is not None:
        got = _checks.shape_of(attn_mask)
        _checks.fail(NotImplementedError, layer, "attn_mask", f"None with topk={topk}", got)
    if is_causal:
        _checks.fail(NotImplementedError, layer, "is_causal", f"False with topk={topk}", True)
    if dropout > 0:
        wanted = f"0 in training with topk={topk} (the kernel drops no weights)"
        _checks.fail(NotImplementedError, layer, dropout_argument, wanted, dropout)
    return topk_attention(q, k, v, topk, scale=scale, backward=backward)
