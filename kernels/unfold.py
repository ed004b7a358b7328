"""The column matrix of an image's patches on a GPU, and the sum back: ``unfold`` and ``fold``.

Both gather: a program of ``unfold`` writes a tile of the column matrix, one of ``fold`` a run of
pixels, each the sum of what was copied from it, in the order of the kernel's taps. So nothing is
added to by two programs, and results are the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import tuning

# ---- launch policy ------------------------------------------------------------------------------

COLUMNS = 512  # elements of a tile side by side, where there are so many patches


def configuration() -> dict[str, int]:
    """Elements of one program, the same for ``unfold`` and ``fold``."""
    return {"TILE": 2048, "num_warps": 4}


# ---- the launches -------------------------------------------------------------------------------


def unfold(x: Tensor, kernel_size, dilation, padding, stride) -> Tensor:
    """``pyvit::unfold``; arguments as the schema has them, x with any strides."""
    batch, channels, height, width = x.shape
    rows, columns = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, d, p, s in zip((height, width), kernel_size, dilation, padding, stride)
    )
    elements, patches = channels * kernel_size[0] * kernel_size[1], rows * columns
    cols = x.new_empty((batch, elements, patches))
    if cols.numel() == 0:
        return cols
    tile = tuning.chosen(x, f"unfold {x.element_size()} bytes", configuration())
    wide = min(COLUMNS, triton.next_power_of_2(patches))
    tall = tile["TILE"] // wide
    grid = (batch * triton.cdiv(elements, tall) * triton.cdiv(patches, wide),)
    geometry = (*kernel_size, *dilation, *padding, *stride)
    _unfold_kernel[grid](
        *(x, cols, elements, patches, columns, height, width, *x.stride(), *geometry),
        TALL=tall,
        WIDE=wide,
        num_warps=tile["num_warps"],
        **tuning.ROUNDS_EACH,
    )
    return cols


def fold(cols: Tensor, output_size, kernel_size, dilation, padding, stride) -> Tensor:
    """``pyvit::fold``; arguments as the schema has them, cols with any strides."""
    batch, elements, _ = cols.shape
    channels = elements // (kernel_size[0] * kernel_size[1])
    image = cols.new_empty((batch, channels, *output_size))
    if image.numel() == 0:
        return image
    rows, columns = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, d, p, s in zip(output_size, kernel_size, dilation, padding, stride)
    )
    pixels = channels * output_size[0] * output_size[1]
    geometry = (*kernel_size, *dilation, *padding, *stride)
    tile = tuning.chosen(cols, f"fold {cols.element_size()} bytes", configuration())
    _fold_kernel[(batch * triton.cdiv(pixels, tile["TILE"]),)](
        *(cols, image, pixels, rows, columns, *output_size, *cols.stride(), *geometry),
        **tile,
        **tuning.ROUNDS_EACH,
    )
    return image


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _unfold_kernel(
    x,
    cols,
    elements,
    patches,
    columns,
    height,
    width,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    kernel_y,
    kernel_x,
    dilation_y,
    dilation_x,
    padding_y,
    padding_x,
    step_y,
    step_x,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    across, down = tl.cdiv(patches, WIDE), tl.cdiv(elements, TALL)
    image = (program // (across * down)).to(tl.int64)
    row = program // across % down * TALL + tl.arange(0, TALL)[:, None]
    patch = program % across * WIDE + tl.arange(0, WIDE)[None, :]
    channel = row // (kernel_y * kernel_x)
    y = patch // columns * step_y - padding_y + row // kernel_x % kernel_y * dilation_y
    x_ = patch % columns * step_x - padding_x + row % kernel_x * dilation_x
    inside = (row < elements) & (patch < patches)
    seen = inside & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
    at = channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_y + x_.to(tl.int64) * stride_x
    value = tl.load(x + image * stride_b + at, seen, other=0.0)
    to = (image * elements + row) * patches + patch
    tl.store(cols + to, value, inside)


@triton.jit
def _fold_kernel(
    cols,
    image,
    pixels,
    rows,
    columns,
    height,
    width,
    stride_b,
    stride_k,
    stride_l,
    kernel_y,
    kernel_x,
    dilation_y,
    dilation_x,
    padding_y,
    padding_x,
    step_y,
    step_x,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    chunks = tl.cdiv(pixels, TILE)
    batch = (program // chunks).to(tl.int64)
    pixel = program % chunks * TILE + tl.arange(0, TILE)
    inside = pixel < pixels
    x = pixel % width + padding_x
    y = pixel // width % height + padding_y
    channel = pixel // (width * height)
    total = tl.zeros([TILE], tl.float32)
    for i in range(kernel_y):
        from_y = y - i * dilation_y
        on_y = inside & (from_y >= 0) & (from_y % step_y == 0) & (from_y < rows * step_y)
        for j in range(kernel_x):
            from_x = x - j * dilation_x
            on = on_y & (from_x >= 0) & (from_x % step_x == 0) & (from_x < columns * step_x)
            row = ((channel * kernel_y + i) * kernel_x + j).to(tl.int64)
            patch = (from_y // step_y * columns + from_x // step_x).to(tl.int64)
            at = batch * stride_b + row * stride_k + patch * stride_l
            total += tl.load(cols + at, on, other=0.0).to(tl.float32)
    to = batch * pixels + pixel
    tl.store(image + to, total.to(image.dtype.element_ty), inside)
