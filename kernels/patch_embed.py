"""Fused patch embedding on a GPU, and the gradients of the image and the weight.

Three matrix products whose operands or results are patches of the image where they lie: no patch
matrix is in memory. A block of tokens reads its pixels, normalises them on the way, and adds bias,
position and class token on the way out. The image's gradient writes each product back as the
pixels of its patch, and divides by std. The weight's gradient sums over tokens, in parts of a
number that the sizes alone decide, and adds them up (parts.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import parts, tuning

# ---- launch policy ------------------------------------------------------------------------------

TOKENS_OF_A_PART = 2048  # of the weight's gradient, at least
MOST_PARTS = 32


def configuration(kind: str) -> dict[str, int]:
    """Tile of a product: rows (tokens, or features), columns, and what is summed at once."""
    if kind != "half":  # "ieee" has as many registers as terms
        terms = 16 if kind == "ieee" else 32
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": terms, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


def _precision() -> str:
    return "tf32" if tuning.allows_tf32("conv") else "ieee"


def _kind(tensor: Tensor) -> str:
    return tuning.product_kind(tensor, tuning.allows_tf32("conv"))


# ---- the launches -------------------------------------------------------------------------------


def patch_embed(image, weight, bias, pos_embed, cls_token, mean, std, stride) -> Tensor:
    """``pyvit::patch_embed``; arguments as the schema has them, any strides."""
    batch, channels, height, width = image.shape
    dim, _, patch_y, patch_x = weight.shape
    rows, columns = (height - patch_y) // stride[0] + 1, (width - patch_x) // stride[1] + 1
    first = int(cls_token is not None)
    out = weight.new_empty((batch, rows * columns + first, dim))
    if out.numel() == 0:
        return out
    kind = _kind(weight)
    tile = tuning.chosen(weight, f"patch_embed {kind}", configuration(kind))
    tokens = batch * rows * columns
    grid = (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(dim, tile["BLOCK_N"]),)

    def or_any(value):  # a pointer that is not read
        return weight if value is None else value

    _tokens_kernel[grid](
        *(image, weight, or_any(bias), or_any(pos_embed), or_any(cls_token), or_any(mean)),
        *(or_any(std), out, tokens, dim, channels, rows, columns),
        *(*tuning.strides(image), *tuning.strides(weight)),
        **_sizes(weight.shape, stride),
        BIAS=bias is not None,
        POSITION=pos_embed is not None,
        CLASS=cls_token is not None,
        MEAN=mean is not None,
        STD=std is not None,
        BYTES=image.dtype == torch.uint8,
        PRECISION=_precision(),
        **tile,
        **tuning.ROUNDS_EACH,
    )
    return out


def patch_embed_image_grad(grad, weight, std, image_size, stride, channels_last) -> Tensor:
    """``pyvit::patch_embed_image_grad``: patches do not overlap."""
    batch, channels, height, width = image_size
    dim, _, patch_y, patch_x = weight.shape
    rows, columns = (height - patch_y) // stride[0] + 1, (width - patch_x) // stride[1] + 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole = rows * patch_y == height and columns * patch_x == width
    out = torch.empty(image_size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    if not whole:
        out.zero_()  # pixels that no patch has
    if out.numel() == 0:
        return out
    kind = _kind(grad)
    tile = tuning.chosen(grad, f"patch_embed image gradient {kind}", configuration(kind))
    tokens, pixels = batch * rows * columns, channels * patch_y * patch_x
    grid = (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(pixels, tile["BLOCK_N"]),)
    patches = grad[:, grad.shape[1] - rows * columns :]
    _image_kernel[grid](
        *(patches, weight, weight if std is None else std, out),
        *(tokens, dim, channels, rows, columns),
        *(*tuning.strides(patches), *tuning.strides(weight), *tuning.strides(out)),
        **_sizes(weight.shape, stride),
        STD=std is not None,
        PRECISION=_precision(),
        **tile,
        **tuning.ROUNDS_EACH,
    )
    return out


def patch_embed_weight_grad(grad, image, mean, std, weight_size, stride, channels_last) -> Tensor:
    """``pyvit::patch_embed_weight_grad``; arguments as the schema has them, any strides."""
    dim, channels, patch_y, patch_x = weight_size
    batch, _, height, width = image.shape
    rows, columns = (height - patch_y) // stride[0] + 1, (width - patch_x) // stride[1] + 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(weight_size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    if out.numel() == 0:
        return out
    tokens, pixels = batch * rows * columns, channels * patch_y * patch_x
    count = max(1, min(MOST_PARTS, tokens // TOKENS_OF_A_PART))
    sums = grad.new_empty((count, dim, pixels), dtype=torch.float32)
    kind = _kind(grad)
    tile = tuning.chosen(grad, f"patch_embed weight gradient {kind}", configuration(kind))
    blocks = triton.cdiv(dim, tile["BLOCK_M"]) * triton.cdiv(pixels, tile["BLOCK_N"])
    patches = grad[:, grad.shape[1] - rows * columns :]
    _weight_kernel[(blocks * count,)](
        *(patches, image, grad if mean is None else mean, grad if std is None else std, sums),
        *(tokens, triton.cdiv(tokens, count), dim, channels, rows, columns),
        *(*tuning.strides(patches), *tuning.strides(image)),
        **_sizes(weight_size, stride),
        MEAN=mean is not None,
        STD=std is not None,
        BYTES=image.dtype == torch.uint8,
        PRECISION=_precision(),
        **tile,
        **tuning.ROUNDS_EACH,
    )
    parts.add(sums, out)
    return out


def _sizes(weight_size, stride) -> dict[str, int]:
    """What a model fixes: divisions by them become shifts, and a run of pixels is seen as one."""
    names = ("PATCH_Y", "PATCH_X", "STRIDE_Y", "STRIDE_X")
    return dict(zip(names, (*weight_size[2:], *stride)))


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _pixel_of(k, PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr):
    """Channel, row and column of the k-th pixel of a patch."""
    c, i, j = k // (PATCH_Y * PATCH_X), k // PATCH_X % PATCH_Y, k % PATCH_X
    return c.to(tl.int64), i.to(tl.int64), j.to(tl.int64)


@triton.jit
def _corner(patch, columns, y, x, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Offset of a patch's first pixel from its image's, whose strides are y and x."""
    row, column = patch // columns * STRIDE_Y, patch % columns * STRIDE_X
    return row.to(tl.int64) * y + column.to(tl.int64) * x


