"""Layers on pyvit's kernels, and their way into models that others built."""

from pyvit.nn.conv2d import Conv2d
from pyvit.nn.drop_path import DropPath
from pyvit.nn.linear import Linear
from pyvit.nn.multihead_attention import TopKMultiheadAttention
from pyvit.nn.patch_conv2d import PatchConv2d
from pyvit.nn.patch_embed import PatchEmbed
from pyvit.nn.replace import Report, replace_layers, restore_layers
from pyvit.nn.topk_attention import TopKAttention

__all__ = [
    "Conv2d",
    "DropPath",
    "Linear",
    "PatchConv2d",
    "PatchEmbed",
    "Report",
    "TopKAttention",
    "TopKMultiheadAttention",
    "replace_layers",
    "restore_layers",
]
