"""Vision models on pyvit's layers."""

from pyvit.models.pos_embed import resize_pos_embed, sincos1d, sincos2d
from pyvit.models.vit import (
    SIZES,
    VisionTransformer,
    vit_base_patch16_224,
    vit_huge_patch14_224,
    vit_large_patch16_224,
    vit_small_patch16_224,
    vit_tiny_patch16_224,
)

__all__ = [
    "SIZES",
    "VisionTransformer",
    "resize_pos_embed",
    "sincos1d",
    "sincos2d",
    "vit_base_patch16_224",
    "vit_huge_patch14_224",
    "vit_large_patch16_224",
    "vit_small_patch16_224",
    "vit_tiny_patch16_224",
]
