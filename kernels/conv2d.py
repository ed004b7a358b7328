"""Unfold-based convolution on a GPU: the result, the image's gradient and the weight's.

Implicit matrix products: no column matrix is in memory. The result and the image's gradient are the
same sum with other numbers,

    out[p, n] = Σ_{i, j, k} source[row(p) + i·step, column(p) + j·step, k] · weight[i, j, k, n]

over pixels p, taps (i, j) and the channels k that are summed. A loop over the rows of taps has one
inside it over columns of taps and channels, which lie side by side in one block of products, so
that three channels fill it too. The gradient of a strided layer is one such sum for each phase of
the pixels, with the taps that reach it; all phases are one launch. Patches that do not overlap
have products of their own (patch_embed.py). The weight's gradient sums over pixels, in parts of a
number that the sizes alone decide, and adds them up (parts.py).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import parts, patch_embed, tuning

# ---- launch policy ------------------------------------------------------------------------------

PARTS_OF_PIXELS = 4096  # pixels that one part of a weight's gradient sums over, at least
MOST_PARTS = 64
MANY_PIXELS = 1 << 14
BYTES_OF_PARTS = 64 << 20  # where the weight is larger there are tiles enough without parts


def configuration(
    pixels: int, channels: int, kind: str, strided_gradient: bool = False
) -> dict[str, int]:
    """Tile of a result: pixels, its channels, and the block of products summed at once.

    What tells a strided gradient's phases apart takes registers: half as many pixels and warps let
    twelve warps share a multiprocessor, where eight would have it alone.
    """
    if kind == "ieee":  # as many registers as terms
        return {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    if kind == "tf32":
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    narrow = 64 if channels <= 64 or pixels < MANY_PIXELS else 128
    rows, warps = (64, 4) if strided_gradient else (128, 8)
    return {
        "BLOCK_M": rows, "BLOCK_N": narrow, "BLOCK_K": 32, "num_warps": warps, "num_stages": 3
    }  # fmt: skip


def weight_configuration(kind: str) -> dict[str, int]:
    """Tile of a weight's gradient: its result channels, columns of taps with their channels, and
    the pixels summed at once."""
    tile = configuration(1, 1, kind)
    return tile | {"BLOCK_M": 64, "BLOCK_N": 64}


def _precision(layer: str) -> tuple[str, bool]:
    """``layer`` is "conv2d", or "linear" for a matrix product, which has a switch of its own."""
    tf32 = tuning.allows_tf32("matmul" if layer == "linear" else "conv")
    return "tf32" if tf32 else "ieee", tf32


# ---- the launches -------------------------------------------------------------------------------


def conv2d(x, weight, bias, stride, padding, dilation, groups, channels_last) -> Tensor:
    """``pyvit::conv2d``; arguments as the schema has them, any strides."""
    sizes = [
        (x.shape[2 + a] + padding[2 * a] + padding[2 * a + 1] - dilation[a] * (taps - 1) - 1)
        // stride[a]
        + 1
        for a, taps in enumerate(weight.shape[2:])
    ]
    out = _empty(x, (x.shape[0], weight.shape[0], *sizes), channels_last)
    conv2d_into(out, x, weight, bias, stride, padding, dilation, groups)
    return out


def conv2d_into(
    out, x, weight, bias, stride, padding, dilation, groups, layer: str = "conv2d"
) -> None:
    """Write a convolution's result where ``out`` lies."""
    geometry = (stride, padding, dilation, groups)
    _sum_over_taps(out, x, weight, bias, *geometry, gradient=False, layer=layer)


def conv2d_input_grad(
    grad, weight, input_size, stride, padding, dilation, groups, channels_last
) -> Tensor:
    """``pyvit::conv2d_input_grad``; arguments as the schema has them, any strides."""
    if _are_patches(grad, weight, stride, padding, dilation, groups):
        tokens = grad.flatten(2).transpose(1, 2)
        return patch_embed.patch_embed_image_grad(
            tokens, weight, None, input_size, stride, channels_last
        )
    out = _empty(grad, input_size, channels_last)
    geometry = (stride, padding, dilation, groups)
    _sum_over_taps(out, grad, weight, None, *geometry, gradient=True, layer="conv2d")
    return out


