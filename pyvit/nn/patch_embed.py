"""From images to tokens: timm's ``PatchEmbed``, with everything around it fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvit.nn.patch_conv2d import PatchConv2d
from pyvit.ops import _checks
from pyvit.ops.patch_embed import patch_embed

_NAME = "nn.PatchEmbed"


class PatchEmbed(nn.Module):
    """Normalise, cut into patches, project, add positions, prepend the class token: one kernel.

    State-dict keys are timm's: ``proj.weight`` ``[D, C, Ph, Pw]`` and ``proj.bias`` ``[D]``. The
    position and the class token belong to the model, which hands them to ``forward``.
    Hooks go on this layer: its ``proj`` holds the parameters and is not called.

    Args:
        img_size: pixels, an int or (height, width); None takes images of any size.
        patch_size: pixels, an int or (height, width).
        in_chans: C.
        embed_dim: D.
        bias: add a learned bias.
        mean, std: per-channel normalisation ``(image - mean) / std``, folded into the kernel;
            None leaves the image as it is. Buffers outside the state dict; a layer cast to half
            precision rounds them.

    Shapes: image ``[B, C, H, W]``, floating or uint8 (scaled by 1/255); result ``[B, N, D]``, or
    ``[B, N+1, D]`` with a class token; N = (H // Ph) · (W // Pw)
    (pixels beyond the last whole patch are ignored).
    Errors: ``TypeError`` or ``ValueError`` naming the layer and the argument.
    Cost: 2·B·N·C·Ph·Pw·D FLOPs; see :func:`pyvit.patch_embed`.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # timm's names for the same facts, which models around this layer read.
        self.patch_size = _checks.pair(_NAME, "patch_size", patch_size, minimum=1)
        _checks.integer(_NAME, "in_chans", in_chans, minimum=1)
        _checks.integer(_NAME, "embed_dim", embed_dim, minimum=1)
        self.set_input_size(img_size)
        self.proj = PatchConv2d(in_chans, embed_dim, patch_size, bias, device, dtype)
        for name, value in (("mean", mean), ("std", std)):
            table = _per_channel(name, value, in_chans, device, dtype)
            self.register_buffer(name, table, persistent=False)

    def set_input_size(self, img_size: int | tuple[int, int] | None) -> None:
        """Take images of another size (pixels) from now on; None takes any."""
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is None:
            return
        height, width = _checks.pair(_NAME, "img_size", img_size, minimum=1)
        grid = (height // self.patch_size[0], width // self.patch_size[1])
        if 0 in grid:
            wanted = f"at least as large as a patch, {self.patch_size}"
            _checks.fail(ValueError, _NAME, "img_size", wanted, (height, width))
        self.img_size, self.grid_size, self.num_patches = (height, width), grid, grid[0] * grid[1]

    def forward(
        self, image: Tensor, pos_embed: Tensor | None = None, cls_token: Tensor | None = None
    ) -> Tensor:
        """Tokens of ``image``; ``pos_embed`` ``[1, N(+1), D]`` and ``cls_token`` ``[1, 1, D]``."""
        _checks.tensor(_NAME, "image", image, ndim=4, dtypes=(*_checks.FLOATING, torch.uint8))
        if self.img_size is not None and tuple(image.shape[-2:]) != self.img_size:
            wanted = "of {} x {} pixels".format(*self.img_size)
            _checks.fail(ValueError, _NAME, "image", wanted, _checks.shape_of(image))
        return patch_embed(
            image,
            self.proj.weight,
            self.proj.bias,
            pos_embed=pos_embed,
            cls_token=cls_token,
            mean=self.mean,
            std=self.std,
        )

    def extra_repr(self) -> str:
        fused = "" if self.mean is None and self.std is None else ", normalises=True"
        return f"img_size={self.img_size}, patch_size={self.patch_size}{fused}"


def _per_channel(
    name: str,
    value: Sequence[float] | None,
    channels: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor | None:
    if value is None:
        return None
    if len(value) != channels:
        _checks.fail(ValueError, _NAME, name, f"one number per channel ({channels})", value)
    for number in value:
        _checks.number(_NAME, name, number, positive=name == "std")
    return torch.tensor(value, device=device, dtype=dtype)
