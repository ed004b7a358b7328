"""The last pass of a weight's gradient: sums over parts of the pixels are added up.

Several programs sum the products of one tile, each over a part of the pixels, so that a small
weight of many pixels fills a GPU. The parts' number follows from sizes alone and they are added in
one order, so the result is the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import tuning

TILE = 1024  # elements of one program


def add(sums: Tensor, out: Tensor) -> None:
    """``out[e] = Σ sums[part, e]``: sums is contiguous, out a weight with any strides."""
    total = out.numel()
    _add_parts_kernel[(triton.cdiv(total, TILE),)](
        *(sums, out, sums.shape[0], total, *out.shape[1:], *out.stride()),
        TILE=TILE,
        **tuning.ROUNDS_EACH,
    )


@triton.jit(do_not_specialize=["parts"])
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
