"""Unfold-based convolution on a GPU: the result, the image's gradient and the weight's.

Implicit matrix products: no column matrix is in memory. The result and the image's gradient are the
same sum with other numbers,

    out[p, n] = Σ_{i, j, k} source[row(p) + i·step, column(p) + j·step, k] · weight[i, j, k, n]

over pixels p, taps (i, j) and the channels k that are summed. A loop over the rows of taps has one
inside it over columns of taps and channels, which lie side by side in one block of products, so
that three channels fill it too. The gradient of a strided layer is one such sum for each phase of
the pixels, with the taps that reach it. The weight's gradient sums over pixels, in parts of a
number that the sizes alone decide; a second kernel adds the parts up, always in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import tuning

# ---- launch policy ------------------------------------------------------------------------------

PARTS_OF_PIXELS = 4096  # pixels that one part of a weight's gradient sums over, at least
MOST_PARTS = 64
BYTES_OF_PARTS = 64 << 20  # where the weight is larger there are tiles enough without parts


def configuration(pixels: int, channels: int, kind: str) -> dict[str, int]:
    """Tile of a result: pixels, its channels, and the block of products summed at once."""
    if kind == "ieee":  # as many registers as terms
        return {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    if kind == "tf32":
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    narrow = 64 if channels <= 64 or pixels < 1 << 14 else 128
    return {"BLOCK_M": 128, "BLOCK_N": narrow, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


def _precision() -> str:
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _kind(tensor: Tensor) -> str:
    return tuning.product_kind(tensor, torch.backends.cudnn.allow_tf32)


# ---- the launches -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a sum over taps.

    Result t, of ``size``, lies at ``first + t·every``; tap i, of ``taps``, is the kernel's
    ``tap + i·tap_step`` and reads the source at ``t·factor + offset + i·step``.
    """

    size: int
    first: int
    every: int
    taps: int
    tap: int
    tap_step: int
    factor: int
    offset: int
    step: int


def forward_axis(size: int, taps: int, stride: int, padding: int, dilation: int) -> Axis:
    return Axis(size, 0, 1, taps, 0, 1, stride, -padding, dilation)


