"""One step of a projected-gradient attack on a GPU: momentum, step, projection, bounds.

Method. Every image is cut into chunks of ``CHUNK`` elements, one program each. L-infinity needs
one pass and rounds to the storage type after each operation, as a chain of PyTorch operators
does, so that the results are the same bits. Momentum and L2 need sums over an image first: one
pass leaves a sum for each chunk, in float64, and each program of the next adds up those of its
image, in an order that neither other images nor the schedule change. L2's pass gives both lengths:

    ‖x + a·d - x0‖² = ‖x - x0‖² + 2a·⟨x - x0, d⟩ + a²·‖d‖²

L1 is in projected_step_l1.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import projected_step_l1, tuning
from pyvit.kernels.projected_step_pieces import clamp, of_image, read, rounded

# ---- launch policy ------------------------------------------------------------------------------

CHUNK = 4096  # elements of one program: 32 a thread
WARPS = 4


def configuration() -> dict[str, int]:
    """Of L-infinity. The others keep to it: they add up sums of chunks, and other chunks would
    give other bits."""
    return {"CHUNK": CHUNK, "num_warps": WARPS}


LINF, L2, L1 = range(3)


# ---- the launches -------------------------------------------------------------------------------


def projected_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    norm: int,
    raw: bool,
    targeted: bool,
    step_size: float,
    eps: float,
    step_sizes: Tensor | None,
    eps_of_image: Tensor | None,
    lo: float,
    hi: float,
    quantile: float,
) -> Tensor:
    """``pyvit::projected_step``; arguments as the schema has them."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    like = _walked(out)
    operands = [_in_layout(t, like) for t in (x, grad, x0)]
    lengths = (step_size, eps, step_sizes, eps_of_image, lo, hi)
    result = out if like is out else like
    _launch_step(*operands, result, norm, raw, targeted, lengths, quantile)
    return out if result is out else out.copy_(result)


def projected_step_momentum(
    x: Tensor, grad: Tensor, x0: Tensor, norm: int, raw: bool, targeted: bool, *options
) -> tuple[Tensor, Tensor]:
    """``pyvit::projected_step_momentum``; arguments as the schema has them."""
    *lengths, quantile, momentum, decay = options
    out, after = torch.empty_like(x), torch.empty_like(momentum)
    if out.numel() == 0:
        return out, after
    like = _walked(out)
    x, grad, x0, momentum = (_in_layout(t, like) for t in (x, grad, x0, momentum))
    direction = _momentum(grad, momentum, decay)
    result = torch.empty_like(like)
    _launch_step(x, direction, x0, result, norm, raw, targeted, lengths, quantile)
    in_place = out.stride() == result.stride(), after.stride() == direction.stride()
    return (
        result if in_place[0] else out.copy_(result),
        direction if in_place[1] else after.copy_(direction),
    )


def _walked(out: Tensor) -> Tensor:
    """A dense tensor like ``out`` whose images lie one after another: ``out`` where it does."""
    images = [s for s, n in zip(out.stride()[1:], out.shape[1:]) if n > 1]
    if out.shape[0] <= 1 or not images or out.stride(0) > max(images):
        return out
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _in_layout(value: Tensor, like: Tensor) -> Tensor:
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like).copy_(value)


