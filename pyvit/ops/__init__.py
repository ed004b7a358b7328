"""The public functions: one file per op, each with its checks, its shape function and its
gradients. The kernels behind them are in csrc/ and kernels/."""

from pyvit.ops.conv2d import conv2d
from pyvit.ops.patch_embed import patch_embed

__all__ = ["conv2d", "patch_embed"]
