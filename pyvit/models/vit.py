"""Vision Transformer (Dosovitskiy et al., 2020) on pyvit's kernels, with timm's state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.models.pos_embed import resize_pos_embed, sincos1d, sincos2d
from pyvit.nn import DropPath, Linear, PatchEmbed, TopKAttention
from pyvit.nn._attend import check_topk
from pyvit.ops import _checks

_NAME = "models.VisionTransformer"
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Mlp(nn.Module):
    """``fc2(GELU(fc1(x)))`` on ``[B, N, dim]``, GELU exact, dropout after both."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)); on tokens ``[B, N, dim]``.

    Args are those of :class:`VisionTransformer`, for one layer; ``drop_path`` is its rate.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        topk: int | None = None,
        backward: str = "selected",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = _LayerNorm(dim, **made)
        self.attn = TopKAttention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            topk=topk,
            backward=backward,
            **made,
        )
        self.norm2 = _LayerNorm(dim, **made)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **made)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Pre-norm vision transformer: image ``[B, C, H, W]`` to logits ``[B, num_classes]``.

    A timm ``VisionTransformer`` state dict of the same configuration loads with ``strict=True``
    and gives the same logits. Positions of another grid are interpolated while they load.

    Args:
        img_size: pixels, an int or (height, width), at least one patch.
        patch_size: pixels, an int or (height, width).
        in_chans: C.
        num_classes: 0 leaves the head out: the result is ``[B, embed_dim]``.
        global_pool: "token", the class token after the last norm; "avg", the mean of the patches'
            tokens, with the norm after it (``fc_norm``, as timm).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the transformer's sizes.
        class_token: prepend a learned token; without it global_pool is "avg".
        pos_embed: "learn", or a fixed table, "sincos1d" (the class token is position 0) or
            "sincos2d" (the class token's row is zero), kept as a buffer.
        proj_drop_rate: dropout after the attention's and the MLP's projections.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        topk: keys that each query keeps: an int, one for each block (a sequence with an int or
            None each), or None for dense attention.
        backward: "selected" or "dense"; see :class:`pyvit.nn.TopKAttention`.
        mean, std: per-channel normalisation of the image, fused into the patch embedding: the
            model then takes images in [0, 1], or uint8, and an attack works in pixel space.

    Errors: ``TypeError`` or ``ValueError`` naming the argument.
    """

    pos_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        pos_embed: str = "learn",
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        topk: int | Sequence[int | None] | None = None,
        backward: str = "selected",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.integer(_NAME, "num_classes", num_classes, minimum=0)
        _checks.integer(_NAME, "depth", depth, minimum=1)
        _checks.choice(_NAME, "global_pool", global_pool, ("token", "avg"))
        _checks.choice(_NAME, "pos_embed", pos_embed, ("learn", "sincos1d", "sincos2d"))
        if global_pool == "token" and not class_token:
            _checks.fail(ValueError, _NAME, "global_pool", "'avg' without a class token", "'token'")
        topks = _one_for_each(topk, depth)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_prefix_tokens = int(class_token)
        self.pos_embed_kind = pos_embed
        _check_size(img_size)
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, mean=mean, std=std, **made
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **made)) if class_token else None
        self._make_positions(**made)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    proj_drop_rate,
                    rate,
                    k,
                    backward,
                    **made,
                )
                for rate, k in zip(rates, topks, strict=True)
            )
        )
        pooled = global_pool == "avg"
        self.norm = nn.Identity() if pooled else _LayerNorm(embed_dim, **made)
        self.fc_norm = _LayerNorm(embed_dim, **made) if pooled else nn.Identity()
        self.head = Linear(embed_dim, num_classes, **made) if num_classes else nn.Identity()
        self._initialise()

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Tokens ``[B, N(+1), embed_dim]`` after the last block (and its norm, with "token")."""
        tokens = self.patch_embed(image, self.pos_embed, self.cls_token)
        return self.norm(self.blocks(tokens))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Pool the tokens and classify: ``[B, num_classes]``."""
        if self.global_pool == "token":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return self.head(self.fc_norm(pooled))

    @property
    def grid_size(self) -> tuple[int, int]:
        """The image in patches: (height, width)."""
        return cast("tuple[int, int]", self.patch_embed.grid_size)

    def set_topk(
        self, topk: int | Sequence[int | None] | None, backward: str | None = None
    ) -> None:
        """Change ``topk`` (and ``backward``, unless None) of every block; as the constructor's."""
        topks = _one_for_each(topk, len(self.blocks))
        for k in topks:
            check_topk(_NAME, k, backward or "selected")
        for layer, k in zip(self._attention_layers(), topks, strict=True):
            layer.topk = k
            if backward is not None:
                layer.backward = backward

    def _attention_layers(self) -> list[TopKAttention]:
        return [module for module in self.blocks.modules() if isinstance(module, TopKAttention)]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size (pixels): learned positions are interpolated.

        The parameter ``pos_embed`` becomes a new one: make the optimiser afterwards.
        """
        _check_size(img_size)
        old_grid = self.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed_kind != "learn":
            self._make_positions(self.pos_embed.device, self.pos_embed.dtype)
            return
        old = self.pos_embed
        new = resize_pos_embed(old.detach(), self.grid_size, old_grid, self.num_prefix_tokens)
        if new is not old:
            self.pos_embed = nn.Parameter(new.clone(), requires_grad=old.requires_grad)

    def _make_positions(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """``pos_embed`` ``[1, N(+1), D]``: an empty parameter, or the fixed table in a buffer."""
        prefix, grid = self.num_prefix_tokens, self.grid_size
        length = prefix + grid[0] * grid[1]
        if self.pos_embed_kind == "learn":
            empty = torch.empty(1, length, self.embed_dim, device=device, dtype=dtype)
            self.pos_embed = nn.Parameter(empty)
            return
        if self.pos_embed_kind == "sincos1d":
            table = sincos1d(length, self.embed_dim)
        else:
            table = F.pad(sincos2d(grid, self.embed_dim), (0, 0, prefix, 0))
        table = table.to(device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("pos_embed", table[None])

    @torch.no_grad()
    def _initialise(self) -> None:
        """timm's: truncated normal of deviation 0.02 for positions and linear layers, zero bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed_kind == "learn":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Fit positions of another grid (a square one) to this model's before they load."""
        key = prefix + "pos_embed"
        given = state_dict.get(key)
        if isinstance(given, Tensor) and given.dim() == 3 and given.shape != self.pos_embed.shape:
            if self.pos_embed_kind != "learn":
                state_dict[key] = self.pos_embed
            elif given.shape[-1] == self.embed_dim:
                prefix_tokens = self.num_prefix_tokens
                state_dict[key] = resize_pos_embed(given, self.grid_size, None, prefix_tokens)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_size(img_size: object) -> None:
    """PatchEmbed takes None, any size; positions need to know."""
    if img_size is None:
        _checks.fail(TypeError, _NAME, "img_size", "one int or two (height, width)", None)


def _one_for_each(topk: int | Sequence[int | None] | None, depth: int) -> Sequence[int | None]:
    if not isinstance(topk, Sequence):
        return [topk] * depth
    if len(topk) != depth:
        _checks.fail(ValueError, _NAME, "topk", f"one for each of {depth} blocks", topk)
    return topk


# The published sizes; the MLP is four times as wide as the tokens in all of them.
SIZES: Mapping[str, Mapping[str, int]] = {
    "vit_tiny_patch16_224": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "vit_small_patch16_224": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_base_patch16_224": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_large_patch16_224": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge_patch14_224": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}


def vit_tiny_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16, 5.7M parameters. Arguments override; see :class:`VisionTransformer`."""
    return VisionTransformer(**{**SIZES["vit_tiny_patch16_224"], **kwargs})


def vit_small_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-S/16, 22.1M parameters. Arguments override; see :class:`VisionTransformer`."""
    return VisionTransformer(**{**SIZES["vit_small_patch16_224"], **kwargs})


def vit_base_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-B/16, 86.6M parameters. Arguments override; see :class:`VisionTransformer`."""
    return VisionTransformer(**{**SIZES["vit_base_patch16_224"], **kwargs})


def vit_large_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-L/16, 304.3M parameters. Arguments override; see :class:`VisionTransformer`."""
    return VisionTransformer(**{**SIZES["vit_large_patch16_224"], **kwargs})


def vit_huge_patch14_224(**kwargs: Any) -> VisionTransformer:
    """ViT-H/14, 632M parameters, head dim 80. Arguments override."""
    return VisionTransformer(**{**SIZES["vit_huge_patch14_224"], **kwargs})
