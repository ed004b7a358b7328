"""The k-th largest of rows of scores that stream by, for more keys than registers hold.

A pass over the keys makes all of a block's scores, so what counts is how few passes there are.
The first one keeps the largest score of each of GROUPS groups of keys. If keys fall into groups as
if by chance, so many of the largest scores are alone in a group that the maxima tell where a rank
is, whatever the scores' distribution: two probes around rank k come from there. The next pass
counts the scores above each probe and lists those between them. Mostly the k-th largest is in the
list, for every row of the block, and is found there in registers; else the bracket has narrowed,
and the next probes come from interpolation, or in the end from halving.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyvit.kernels.attention_tiles import scores_of_keys
from pyvit.kernels.select import is_open, narrowed, order_keys, probes_around, score_of

LISTED = tl.constexpr(128)  # scores of a row that can be listed
MARGIN = tl.constexpr(42)  # ranks by which probes should miss the wanted one, on either side


def ranks_of_probes(topk: int, keys: int, groups: int) -> tuple[float, float]:
    """Which of the groups' maxima are about MARGIN ranks below and above the k-th largest score.

    With a share p of the scores above a threshold, a group of n keys has none of them with a
    probability of (1 - p)^n. Above the largest, or below the least: 0, and more than there are.
    """
    fewer, more = max(topk - MARGIN.value, 0), topk + MARGIN.value
    low = _rank(more, keys, groups) if more < keys else groups + 1.0
    return low, _rank(fewer, keys, groups)


def _rank(count: int, keys: int, groups: int) -> float:
    return float(round(groups * (1 - (1 - count / keys) ** (keys / groups))))


@triton.jit
def largest_of_groups(
    rows, q, first_row, m, q_n, queries, k, k_n, keys, dim, scale,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of keys that are GROUPS apart, NaN where a score is; and a lower bound of a row's scores."""
    n = tl.arange(0, GROUPS)
    groups = tl.full([m.shape[0], GROUPS], float("-inf"), tl.float32)
    bottom = tl.full([m.shape[0]], float("inf"), tl.float32)
    for start in range(0, keys, GROUPS):
        scores = scores_of_keys(
            rows, q, first_row, m, q_n, queries, k, start, n, k_n, keys, dim, scale,
            WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
        bottom = tl.minimum(bottom, tl.min(scores, 1))
        scores = tl.where(n[None, :] < keys - start, scores, float("-inf"))
        groups = tl.maximum(groups, scores, propagate_nan=tl.PropagateNan.ALL)
    return groups, bottom


@triton.jit
def key_of_rank(groups, low, high, rank, GROUPS: tl.constexpr):
    """A key inside the bracket that about ``rank`` groups reach."""
    none = tl.zeros_like(low)
    wanted = none + tl.cast(rank, tl.int32)
    return narrowed(groups, low, high, none + GROUPS, none, wanted, 2, low.to(tl.float32), 1)[0]


@triton.jit
def places_before(chosen, TYPE: tl.constexpr):
    """How many of a row are chosen before each. As a product: a scan costs more moves between
    threads than there are scores."""
    N: tl.constexpr = chosen.shape[1]
    if TYPE.primitive_bitwidth == 32:
        counted = chosen.to(tl.int32)
        return tl.cumsum(counted, 1) - counted
    else:
        n = tl.arange(0, N)
        earlier = tl.where(n[:, None] < n[None, :], 1.0, 0.0).to(TYPE)
        return tl.dot(tl.where(chosen, 1.0, 0.0).to(TYPE), earlier).to(tl.int32)


@triton.jit
def kth_of_stream(
    rows, q, first_row, m, q_n, queries, k, k_n, keys, dim, scale, skipped,
    groups, bottom, top, topk, rank_low, rank_high, candidates,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Key of the k-th largest score of each row, how many are at or above it, how many above.

    Of rows that are ``skipped``, since they have NaN or are past the last, nothing that is so.
    ``candidates`` is room for [rows of the block, LISTED] numbers.
    """
    n = tl.arange(0, STEP)
    none = tl.zeros_like(m)
    wanted = none + topk
    high = order_keys(top) + 1
    low = tl.where(skipped, high - 1, order_keys(bottom))
    count_low, count_high = none + keys, none
    # A row with NaN is not searched, nor are rows past the last.
    a, b = low, high
    if rank_low <= GROUPS:
        a = key_of_rank(groups, low, high, rank_low, GROUPS)
    if rank_high > 0:
        b = key_of_rank(groups, low, high, rank_high, GROUPS)
    listed = none
    round = 0
    slot = candidates + m[:, None] * LISTED
    searching = tl.max(is_open(low, high, count_low, wanted, 0).to(tl.int32))
    while searching != 0:
        open = is_open(low, high, count_low, wanted, 0) & (listed == 0)
        if round > 0:
            a, b = probes_around(low, high, count_low, count_high, wanted, MARGIN, round)
            fits = count_low - count_high <= LISTED
            a, b = tl.where(fits, low, a), tl.where(fits, high, b)
        a = tl.minimum(tl.maximum(a, low), high - 1)
        b = tl.minimum(tl.maximum(b, a + 1), high)
        # Nothing is listed of rows that are done.
        from_score = tl.where(open, score_of(a), float("nan"))
        to_score = tl.where(open, score_of(b), float("nan"))
        reached, inside = none, none
        for start in range(0, keys, STEP):
            tile = scores_of_keys(
                rows, q, first_row, m, q_n, queries, k, start, n, k_n, keys, dim, scale,
                WIDTH, CHUNK, PRECISION,
            )  # fmt: skip
            tile = tl.where(n[None, :] < keys - start, tile, float("nan"))
            # What is not wanted becomes NaN: no mask is kept beside the scores.
            tile = tl.where(tile >= from_score[:, None], tile, float("nan"))
            reached += tl.sum((tile == tile).to(tl.int32), 1)
            tile = tl.where(tile >= to_score[:, None], float("nan"), tile)
            place = places_before(tile == tile, q.dtype.element_ty)
            place = tl.where(tile == tile, place, LISTED)
            room = LISTED - inside
            tl.store(slot + (inside[:, None] + place), tile, place < room[:, None])
            inside += tl.sum((tile == tile).to(tl.int32), 1)
        above = reached - inside
        fits = open & (above < wanted) & (reached >= wanted) & (inside <= LISTED)
        listed = tl.where(fits, 1, listed)
        # Each probe tells on which side of it the k-th largest is.
        upper, lower = open & (above >= wanted), open & (reached < wanted)
        low = tl.where(upper, b, tl.where(open & ~lower, a, low))
        count_low = tl.where(upper, above, tl.where(open & ~lower, reached, count_low))
        high = tl.where(lower, a, tl.where(open & ~upper, b, high))
        count_high = tl.where(lower, reached, tl.where(open & ~upper, above, count_high))
        round += 1
        left = is_open(low, high, count_low, wanted, 0) & (listed == 0)
        searching = tl.max(left.to(tl.int32))

    tl.debug_barrier()  # what other threads of this program listed
    # Four tiles of 32, whose rows are spread over more threads than those of one.
    i = 32 * tl.arange(0, LISTED // 32)[:, None, None] + tl.arange(0, 32)[None, None, :]
    size = tl.where(listed != 0, count_low - count_high, 0)
    at = candidates + (m[None, :, None] * LISTED + i)
    values = tl.load(at, i < size[None, :, None], other=float("nan"))
    # Where nothing is listed the bracket is closed.
    guess = top  # of no use
    return narrowed(values, low, high, count_low, count_high, wanted, 0, guess, 1)


@triton.jit
def last_of_streamed_ties(
    rows, q, first_row, m, q_n, queries, k, k_n, keys, dim, scale, threshold, ties, crowded,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key up to which as many as ``ties`` of a row equal its threshold, where crowded."""
    n = tl.arange(0, STEP)
    before = tl.zeros_like(m)
    last = tl.zeros_like(m) + (keys - 1)
    last = tl.where(crowded, -1, last)
    for start in range(0, keys, STEP):
        tile = scores_of_keys(
            rows, q, first_row, m, q_n, queries, k, start, n, k_n, keys, dim, scale,
            WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
        tile = tl.where(n[None, :] < keys - start, tile, float("nan"))
        tied = (tile == threshold[:, None]) & crowded[:, None]
        place = before[:, None] + places_before(tied, q.dtype.element_ty)
        found = tl.where(tied & (place < ties[:, None]), start + n[None, :], -1)
        last = tl.maximum(last, tl.max(found, 1))
        before += tl.sum(tied.to(tl.int32), 1)
    return last
