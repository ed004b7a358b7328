"""The L1 step and projection on a GPU.

Method. Each image has one program, which walks over it until both thresholds are found: the
smallest score that moves, eight bits of its pattern in a pass, by counting; and the λ at which

    f(λ) = Σ_i min(max(|w_i| - λ, 0), room_i)

is eps, by Newton's method inside a bracket (csrc/cpu/projected_step_l1.cpp says more).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyvit.kernels.projected_step_pieces import clamp, of_image, read, rounded

TILE = 2048  # elements that a program has in registers at once
WARPS = 16  # there is one program an image: the more, the better


def launch(batch: int, *arguments, **options) -> None:
    """Arguments and options as the kernel has them."""
    _l1_kernel[(batch,)](*arguments, TILE=TILE, **(options | {"num_warps": WARPS}))


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def _score(x, d, lo, hi):
    """|d|, and 0 where a bound forbids the move."""
    up, down = tl.where(x >= hi, 0.0, d), tl.where(x <= lo, 0.0, -d)
    return tl.where(d > 0, up, tl.where(d < 0, down, 0.0))


@triton.jit
def _deltas(
    x, direction, x0, at, mask, sign, step, smallest, tied, ties, seen, lo, hi, RAW: tl.constexpr
):
    """x + step - x0 of one tile, and how many ties have been seen after it."""
    value, centre = read(x, at, mask), read(x0, at, mask)
    d = read(direction, at, mask) * sign
    if RAW:
        return value + step * d - centre, seen
    score = _score(value, d, lo, hi)
    is_tied = ((score == tied) & mask).to(tl.int32)
    rank = seen + tl.cumsum(is_tied, 0)
    moves = (score >= smallest) | ((is_tied != 0) & (rank <= ties))
    along = tl.where(d < 0, -step, step)
    return value + tl.where(moves, along, 0.0) - centre, seen + tl.sum(is_tied)


@triton.jit
def _l1_kernel(
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
    wanted,
    TILE: tl.constexpr,
    RAW: tl.constexpr,
    TARGETED: tl.constexpr,
    STEPS: tl.constexpr,
    EPSILONS: tl.constexpr,
):
    image = tl.program_id(0)
    base = image.to(tl.int64) * elements
    step = of_image(step_size, step_sizes, image, STEPS)
    radius = of_image(eps, eps_of_image, image, EPSILONS).to(tl.float64)
    lowest, highest = rounded(lo, x), rounded(hi, x)
    sign = 1.0
    if TARGETED:
        sign = -1.0
    infinity = float("inf")
    within = tl.arange(0, TILE)

    # The pixels that move: those whose score is at least `smallest`, and the first `ties` of those
    # whose score is `tied`.
    not_finite = tl.zeros([TILE], tl.int32)
    if RAW:
        smallest, tied, ties = infinity, infinity, 0
    else:
        digits = tl.arange(0, 256)
        known, left, count, shift = 0, wanted, 0, 24
        while shift >= 0:  # eight bits at a time; `known` are those found before
            counts = tl.zeros([256], tl.int32)
            for start in range(0, elements, TILE):
                at, mask = base + start + within, start + within < elements
                d = read(direction, at, mask) * sign
                not_finite |= (~(tl.abs(d) < infinity)).to(tl.int32)
                score = _score(read(x, at, mask), d, lowest, highest)
                bits = score.to(tl.int32, bitcast=True).to(tl.int64) >> shift
                counts += tl.histogram((bits & 255).to(tl.int32), 256, mask & (bits >> 8 == known))
            at_least = tl.cumsum(counts, 0, reverse=True)
            digit = tl.max(tl.where(at_least >= left, digits, 0))
            count = tl.sum(tl.where(digits == digit, counts, 0))
            left -= tl.sum(tl.where(digits > digit, counts, 0))
            known = known * 256 + digit
            shift -= 8
        # `known` is the k-th largest score, and `left` of the `count` pixels that have it are kept.
        whole = (known == 0) | (left == count)
        next_up = tl.where(whole, tl.maximum(known, 1), known + 1)
        smallest = next_up.to(tl.float32, bitcast=True)
        tied = tl.where(whole, infinity, known.to(tl.float32, bitcast=True))
        ties = tl.where(whole, 0, left)
        moving = tl.where(known == 0, wanted - left, wanted)
        step = tl.div_rn(step, tl.maximum(moving, 1).to(tl.float32))

    largest, seen = tl.zeros([TILE], tl.float32), tl.zeros([], tl.int32)
    for start in range(0, elements, TILE):
        at, mask = base + start + within, start + within < elements
        delta, seen = _deltas(
            *(x, direction, x0, at, mask, sign, step, smallest, tied, ties, seen),
            *(lowest, highest, RAW),
        )
        size = tl.abs(delta)
        not_finite |= (~(size < infinity)).to(tl.int32)
        largest = tl.maximum(largest, size)
    finite = tl.max(not_finite) == 0

    low, high, shrink = 0.0, tl.max(largest), 0.0  # f(low) > eps >= f(high)
    round = 0
    searching = finite & (radius < infinity)
    while searching:
        sliding = tl.zeros([TILE], tl.float64)
        full = tl.zeros([TILE], tl.float64)
        number = tl.zeros([TILE], tl.int32)
        seen = 0
        for start in range(0, elements, TILE):
            at, mask = base + start + within, start + within < elements
            delta, seen = _deltas(
                *(x, direction, x0, at, mask, sign, step, smallest, tied, ties, seen),
                *(lowest, highest, RAW),
            )
            centre = read(x0, at, mask)
            size = tl.abs(delta)
            room = tl.where(delta > 0, highest - centre, centre - lowest)
            slides = (size > shrink) & (size - shrink < room) & mask
            sliding += tl.where(slides, size, 0.0)
            number += slides.to(tl.int32)
            capped = mask & ~(size - shrink < room)
            full += tl.where(capped & (room > 0), room, 0.0)
        n = tl.sum(number).to(tl.float64)
        total = tl.sum(sliding) + tl.sum(full)
        inside = total - n * shrink <= radius
        high, low = tl.where(inside, shrink, high), tl.where(inside, low, shrink)
        newton = ((total - radius) / n).to(tl.float32)
        found = (inside & (shrink == 0)) | (newton == shrink)
        astray = ~((low < newton) & (newton < high)) | (round % 8 == 7)
        step_to = tl.where(astray, low + (high - low) / 2, newton)
        stuck = ~((low < step_to) & (step_to < high))  # neighbouring numbers: stay in the ball
        shrink = tl.where(found, shrink, tl.where(stuck, high, step_to))
        round += 1
        searching = ~(found | stuck)

    seen = 0
    for start in range(0, elements, TILE):
        at, mask = base + start + within, start + within < elements
        delta, seen = _deltas(
            *(x, direction, x0, at, mask, sign, step, smallest, tied, ties, seen),
            *(lowest, highest, RAW),
        )
        kept = tl.maximum(tl.abs(delta) - shrink, 0.0)
        y = clamp(read(x0, at, mask) + tl.where(delta < 0, -kept, kept), lowest, highest)
        tl.store(out + at, tl.where(finite, y, float("nan")).to(out.dtype.element_ty), mask)