@triton.jit
def _statistics(mean, std, c, mask, MEAN: tl.constexpr, STD: tl.constexpr):
    """Of the channels c: the mean, and what to multiply by."""
    shift, scale = 0.0, 1.0
    if MEAN:
        shift = tl.load(mean + c, mask, other=0.0).to(tl.float32)[None, :]
    if STD:
        deviation = tl.load(std + c, mask, other=1.0).to(tl.float32)
        scale = tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)[None, :]
    return shift, scale


@triton.jit
def _pixels(
    image, at, shift, scale, mask, like,
    MEAN: tl.constexpr, STD: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Normalised pixels of a tile, in the type of ``like``."""
    value = tl.load(image + at, mask, other=0)
    if not (BYTES or MEAN or STD):
        return value.to(like.dtype.element_ty)
    value = value.to(tl.float32)
    if BYTES:
        value = value * (1.0 / 255.0)
    if MEAN:
        value -= shift
    if STD:
        value *= scale
    return tl.where(mask, value, 0.0).to(like.dtype.element_ty)


@triton.jit(do_not_specialize=["tokens"])
def _tokens_kernel(
    image, weight, bias, position, class_token, mean, std, out,
    tokens, dim, channels, rows, columns,
    i_b, i_c, i_y, i_x, w_d, w_c, w_y, w_x,
    PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    BIAS: tl.constexpr, POSITION: tl.constexpr, CLASS: tl.constexpr, MEAN: tl.constexpr,
    STD: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(dim, BLOCK_N)
    program = tl.program_id(0)
    t = program // across * BLOCK_M + tl.arange(0, BLOCK_M)
    d = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    per_image = rows * columns
    b, patch = (t // per_image).to(tl.int64), t % per_image
    corner = b * i_b + _corner(patch, columns, i_y, i_x, STRIDE_Y, STRIDE_X)
    factors_of = weight + d.to(tl.int64) * w_d
    products = channels * PATCH_Y * PATCH_X
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, products, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        c, i, j = _pixel_of(k, PATCH_Y, PATCH_X)
        at = corner[:, None] + (c * i_c + i * i_y + j * i_x)[None, :]
        mask = (t < tokens)[:, None] & (k < products)[None, :]
        shift, scale = _statistics(mean, std, c, k < products, MEAN, STD)
        pixels = _pixels(image, at, shift, scale, mask, weight, MEAN, STD, BYTES)
        w_at = (c * w_c + i * w_y + j * w_x)[:, None]
        inside = (k < products)[:, None] & (d < dim)[None, :]
        factors = tl.load(factors_of[None, :] + w_at, inside, other=0.0)
        result = tl.dot(pixels, factors, result, input_precision=PRECISION)
    here = d < dim
    if BIAS:
        result += tl.load(bias + d, here, other=0.0).to(tl.float32)[None, :]
    first = 0
    if CLASS:
        first = 1
    mask = (t < tokens)[:, None] & here[None, :]
    if POSITION:
        of_token = (patch + first)[:, None] * dim + d[None, :]
        result += tl.load(position + of_token, mask, other=0.0).to(tl.float32)
    row = b * (per_image + first) + patch + first
    to = out + row[:, None] * dim + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask)
    if CLASS:  # whoever has an image's first patch writes its class token
        token = tl.load(class_token + d, here, other=0.0).to(tl.float32)
        if POSITION:
            token += tl.load(position + d, here, other=0.0).to(tl.float32)
        value = tl.broadcast_to(token[None, :], [BLOCK_M, BLOCK_N]).to(out.dtype.element_ty)
        to_class = out + (b * (per_image + 1))[:, None] * dim + d[None, :]
        tl.store(to_class, value, mask & (patch == 0)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _image_kernel(
    grad, weight, std, out, tokens, dim, channels, rows, columns,
    g_b, g_n, g_d, w_d, w_c, w_y, w_x, o_b, o_c, o_y, o_x,
    PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    STD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pixels = channels * PATCH_Y * PATCH_X
    across = tl.cdiv(pixels, BLOCK_N)
    program = tl.program_id(0)
    t = program // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    per_image = rows * columns
    b, patch = (t // per_image).to(tl.int64), t % per_image
    c, i, j = _pixel_of(n, PATCH_Y, PATCH_X)
    rows_of = grad + b * g_b + patch.to(tl.int64) * g_n
    factors_of = weight + c * w_c + i * w_y + j * w_x
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        d = k.to(tl.int64)
        inside = (t < tokens)[:, None] & (k < dim)[None, :]
        left = tl.load(rows_of[:, None] + (d * g_d)[None, :], inside, other=0.0)
        inside = (k < dim)[:, None] & (n < pixels)[None, :]
        right = tl.load(factors_of[None, :] + (d * w_d)[:, None], inside, other=0.0)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    if STD:
        _, scale = _statistics(std, std, c, n < pixels, False, True)
        result *= scale
    corner = b * o_b + _corner(patch, columns, o_y, o_x, STRIDE_Y, STRIDE_X)
    to = out + corner[:, None] + (c * o_c + i * o_y + j * o_x)[None, :]
    mask = (t < tokens)[:, None] & (n < pixels)[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "each"])
def _weight_kernel(
    grad, image, mean, std, sums, tokens, each, dim, channels, rows, columns,
    g_b, g_n, g_d, i_b, i_c, i_y, i_x,
    PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    MEAN: tl.constexpr, STD: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pixels = channels * PATCH_Y * PATCH_X
    across, down = tl.cdiv(pixels, BLOCK_N), tl.cdiv(dim, BLOCK_M)
    program = tl.program_id(0)
    n = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    d = program // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    part = (program // (across * down)).to(tl.int64)
    c, i, j = _pixel_of(n, PATCH_Y, PATCH_X)
    of_pixel = c * i_c + i * i_y + j * i_x
    shift, scale = _statistics(mean, std, c, n < pixels, MEAN, STD)
    columns_of = grad + d.to(tl.int64) * g_d
    per_image = rows * columns
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = part * each
    last = tl.minimum(first + each, tokens).to(tokens.dtype)
    for start in range(first.to(tokens.dtype), last, BLOCK_K):
        t = start + tl.arange(0, BLOCK_K)
        b, patch = (t // per_image).to(tl.int64), t % per_image
        g_at = b * g_b + patch.to(tl.int64) * g_n
        inside = (d < dim)[:, None] & (t < last)[None, :]
        left = tl.load(columns_of[:, None] + g_at[None, :], inside, other=0.0)
        corner = b * i_b + _corner(patch, columns, i_y, i_x, STRIDE_Y, STRIDE_X)
        mask = (t < last)[:, None] & (n < pixels)[None, :]
        at = corner[:, None] + of_pixel[None, :]
        right = _pixels(image, at, shift, scale, mask, grad, MEAN, STD, BYTES)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    to = sums + (part * dim + d)[:, None] * pixels + n[None, :]
    tl.store(to, result, (d < dim)[:, None] & (n < pixels)[None, :])
