"""From images to tokens: normalise, cut into patches, project, add positions, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import pyvit.ops.conv2d  # noqa: F401  (overlapping patches use its input gradient)
from pyvit.ops import _backends, _checks, _library

_library.define(
    "patch_embed(Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor? cls_token, Tensor? mean, Tensor? std, int[] stride) -> Tensor"
)
_library.define(
    "patch_embed_image_grad(Tensor grad, Tensor weight, Tensor? std, int[] image_size, "
    "int[] stride, bool channels_last) -> Tensor"
)
_library.define(
    "patch_embed_weight_grad(Tensor grad, Tensor image, Tensor? mean, Tensor? std, "
    "int[] weight_size, int[] stride, bool channels_last) -> Tensor"
)
_backends.gpu_kernels(
    "patch_embed",
    "patch_embed",
    "patch_embed_image_grad",
    "patch_embed_weight_grad",
    tf32="conv",
)


def _grid(image_size, weight_size, stride) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = (
        (image_size[2 + axis] - weight_size[2 + axis]) // stride[axis] + 1 for axis in range(2)
    )
    return height, width


@_library.fake("patch_embed")
def _(image, weight, bias, pos_embed, cls_token, mean, std, stride):
    rows, columns = _grid(image.shape, weight.shape, stride)
    tokens = rows * columns + int(cls_token is not None)
    return weight.new_empty((image.shape[0], tokens, weight.shape[0]))


@_library.fake("patch_embed_image_grad")
def _(grad, weight, std, image_size, stride, channels_last):
    return torch.empty(
        image_size,
        dtype=grad.dtype,
        device=grad.device,
        memory_format=_library.memory_format(channels_last),
    )


@_library.fake("patch_embed_weight_grad")
def _(grad, image, mean, std, weight_size, stride, channels_last):
    return torch.empty(
        weight_size,
        dtype=grad.dtype,
        device=grad.device,
        memory_format=_library.memory_format(channels_last),
    )


def _image_grad(grad, weight, std, image_size, stride, channels_last):
    rows, columns = _grid(image_size, weight.shape, stride)
    if stride[0] >= weight.shape[2] and stride[1] >= weight.shape[3]:
        return torch.ops.pyvit.patch_embed_image_grad(
            grad, weight, std, image_size, stride, channels_last
        )
    # Patches that overlap: tokens [B, N, D] are an image [B, D, rows, columns], channels last,
    # and a pixel gathers what every patch around it sends.
    patches = grad[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    image_grad = torch.ops.pyvit.conv2d_input_grad(
        patches, weight, image_size, stride, (0, 0, 0, 0), (1, 1), 1, channels_last
    )
    return image_grad if std is None else image_grad.div_(std.reshape(-1, 1, 1))


# The gradients of mean and std need no image gradient. A shift of a whole channel moves each
# feature by the sum of its weights; and Σ_patches dpatch·patch = Σ_features weight·dweight.


def _mean_grad(patch_grad, weight, mean, std):
    of_features = patch_grad.sum((0, 1), dtype=torch.float64)
    shift = of_features @ weight.sum((2, 3), dtype=torch.float64)
    return (-shift if std is None else -shift / std).to(mean.dtype)


def _std_grad(weight_grad, weight, std):
    products = weight_grad.double() * weight.double()
    return (-products.sum((0, 2, 3)) / std).to(std.dtype)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, weight, bias, pos_embed, cls_token, mean, std, stride):
        wants_image, wants_weight, *_, wants_mean, wants_std, _ = ctx.needs_input_grad
        wants_products = wants_weight or wants_std  # weight's gradient is a part of std's
        ctx.save_for_backward(
            image if wants_products else None,
            weight if wants_image or wants_mean or wants_std else None,
            mean if wants_products or wants_mean else None,
            std if wants_products or wants_mean or wants_image else None,
        )
        ctx.stride, ctx.has_class, ctx.dtype = stride, cls_token is not None, weight.dtype
        ctx.image_size, ctx.weight_size = tuple(image.shape), tuple(weight.shape)
        ctx.image_last = _library.is_channels_last(image)
        ctx.weight_last = _library.is_channels_last(weight)
        return torch.ops.pyvit.patch_embed(
            image, weight, bias, pos_embed, cls_token, mean, std, stride
        )

    @staticmethod
    @_library.once_differentiable("patch_embed")
    def backward(ctx, grad):
        image, weight, mean, std = ctx.saved_tensors
        wants_image, wants_weight, wants_bias, wants_pos, wants_class, wants_mean, wants_std, _ = (
            _library.asked_for(ctx)
        )
        patch_grad = grad[:, int(ctx.has_class) :]
        image_grad = weight_grad = bias_grad = pos_grad = class_grad = None
        mean_grad = std_grad = None
        if wants_image:
            image_grad = _image_grad(grad, weight, std, ctx.image_size, ctx.stride, ctx.image_last)
        if wants_mean:
            mean_grad = _mean_grad(patch_grad, weight, mean, std)
        if wants_bias or wants_pos:
            # One pass over the tokens' gradient serves both; a half would round the sums twice.
            wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
            of_tokens = grad.sum(0, dtype=wide)
            if wants_bias:
                bias_grad = of_tokens[int(ctx.has_class) :].sum(0).to(ctx.dtype)
            if wants_pos:
                pos_grad = of_tokens.to(ctx.dtype)
        if wants_class:
            class_grad = grad[:, 0].sum(0)
        if wants_weight or wants_std:
            if wants_std:  # a sum of rounded products would keep little of a half's precision
                grad = grad.to(std.dtype)
                image = image if image.dtype == torch.uint8 else image.to(std.dtype)
            weight_grad = torch.ops.pyvit.patch_embed_weight_grad(
                grad, image, mean, std, ctx.weight_size, ctx.stride, ctx.weight_last
            )
        if wants_std:
            std_grad = _std_grad(weight_grad, weight, std)
        return (
            image_grad,
            weight_grad.to(ctx.dtype) if wants_weight else None,
            bias_grad,
            pos_grad,
            class_grad,
            mean_grad,
            std_grad,
            None,
        )


def _channel_values(
    argument: str, value: object, channels: int, weight: Tensor, *, positive: bool = False
) -> Tensor | None:
    """mean or std as a tensor [C] of the type that pixels are computed in."""
    if value is None:
        return None
    op = "patch_embed"
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        _checks.tensor(op, argument, value, ndim=1)
        _checks.shape(op, argument, value, (channels,), " (one value a channel)")
        if value.device != weight.device:
            wanted = f"on `weight`'s device {weight.device}"
            _checks.fail(ValueError, op, argument, wanted, value.device)
        return value.to(dtype).contiguous()
    if not isinstance(value, Sequence) or isinstance(value, str):
        wanted = "a sequence of numbers or a tensor [C]"
        _checks.fail(TypeError, op, argument, wanted, type(value).__name__)
    if len(value) != channels:
        wanted = f"of {channels} values (one a channel)"
        _checks.fail(ValueError, op, argument, wanted, f"{len(value)} values")
    numbers = [_checks.number(op, argument, one, positive=positive) for one in value]
    return torch.tensor(numbers, dtype=dtype, device=weight.device)


def _row(argument: str, value: Tensor | None, weight: Tensor):
    """bias or cls_token as a contiguous [D]."""
    if value is None:
        return None
    _checks.like("patch_embed", argument, value, "weight", weight)
    dim = weight.shape[0]
    _checks.shape(
        "patch_embed", argument, value, (1,) * (value.dim() - 1) + (dim,), " (one value a feature)"
    )
    return value.reshape(dim).contiguous()


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    stride: int | tuple[int, int] | None = None,
) -> Tensor:
    """Tokens of images, as a vision transformer takes them, in one pass over the image.

    Computes ``F.conv2d((image - mean) / std, weight, bias, stride)``, flattened to
    ``[B, N, D]``, with ``cls_token`` prepended and ``pos_embed`` added, without any of the
    intermediate tensors: patches are normalised while a matrix product packs them, and its
    epilogue adds bias and position.

    Args:
        image: ``[B, C, H, W]``, NCHW or ``channels_last`` (any strides are right, those two are
            fast), of weight's dtype; or uint8, which is scaled by 1/255 first.
        weight: ``[D, C, Ph, Pw]``, as a ``Conv2d``'s.
        bias: ``[D]``, or None.
        pos_embed: ``[N, D]`` or ``[1, N, D]``, with N + 1 rows exactly when ``cls_token`` is
            given (the first is the class token's), or None.
        cls_token: ``[D]`` or ``[1, 1, D]``, or None.
        mean, std: one value a channel, in the image's units (after the scaling of uint8); a
            sequence of floats, or a tensor ``[C]`` of any floating dtype. None: 0 and 1. The
            values of a tensor are not checked: a zero in ``std`` gives infinities.
        stride: distance between patches in pixels, an int or (vertical, horizontal); the
            patch's size by default. Smaller ones overlap. Pixels beyond the last whole patch
            are ignored.

    Returns:
        ``[B, N, D]``, or ``[B, N + 1, D]`` with a class token, of weight's dtype, contiguous;
        ``N = ((H - Ph) // stride + 1) · ((W - Pw) // stride + 1)``, row by row.

    Dtypes: float32, float64, bfloat16, float16; pixels are normalised and products summed in
    float32 (float64 for float64). Under autocast, all but a uint8 image, mean and std are cast as
    for ``F.conv2d``.

    Differentiable once with respect to every tensor argument (a uint8 image has no gradient).
    Each gradient is computed only where it is wanted; the image is kept for backward only for
    weight's and std's. Pixels that no patch covers get a gradient of 0.

    Deterministic and batch-invariant: tokens and image gradient of one image are the same bits
    alone and in any batch.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost: ``2·B·N·D·C·Ph·Pw`` floating-point operations for the forward pass and for each of the
    gradients of image and weight; the image is read once for every panel of weights in the
    second-level cache (256 features of 16 x 16 patches, at most 512).

    Source: the patch projection is Dosovitskiy et al.'s, 2021 (ViT); the blocked product is
    Goto's and BLIS's (Van Zee, van de Geijn, 2015).

    Example:
        >>> import torch, pyvit
        >>> image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> weight, cls_token = torch.randn(64, 3, 8, 8), torch.randn(64)
        >>> pyvit.patch_embed(image, weight, cls_token=cls_token, mean=[0.5] * 3).shape
        torch.Size([2, 17, 64])
    """
    op = "patch_embed"
    _checks.tensor(op, "image", image, ndim=4, dtypes=(*_checks.FLOATING, torch.uint8))
    _checks.tensor(op, "weight", weight, ndim=4)
    for argument, value, ndim in (
        ("bias", bias, (1,)),
        ("pos_embed", pos_embed, (2, 3)),
        ("cls_token", cls_token, (1, 3)),
    ):
        if value is not None:
            _checks.tensor(op, argument, value, ndim=ndim)
    image, weight, bias, pos_embed, cls_token = _library.autocast(
        image, weight, bias, pos_embed, cls_token
    )
    if image.dtype != torch.uint8:
        _checks.like(op, "image", image, "weight", weight)
    elif image.device != weight.device:
        _checks.fail(ValueError, op, "image", f"on `weight`'s device {weight.device}", image.device)
    _backends.require_kernels(op, weight)
    dim, channels, *kernel = weight.shape
    if min(weight.shape) < 1:
        _checks.fail(ValueError, op, "weight", "without empty dimensions", _checks.shape_of(weight))
    if image.shape[1] != channels:
        wanted = f"an image of {channels} channels, as weight has"
        _checks.fail(ValueError, op, "image", wanted, _checks.shape_of(image))
    if image.shape[2] < kernel[0] or image.shape[3] < kernel[1]:
        wanted = f"at least as large as a patch, {kernel[0]} x {kernel[1]} pixels"
        _checks.fail(ValueError, op, "image", wanted, _checks.shape_of(image))
    step = tuple(kernel) if stride is None else _checks.pair(op, "stride", stride, minimum=1)
    bias = _row("bias", bias, weight)
    cls_token = _row("cls_token", cls_token, weight)
    mean = _channel_values("mean", mean, channels, weight)
    std = _channel_values("std", std, channels, weight, positive=True)
    if pos_embed is not None:
        rows, columns = _grid(image.shape, weight.shape, step)
        tokens = rows * columns + int(cls_token is not None)
        _checks.like(op, "pos_embed", pos_embed, "weight", weight)
        why = " (patches, and one row for cls_token where it is given)"
        _checks.shape(op, "pos_embed", pos_embed, (1,) * (pos_embed.dim() - 2) + (tokens, dim), why)
        pos_embed = pos_embed.reshape(tokens, dim).contiguous()
    arguments = (image, weight, bias, pos_embed, cls_token, mean, std)
    if _library.needs_grad(*arguments):
        return _PatchEmbed.apply(*arguments, step)
    return torch.ops.pyvit.patch_embed(*arguments, step)