def _launch_step(x, direction, x0, out, norm, raw, targeted, lengths, quantile) -> None:
    batch, elements = x.shape[0], x.numel() // x.shape[0]
    chunks = triton.cdiv(elements, CHUNK)
    step_size, eps, step_sizes, eps_of_image, lo, hi = lengths
    operands = (x, direction, x0, out)
    # Where there is one number for all images, no tensor is read: any pointer does.
    sizes = (
        step_size,
        eps,
        x if step_sizes is None else step_sizes,
        x if eps_of_image is None else eps_of_image,
        *(lo, hi, elements, chunks),
    )
    options = {
        "RAW": raw,
        "TARGETED": targeted,
        "STEPS": step_sizes is not None,
        "EPSILONS": eps_of_image is not None,
        "num_warps": WARPS,
        **tuning.ROUNDS_EACH,  # a product and a sum round twice, as PyTorch's do
    }
    if norm == LINF:
        name = f"projected_step linf {x.element_size()} bytes"
        tile = tuning.chosen(x, name, configuration())
        chunks = triton.cdiv(elements, tile["CHUNK"])
        _linf_kernel[(batch * chunks,)](*operands, *sizes[:-1], chunks, **(options | tile))
    elif norm == L2:
        sums = torch.empty((batch, 3, chunks), dtype=torch.float64, device=x.device)
        _l2_sums_kernel[(batch * chunks,)](
            *(x, direction, x0, sums, elements, chunks),
            CHUNK=CHUNK,
            num_warps=WARPS,
            **tuning.ROUNDS_EACH,
        )
        _l2_kernel[(batch * chunks,)](
            *operands, sums, *sizes, CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), **options
        )
    else:
        wanted = max(1, math.floor((1 - quantile) * elements + 0.5))
        projected_step_l1.launch(batch, *operands, *sizes, wanted, **options)


def _momentum(grad: Tensor, momentum: Tensor, decay: float) -> Tensor:
    """decay·momentum + grad / mean|grad|."""
    batch, elements = grad.shape[0], grad.numel() // grad.shape[0]
    chunks = triton.cdiv(elements, CHUNK)
    sums = torch.empty((batch, chunks), dtype=torch.float64, device=grad.device)
    after = torch.empty_like(grad)
    grid = (batch * chunks,)
    _abs_sums_kernel[grid](
        *(grad, sums, elements, chunks), CHUNK=CHUNK, num_warps=WARPS, **tuning.ROUNDS_EACH
    )
    _momentum_kernel[grid](
        *(grad, momentum, after, sums, decay, elements, chunks),
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=WARPS,
        **tuning.ROUNDS_EACH,
    )
    return after


# ---- what the kernels share ---------------------------------------------------------------------


@triton.jit
def _place(elements, chunks, CHUNK: tl.constexpr):
    """The image of this program, its chunk, and its elements' offsets with their mask."""
    program = tl.program_id(0)
    image = program // chunks
    e = (program % chunks).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    return image, program % chunks, image.to(tl.int64) * elements + e, e < elements


@triton.jit
def _safe_scale(value):
    """A power of two that keeps a norm or a mean (float64) within float32's range."""
    return tl.where(value > 1e30, 2.0**-60, tl.where(value < 1e-30, 2.0**60, 1.0))


@triton.jit
def _chunk_sums(sums, chunks, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums + c, c < chunks, other=0.0))


# ---- momentum -----------------------------------------------------------------------------------


@triton.jit
def _abs_sums_kernel(grad, sums, elements, chunks, CHUNK: tl.constexpr):
    _, _, at, mask = _place(elements, chunks, CHUNK)
    total = tl.sum(tl.abs(read(grad, at, mask)).to(tl.float64))
    tl.store(sums + tl.program_id(0), total)


