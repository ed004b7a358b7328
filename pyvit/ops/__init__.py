"""The public functions: one file per op, each with its checks, its shape function and its
gradients. The kernels behind them are in csrc/ and kernels/."""

from pyvit.ops._backends import backend
from pyvit.ops.conv2d import conv2d
from pyvit.ops.linear import linear
from pyvit.ops.patch_embed import patch_embed
from pyvit.ops.projected_step import projected_step
from pyvit.ops.topk_attention import attention_with_penalty, topk_attention
from pyvit.ops.unfold import fold, unfold

__all__ = [
    "attention_with_penalty",
    "backend",
    "conv2d",
    "fold",
    "linear",
    "patch_embed",
    "projected_step",
    "topk_attention",
    "unfold",
]
