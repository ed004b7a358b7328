"""What a piece of work costs at least: its operations, its fewest bytes, and the time they take.

Bytes are inputs once and outputs once. Operations are those of matrix products, two for each
product and sum, or of everything else where there is no product. The larger of the two times is
the floor that a measurement is held against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BYTES_OF = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True)
class Device:
    """Ceilings of one GPU."""

    name: str
    flops: dict[str, float]  # a second, by the type of the operands
    bandwidth: float  # bytes a second, of a copy
    multiprocessors: int


H200 = Device(
    "H200",
    {"bfloat16": 790e12, "float16": 790e12, "tf32": 400e12, "float32": 67e12},
    4.3e12,
    132,
)


@dataclass(frozen=True)
class Cost:
    flops: float
    nbytes: float

    def times(self, dtype: str, device: Device = H200) -> tuple[float, float]:
        """Seconds of the operations and of the bytes."""
        return self.flops / device.flops[dtype], self.nbytes / device.bandwidth

    def floor(self, dtype: str, device: Device = H200) -> float:
        return max(self.times(dtype, device))

    def bound(self, dtype: str, device: Device = H200) -> str:
        """What sets the floor."""
        of_flops, of_bytes = self.times(dtype, device)
        return "operations" if of_flops > of_bytes else "bytes"


def waves(programs: int, resident: int, device: Device = H200) -> float:
    """How often all multiprocessors fill up with ``resident`` programs each."""
    return programs / (device.multiprocessors * max(1, resident))


def last_wave_share(programs: int, resident: int, device: Device = H200) -> float:
    """How much of the time's programs there are, where each wave takes as long as a full one."""
    count = waves(programs, resident, device)
    return count / math.ceil(count) if count else 1.0


# ---- the ops ------------------------------------------------------------------------------------


def attention(b: int, h: int, n: int, d: int, dtype: str, topk: int | None = None) -> Cost:
    """Forward. With ``topk`` a bit a score is saved where not all are kept; and a float a row."""
    size = BYTES_OF[dtype]
    bits = n * math.ceil(n / 8) if topk is not None and topk < n else 0
    return Cost(4.0 * b * h * n * n * d, b * h * (4 * n * d * size + bits + 4 * n))


def attention_gradients(
    b: int, h: int, n: int, d: int, dtype: str, bits: bool, again: bool
) -> Cost:
    """Five products; a sixth and seventh, scores and dP ``again``, where no Δ was to be had."""
    size = BYTES_OF[dtype]
    products = 7 if again else 5
    of_bits = n * math.ceil(n / 8) if bits else 0
    return Cost(2.0 * products * b * h * n * n * d, b * h * (8 * n * d * size + of_bits + 4 * n))


def conv2d(b: int, c: int, size: int, o: int, k: int, s: int, p: int, g: int, dtype: str) -> Cost:
    """Forward, and each gradient: the same products and the same three tensors."""
    after = (size + 2 * p - k) // s + 1
    elements = b * c * size * size + b * o * after * after + o * (c // g) * k * k
    return Cost(2.0 * b * o * after * after * (c // g) * k * k, elements * BYTES_OF[dtype])


def patch_embed(
    b: int, c: int, size: int, dim: int, patch: int, dtype: str, pixel: str | None = None
) -> Cost:
    """Forward, and the image's or the weight's gradient; ``pixel`` is the image's own type."""
    tokens, of_patch = b * (size // patch) ** 2, c * patch * patch
    of_image = b * c * size * size * BYTES_OF[pixel or dtype]
    return Cost(
        2.0 * tokens * dim * of_patch, of_image + (tokens + of_patch) * dim * BYTES_OF[dtype]
    )


def linear(rows: int, inputs: int, outputs: int, dtype: str) -> Cost:
    """Forward, and each gradient."""
    elements = rows * inputs + rows * outputs + inputs * outputs
    return Cost(2.0 * rows * inputs * outputs, elements * BYTES_OF[dtype])


def elementwise(elements: float, tensors: int, dtype: str, operations: int = 10) -> Cost:
    """``tensors`` read or written once, and about so many operations an element."""
    return Cost(float(operations * elements), elements * tensors * BYTES_OF[dtype])