def gradient_axes(size: int, taps: int, stride: int, padding: int, dilation: int) -> list[Axis]:
    """For each phase of an image's pixels the taps that reach it."""
    apart = stride // math.gcd(stride, dilation)  # taps that reach the same phase
    axes = []
    for first in range(min(stride, size)):
        reaching = [i for i in range(apart) if (first + padding - i * dilation) % stride == 0]
        tap = reaching[0] if reaching else 0
        count = len(range(tap, taps, apart)) if reaching else 0
        offset = (first + padding - tap * dilation) // stride
        step = -(apart * dilation // stride)
        axes.append(
            Axis(-(-(size - first) // stride), first, stride, count, tap, apart, 1, offset, step)
        )
    return axes


def conv2d(x, weight, bias, stride, padding, dilation, groups, channels_last) -> Tensor:
    """``pyvit::conv2d``; arguments as the schema has them, any strides."""
    kernel = weight.shape[2:]
    sizes = [
        (x.shape[2 + a] + padding[2 * a] + padding[2 * a + 1] - dilation[a] * (kernel[a] - 1) - 1)
        // stride[a]
        + 1
        for a in range(2)
    ]
    out = _empty(x, (x.shape[0], weight.shape[0], *sizes), channels_last)
    conv2d_into(out, x, weight, bias, stride, padding, dilation, groups)
    return out


def conv2d_into(out, x, weight, bias, stride, padding, dilation, groups) -> None:
    """Write a convolution's result where ``out`` lies."""
    axes = [
        forward_axis(out.shape[2 + a], weight.shape[2 + a], stride[a], padding[2 * a], dilation[a])
        for a in range(2)
    ]
    # [out channels, summed channels]
    _sum_over_taps(out, x, weight, weight.stride()[:2], bias, axes, groups)


def conv2d_input_grad(
    grad, weight, input_size, stride, padding, dilation, groups, channels_last
) -> Tensor:
    """``pyvit::conv2d_input_grad``; arguments as the schema has them, any strides."""
    out = _empty(grad, input_size, channels_last)
    rows, columns = (
        gradient_axes(
            input_size[2 + a], weight.shape[2 + a], stride[a], padding[2 * a], dilation[a]
        )
        for a in range(2)
    )
    of_group = weight.stride(1), weight.stride(0)
    for row in rows:
        for column in columns:
            _sum_over_taps(out, grad, weight, of_group, None, [row, column], groups)
    return out


def conv2d_weight_grad(
    grad, x, weight_size, stride, padding, dilation, groups, channels_last
) -> Tensor:
    """``pyvit::conv2d_weight_grad``; arguments as the schema has them, any strides."""
    out_channels, channels, *kernel = weight_size
    out = _empty(grad, weight_size, channels_last)
    if out.numel() == 0:
        return out
    height, width = grad.shape[2:]
    pixels = grad.shape[0] * height * width
    fit = BYTES_OF_PARTS // (4 * out.numel())
    parts = max(1, min(MOST_PARTS, pixels // PARTS_OF_PIXELS, fit))
    each = triton.cdiv(pixels, parts)
    sums = grad.new_empty((parts, *weight_size), dtype=torch.float32)
    tile = configuration(out_channels // groups, kernel[1] * channels, _kind(grad))
    tile |= {"BLOCK_M": 64, "BLOCK_N": 64}
    blocks = triton.cdiv(out_channels // groups, 64) * triton.cdiv(kernel[1] * channels, 64)
    _weight_kernel[(blocks * kernel[0] * groups * parts,)](
        *(grad, x, sums, pixels, each, height, width, *x.shape[2:]),
        *(out_channels // groups, channels, groups, *kernel),
        *(*stride, padding[0], padding[2], *dilation, *grad.stride(), *x.stride()),
        PRECISION=_precision(),
        **tile,
    )
    total = out.numel()
    _add_parts_kernel[(triton.cdiv(total, 1024),)](
        *(sums, out, parts, total, channels, *kernel, *out.stride()), TILE=1024
    )
    return out


def _empty(like: Tensor, size, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _sum_over_taps(out, source, weight, of_group, bias, axes, groups) -> None:
    """One phase of ``out``; ``of_group`` are weight's strides by result and summed channel."""
    rows, columns = axes
    pixels = out.shape[0] * rows.size * columns.size
    channels, summed = out.shape[1] // groups, source.shape[1] // groups
    if pixels == 0 or channels == 0:
        return
    kind = _kind(out)
    tile = configuration(pixels, channels, kind)
    size = f"{tile['BLOCK_N']} channels, {'many' if pixels >= 1 << 14 else 'few'} pixels"
    tile = tuning.chosen(out, f"conv2d {kind} {size}", tile)
    blocks = triton.cdiv(pixels, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_N"])
    # From one group to the next: a result's channels or those summed, whichever come first.
    next_group = weight.stride(0) * (weight.shape[0] // groups)
    _taps_kernel[(blocks * groups,)](
        *(out, source, weight, weight if bias is None else bias, pixels, channels, summed),
        *(*source.shape[2:], rows.size, columns.size),
        *(rows.first, rows.every, rows.taps, rows.factor, rows.offset, rows.step),
        *(columns.first, columns.every, columns.taps, columns.factor, columns.offset),
        *(columns.step, *out.stride(), *source.stride(), *of_group, next_group),
        *(rows.tap * weight.stride(2) + columns.tap * weight.stride(3),),
        *(rows.tap_step * weight.stride(2), columns.tap_step * weight.stride(3)),
        BIAS=bias is not None,
        PRECISION=_precision(),
        **tile,
    )


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _taps_kernel(
    out, source, weight, bias, pixels, channels, summed,
    height, width, rows, columns,
    row_first, row_every, row_taps, row_factor, row_offset, row_step,
    column_first, column_every, column_taps, column_factor, column_offset, column_step,
    out_b, out_c, out_y, out_x, s_b, s_c, s_y, s_x, w_n, w_k, w_group, w_first, w_i, w_j,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across, down = tl.cdiv(channels, BLOCK_N), tl.cdiv(pixels, BLOCK_M)
    program = tl.program_id(0)
    group = (program // (across * down)).to(tl.int64)
    n = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    p = program // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    t_x, t_y = p % columns, p // columns % rows
    image = (p // (columns * rows)).to(tl.int64)
    y, x = t_y * row_factor + row_offset, t_x * column_factor + column_offset
    base = source + group * summed * s_c + image * s_b
    weights = weight + group * w_group + w_first + n * w_n
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(row_taps):
        at_y = y + i * row_step
        row = base + at_y.to(tl.int64) * s_y
        seen = (p < pixels) & (at_y >= 0) & (at_y < height)
        for start in range(0, column_taps * summed, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            j, c = k // summed, k % summed
            at_x = x[:, None] + j[None, :] * column_step
            inside = seen[:, None] & (j < column_taps)[None, :] & (at_x >= 0) & (at_x < width)
            offset = at_x * s_x + c[None, :].to(tl.int64) * s_c
            values = tl.load(row[:, None] + offset, inside, other=0.0)
            w_at = (c * w_k + i * w_i + j * w_j)[:, None]
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
    to_y, to_x = row_first + t_y * row_every, column_first + t_x * column_every
    to = image * out_b + to_y.to(tl.int64) * out_y + to_x.to(tl.int64) * out_x
    channel = (group * channels + n) * out_c
    mask = (p < pixels)[:, None] & (n < channels)[None, :]
    tl.store(out + to[:, None] + channel[None, :], result.to(out.dtype.element_ty), mask)


@triton.jit
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
    last = tl.minimum((part + 1) * each, pixels)
    for start in range(part * each, last, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        there = p < last
        at_x, at_y = p % columns, p // columns % rows
        image = (p // (columns * rows)).to(tl.int64)
        of_grad = image * g_b + at_y.to(tl.int64) * g_y + at_x * g_x
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
        of_image = (image * x_b + y.to(tl.int64) * x_y)[:, None] + x_at * x_x
        from_channel = (group * channels + c) * x_c
        right = tl.load(x + of_image + from_channel[None, :], inside, other=0.0)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    # [part, out channel, channel, i, j], whatever the layout of the gradient
    row = (part * groups + group) * out_channels + o
    column = (c * kernel_y + i) * kernel_x + j
    to = row[:, None] * channels * kernel_y * kernel_x + column[None, :]
    tl.store(sums + to, result, (o < out_channels)[:, None] & (j < kernel_x)[None, :])


@triton.jit
def _add_parts_kernel(
    sums, out, parts, total, channels, kernel_y, kernel_x, out_o, out_c, out_y, out_x,
    TILE: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = e < total
    value = tl.zeros([TILE], tl.float32)
    for part in range(parts):
        value += tl.load(sums + tl.cast(part, tl.int64) * total + e, mask, other=0.0)
    j, i = e % kernel_x, e // kernel_x % kernel_y
    c, o = e // (kernel_x * kernel_y) % channels, e // (kernel_x * kernel_y * channels)
    to = o * out_o + c * out_c + i * out_y + j * out_x
    tl.store(out + to, value.to(out.dtype.element_ty), mask)