@triton.jit
def _momentum_kernel(
    grad, before, after, sums, decay, elements, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    image, _, at, mask = _place(elements, chunks, CHUNK)
    mean = _chunk_sums(sums + image.to(tl.int64) * chunks, chunks, CHUNKS) / elements
    scale = _safe_scale(mean)
    # Zero divides to zero: an image without a gradient adds nothing.
    divisor = tl.where(mean == 0, 1.0, mean * scale).to(tl.float32)
    by_mean = tl.div_rn(read(grad, at, mask) * scale.to(tl.float32), divisor)
    value = by_mean + read(before, at, mask) * decay
    tl.store(after + at, value.to(after.dtype.element_ty), mask)


# ---- L-infinity ---------------------------------------------------------------------------------


@triton.jit
def _linf_kernel(
    x,
    direction,
    x0,
    out,
    step_size,
    eps,
    step_sizes,
    eps_of_image,
    lo,
    hi,
    elements,
    chunks,
    CHUNK: tl.constexpr,
    RAW: tl.constexpr,
    TARGETED: tl.constexpr,
    STEPS: tl.constexpr,
    EPSILONS: tl.constexpr,
):
    image, _, at, mask = _place(elements, chunks, CHUNK)
    step = of_image(step_size, step_sizes, image, STEPS)
    radius = of_image(eps, eps_of_image, image, EPSILONS)
    if TARGETED:
        step = -step
    d = read(direction, at, mask)
    if RAW:
        move = rounded(step * d, x)
    else:  # sign(NaN) is 0
        length = rounded(step, x)
        move = tl.where(d > 0, length, tl.where(d < 0, -length, 0.0))
    moved = rounded(read(x, at, mask) + move, x)
    centre = read(x0, at, mask)
    outer = rounded(radius, x)
    delta = clamp(rounded(moved - centre, x), -outer, outer)
    inside = tl.where(radius < float("inf"), rounded(centre + delta, x), moved)
    lowest, highest = rounded(lo, x), rounded(hi, x)
    tl.store(out + at, clamp(inside, lowest, highest).to(out.dtype.element_ty), mask)


# ---- L2 -----------------------------------------------------------------------------------------


@triton.jit
def _l2_sums_kernel(x, direction, x0, sums, elements, chunks, CHUNK: tl.constexpr):
    image, chunk, at, mask = _place(elements, chunks, CHUNK)
    d = read(direction, at, mask).to(tl.float64)
    delta = (read(x, at, mask) - read(x0, at, mask)).to(tl.float64)
    to = sums + image.to(tl.int64) * 3 * chunks + chunk
    tl.store(to, tl.sum(d * d))
    tl.store(to + chunks, tl.sum(delta * delta))
    tl.store(to + 2 * chunks, tl.sum(delta * d))


@triton.jit
def _l2_kernel(
    x,
    direction,
    x0,
    out,
    sums,
    step_size,
    eps,
    step_sizes,
    eps_of_image,
    lo,
    hi,
    elements,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RAW: tl.constexpr,
    TARGETED: tl.constexpr,
    STEPS: tl.constexpr,
    EPSILONS: tl.constexpr,
):
    image, _, at, mask = _place(elements, chunks, CHUNK)
    step = of_image(step_size, step_sizes, image, STEPS).to(tl.float64)
    radius = of_image(eps, eps_of_image, image, EPSILONS).to(tl.float64)
    if TARGETED:
        step = -step
    here = sums + image.to(tl.int64) * 3 * chunks
    squares = _chunk_sums(here, chunks, CHUNKS)
    deltas = _chunk_sums(here + chunks, chunks, CHUNKS)
    products = _chunk_sums(here + 2 * chunks, chunks, CHUNKS)
    norm = tl.sqrt(squares)
    if RAW:
        norm = norm * 0 + 1
    norm = tl.where(squares == 0, 1.0, norm)
    scale = _safe_scale(norm)
    factor = (step / (norm * scale)).to(tl.float32)
    a = step / norm
    square = deltas + 2 * a * products + a * a * squares
    length = tl.sqrt(tl.where(square < 0, 0.0, square))  # rounding may go below 0; NaN passes
    # A NaN length makes the whole image NaN, and a perturbation of zero needs no shrinking.
    shrink = tl.where(length <= radius, 1.0, radius / length).to(tl.float32)
    move = read(direction, at, mask) * scale.to(tl.float32) * factor
    moved, centre = read(x, at, mask) + move, read(x0, at, mask)
    inside = tl.where(radius < float("inf"), centre + (moved - centre) * shrink, moved)
    lowest, highest = rounded(lo, x), rounded(hi, x)
    tl.store(out + at, clamp(inside, lowest, highest).to(out.dtype.element_ty), mask)
