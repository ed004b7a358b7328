"""What the kernels of an attack's step share: reads, roundings and bounds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(pointer, at, mask):
    return tl.load(pointer + at, mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(value, like):
    """To the storage type and back."""
    return tl.cast(value, like.dtype.element_ty).to(tl.float32)


@triton.jit
def clamp(value, lo, hi):
    """Lets NaN pass, as torch.clamp does."""
    value = tl.where(value < lo, lo, value)
    return tl.where(value > hi, hi, value)


@triton.jit
def of_image(number, numbers, image, ONE_EACH: tl.constexpr):
    if ONE_EACH:
        return tl.load(numbers + image).to(tl.float32)
    else:
        return tl.cast(number, tl.float32)
