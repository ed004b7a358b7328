"""A convolution whose patches do not overlap, computed as a patch embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit.ops import _checks
from pyvit.ops.patch_embed import patch_embed

_NAME = "nn.PatchConv2d"


class PatchConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with stride = kernel size and no padding, by :func:`pyvit.patch_embed`.

    The projection inside every patch embedding (timm's ``PatchEmbed.proj``, torchvision's
    ``conv_proj``, Hugging Face's ``projection``). Parameters and keys are a Conv2d's.

    Shapes: image ``[B, C, H, W]`` or ``[C, H, W]``; output ``[B, D, H // Ph, W // Pw]``: a view
    of the kernel's tokens ``[B, N, D]``, channels last in memory, so that the ``flatten(2)
    .transpose(1, 2)`` which follows in those models makes no copy. Rows and columns of pixels
    beyond the last whole patch are ignored, as a convolution ignores them.
    Cost: 2·B·N·C·Ph·Pw·D FLOPs. Once differentiable, unlike :class:`pyvit.nn.Conv2d`.

    Args:
        in_channels: C.
        out_channels: D.
        patch_size: pixels, an int or (height, width).
        bias: add a learned bias ``[D]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int | tuple[int, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer(_NAME, "in_channels", in_channels, minimum=1)
        _checks.integer(_NAME, "out_channels", out_channels, minimum=1)
        _checks.pair(_NAME, "patch_size", patch_size, minimum=1)
        super().__init__(
            in_channels,
            out_channels,
            patch_size,
            stride=patch_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() == 3:
            return self._conv_forward(input[None], weight, bias)[0]
        _checks.tensor(_NAME, "input", input, ndim=(3, 4))
        tokens = patch_embed(input, weight, bias)
        grid = (input.shape[2] // self.stride[0], input.shape[3] // self.stride[1])
        return tokens.transpose(1, 2).unflatten(2, grid)