def _are_patches(grad, weight, stride, padding, dilation, groups) -> bool:
    """Whether no pixel is reached twice, and ``grad``'s pixels have one stride."""
    taps = weight.shape[2:]
    apart = taps[0] <= stride[0] and taps[1] <= stride[1] and not any(padding)
    whole = groups == max(dilation) == 1 and taps.numel() > 1
    return whole and apart and grad.stride(2) == grad.shape[3] * grad.stride(3)


def conv2d_weight_grad(
    grad,
    x,
    weight_size,
    stride,
    padding,
    dilation,
    groups,
    channels_last,
    layer: str = "conv2d",
) -> Tensor:
    """``pyvit::conv2d_weight_grad``; arguments as the schema has them, any strides."""
    out_channels, channels, *kernel = weight_size
    out = _empty(grad, weight_size, channels_last)
    if out.numel() == 0:
        return out
    height, width = grad.shape[2:]
    pixels = grad.shape[0] * height * width
    fit = BYTES_OF_PARTS // (4 * out.numel())
    count = max(1, min(MOST_PARTS, pixels // PARTS_OF_PIXELS, fit))
    sums = grad.new_empty((count, *weight_size), dtype=torch.float32)
    precision, tf32 = _precision(layer)
    kind = tuning.product_kind(grad, tf32)
    tile = tuning.chosen(grad, f"{layer} weight gradient {kind}", weight_configuration(kind))
    of_group, columns = out_channels // groups, kernel[1] * channels
    blocks = triton.cdiv(of_group, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"])
    _weight_kernel[(blocks * kernel[0] * groups * count,)](
        *(grad, x, sums, pixels, triton.cdiv(pixels, count), height, width, *x.shape[2:]),
        *(of_group, channels, groups, *kernel),
        *(*stride, padding[0], padding[2], *dilation, *tuning.strides(grad), *tuning.strides(x)),
        PRECISION=precision,
        **tile,
        **tuning.ROUNDS_EACH,
    )
    parts.add(sums, out)
    return out


def _empty(like: Tensor, size, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _sum_over_taps(
    out, source, weight, bias, stride, padding, dilation, groups, *, gradient: bool, layer: str
) -> None:
    images, _, height, width = out.shape
    if out.numel() == 0:
        return
    of_phase = [-(-size // s) if gradient else size for size, s in zip((height, width), stride)]
    phases = min(stride[0], height) * min(stride[1], width) if gradient else 1
    pixels = images * of_phase[0] * of_phase[1]  # of the phase that has the most
    channels, summed = out.shape[1] // groups, source.shape[1] // groups
    precision, tf32 = _precision(layer)
    kind = tuning.product_kind(out, tf32)
    strided = gradient and max(stride) > 1
    tile = configuration(pixels, channels, kind, strided)
    size = f"{tile['BLOCK_N']} channels, {'many' if pixels >= MANY_PIXELS else 'few'} pixels"
    what = f"{layer}{' strided' if strided else ''}{' image gradient' if gradient else ''}"
    tile = tuning.chosen(out, f"{what} {kind} {size}", tile)
    blocks = triton.cdiv(pixels, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_N"])
    if pixels > tile["BLOCK_M"]:
        weight = _channels_together(weight)
    # Weight's strides by result channel, summed channel, group (the result's channels or those
    # summed, whichever come first), row and column of taps.
    by_out, by_in, *by_tap = tuning.strides(weight)
    by_channel = (by_in, by_out) if gradient else (by_out, by_in)
    next_group = by_out * (weight.shape[0] // groups)
    _taps_kernel[(blocks * phases * groups,)](
        *(out, source, weight, weight if bias is None else bias),
        *(pixels, images, channels, summed, *source.shape[2:], height, width),
        *(*weight.shape[2:], *stride, padding[0], padding[2], *dilation),
        *(s // math.gcd(s, d) for s, d in zip(stride, dilation)),
        *(*tuning.strides(out), *tuning.strides(source), *by_channel, next_group, *by_tap),
        GRADIENT=gradient,
        BIAS=bias is not None,
        PRECISION=precision,
        **tile,
        **tuning.ROUNDS_EACH,
    )


def _channels_together(weight: Tensor) -> Tensor:
    """A copy where they are not: every block of pixels reads the whole weight, channel after
    channel, and memory gives 32 bytes at once."""
    if weight.stride(1) == 1 or weight.shape[1] == 1 or weight.shape[2:].numel() == 1:
        return weight
    return weight.contiguous(memory_format=torch.channels_last)


# ---- kernels ------------------------------------------------------------------------------------

# Numbers that a batch's size changes are not specialised on: another batch compiles nothing anew.


@triton.jit
def _first_tap(first, taps, stride, padding, dilation, apart):
    """The first tap that reaches the pixels first + t·stride of an image; ``taps`` or more where
    none does."""
    tap = first * 0 + taps
    for i in range(apart):
        tap = tl.where((first + padding - i * dilation) % stride == 0, i, tap)
    return tap


@triton.jit(do_not_specialize=["pixels", "images", "height", "out_height"])
def _taps_kernel(
    out, source, weight, bias,
    pixels, images, channels, summed, height, width, out_height, out_width,
    taps_y, taps_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    apart_y, apart_x,
    out_b, out_c, out_y, out_x, s_b, s_c, s_y, s_x, w_n, w_k, w_group, w_y, w_x,
    GRADIENT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across, down = tl.cdiv(channels, BLOCK_N), tl.cdiv(pixels, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(0) // across
    # Result (t_y, t_x) lies at first + t·every; tap i of its rows reads the source's row
    # t_y·factor + offset + i·step. Columns alike.
    if GRADIENT:  # programs of one place and several phases stand side by side
        phases_x = tl.minimum(stride_x, out_width)
        phases = phases_x * tl.minimum(stride_y, out_height)
        first_y, first_x = program % phases // phases_x, program % phases_x
        program = program // phases
        tap_y = _first_tap(first_y, taps_y, stride_y, padding_y, dilation_y, apart_y)
        tap_x = _first_tap(first_x, taps_x, stride_x, padding_x, dilation_x, apart_x)
        rows = (out_height - first_y + stride_y - 1) // stride_y
        columns = (out_width - first_x + stride_x - 1) // stride_x
        row_taps = (taps_y - tap_y + apart_y - 1) // apart_y
        column_taps = (taps_x - tap_x + apart_x - 1) // apart_x
        row_offset = (first_y + padding_y - tap_y * dilation_y) // stride_y
        column_offset = (first_x + padding_x - tap_x * dilation_x) // stride_x
        row_step = -(apart_y * dilation_y // stride_y)
        column_step = -(apart_x * dilation_x // stride_x)
        row_factor, column_factor = 1, 1
        row_every, column_every = stride_y, stride_x
        weight += tl.cast(tap_y, tl.int64) * w_y + tl.cast(tap_x, tl.int64) * w_x
        w_i, w_j = tl.cast(apart_y, tl.int64) * w_y, tl.cast(apart_x, tl.int64) * w_x
        pixels = tl.cast(images, pixels.dtype) * rows * columns
    else:
        first_y, first_x, rows, columns = 0, 0, out_height, out_width
        row_taps, column_taps, row_offset, column_offset = taps_y, taps_x, -padding_y, -padding_x
        row_step, column_step, row_factor, column_factor = (
            dilation_y,
            dilation_x,
            stride_y,
            stride_x,
        )
        row_every, column_every, w_i, w_j = 1, 1, w_y, w_x
    group = (program // down).to(tl.int64)
    p = program % down * BLOCK_M + tl.arange(0, BLOCK_M)
    t_x, t_y = p % columns, p // columns % rows
    image = (p // (columns * rows)).to(tl.int64)
    y, x = t_y * row_factor + row_offset, t_x * column_factor + column_offset
    base = source + group * summed * s_c + image * s_b
    weights = weight + group * w_group + n.to(tl.int64) * w_n
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(row_taps):
        at_y = y + i * row_step
        row = base + at_y.to(tl.int64) * s_y
        seen = (p < pixels) & (at_y >= 0) & (at_y < height)
        for start in range(0, column_taps * summed, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            j, c = k // summed, (k % summed).to(tl.int64)
            at_x = x[:, None] + j[None, :] * column_step
            inside = seen[:, None] & (j < column_taps)[None, :] & (at_x >= 0) & (at_x < width)
            offset = at_x.to(tl.int64) * s_x + c[None, :] * s_c
            values = tl.load(row[:, None] + offset, inside, other=0.0)
            w_at = (c * w_k + tl.cast(i, tl.int64) * w_i + j.to(tl.int64) * w_j)[:, None]
            factors = tl.load(
                weights[None, :] + w_at,
                (j < column_taps)[:, None] & (n < channels)[None, :],
                other=0.0,
            )
            result = tl.dot(values, factors, result, input_precision=PRECISION)
    if BIAS:
        result += tl.load(bias + group * channels + n, n < channels, other=0.0).to(tl.float32)[
            None, :
        ]
    to_y, to_x = first_y + t_y * row_every, first_x + t_x * column_every
    to = image * out_b + to_y.to(tl.int64) * out_y + to_x.to(tl.int64) * out_x
    channel = (group * channels + n) * out_c
    mask = (p < pixels)[:, None] & (n < channels)[None, :]
    tl.store(out + to[:, None] + channel[None, :], result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["pixels", "each", "rows", "height"])
def _weight_kernel(
    grad, x, sums, pixels, each, rows, columns, height, width,
    out_channels, channels, groups, kernel_y, kernel_x,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    g_b, g_c, g_y, g_x, x_b, x_c, x_y, x_x,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(out_channels, BLOCK_M)
    across = tl.cdiv(kernel_x * channels, BLOCK_N)
    program = tl.program_id(0)
    o = program % down * BLOCK_M + tl.arange(0, BLOCK_M)
    jc = program // down % across * BLOCK_N + tl.arange(0, BLOCK_N)
    i = program // (down * across) % kernel_y
    group = (program // (down * across * kernel_y) % groups).to(tl.int64)
    part = program // (down * across * kernel_y) // groups
    j, c = jc // channels, jc % channels
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = part.to(tl.int64) * each
    last = tl.minimum(first + each, pixels).to(pixels.dtype)
    for start in range(first.to(pixels.dtype), last, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        there = p < last
        at_x, at_y = p % columns, p // columns % rows
        image = (p // (columns * rows)).to(tl.int64)
        of_grad = image * g_b + at_y.to(tl.int64) * g_y + at_x.to(tl.int64) * g_x
        channel = (group * out_channels + o) * g_c
        left = tl.load(
            grad + channel[:, None] + of_grad[None, :],
            (o < out_channels)[:, None] & there[None, :],
            other=0.0,
        )
        y = at_y * stride_y - padding_y + i * dilation_y
        x_at = (at_x * stride_x - padding_x)[:, None] + (j * dilation_x)[None, :]
        inside = (there & (y >= 0) & (y < height))[:, None] & (x_at >= 0) & (x_at < width)
        inside = inside & (j < kernel_x)[None, :]
        of_image = (image * x_b + y.to(tl.int64) * x_y)[:, None] + x_at.to(tl.int64) * x_x
        from_channel = (group * channels + c) * x_c
        right = tl.load(x + of_image + from_channel[None, :], inside, other=0.0)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    # [part, out channel, channel, i, j], whatever the layout of the gradient
    row = (part * groups + group) * out_channels + o
    column = (c * kernel_y + i) * kernel_x + j
    to = row[:, None] * channels * kernel_y * kernel_x + column[None, :]
    tl.store(sums + to, result, (o < out_channels)[:, None] & (j < kernel_x)[None, :])
