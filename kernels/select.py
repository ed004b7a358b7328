"""Exact top-k of rows of scores: the threshold by counting, ties by the lowest index.

Scores are compared as integers of the same order, so that a bracket around the k-th largest can
always be halved and ends after at most 32 rounds. It starts at the place where that of a normal
distribution would be, and goes on by interpolation: counts fall about exponentially in the
tail, so the logarithms of two counts tell where a third one will be. Few rounds are needed then.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_keys(scores):
    """Integers ordered as the scores are; -0 and 0 are equal."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(keys):
    bits = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def next_probe(low, high, count_low, count_high, topk, guess, round):
    """A key inside the bracket: count(keys >= low) is at least topk, count(keys >= high) less."""
    at_low, at_high = tl.log(count_low + 0.5), tl.log(count_high + 0.5)
    share = (at_low - tl.log(topk.to(tl.float32))) / (at_low - at_high)
    bottom, top = score_of(low), score_of(high)
    between = order_keys(tl.where(round == 0, guess, bottom + (top - bottom) * share))
    halved = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
    return tl.where(round % 4 == 3, halved, tl.minimum(tl.maximum(between, low + 1), high - 1))


@triton.jit
def probes_around(low, high, count_low, count_high, topk, MARGIN: tl.constexpr, round):
    """Two keys in the bracket, of about MARGIN more and MARGIN fewer scores than topk."""
    at_low, at_high = tl.log(count_low + 0.5), tl.log(count_high + 0.5)
    bottom, top = score_of(low), score_of(high)
    fewer = tl.maximum((topk - MARGIN).to(tl.float32), 0.5)
    of_more = (at_low - tl.log((topk + MARGIN).to(tl.float32))) / (at_low - at_high)
    of_fewer = (at_low - tl.log(fewer)) / (at_low - at_high)
    a = order_keys(bottom + (top - bottom) * of_more)
    b = order_keys(bottom + (top - bottom) * of_fewer)
    a = tl.where(topk + MARGIN >= count_low, low, a)
    b = tl.where(topk - MARGIN <= count_high, high, b)
    halved = (low & high) + ((low ^ high) >> 1)
    halves = round % 3 == 2
    return (
        tl.where(halves, halved, a),
        tl.where(halves, (halved & high) + ((halved ^ high) >> 1), b),
    )


@triton.jit
def is_open(low, high, count_low, topk, slack):
    """Whether a row's bracket must go on narrowing: more than ``slack`` too many lie above it."""
    return (count_low - topk > slack) & (high - 1 > low)


@triton.jit
def reaching(values, limit):
    """How many of each row's values, [rows, N] or [tiles, rows, N], are at least ``limit``."""
    if len(values.shape) == 3:
        return tl.sum(tl.sum((values >= limit[None, :, None]).to(tl.int32), 2), 0)
    else:
        return tl.sum((values >= limit[:, None]).to(tl.int32), 1)


@triton.jit
def narrowed(values, low, high, count_low, count_high, topk, slack, guess, round):
    """The bracket of the k-th largest of each row of ``values``, until it holds that one alone, or
    at least topk lie above its lower end and at most ``slack`` more.

    What lies above the bracket need not be among the values.
    """
    above = count_high
    round = tl.cast(round, tl.int32)  # no constant: it grows
    searching = tl.max(is_open(low, high, count_low, topk, slack).to(tl.int32))
    while searching != 0:
        open = is_open(low, high, count_low, topk, slack)
        probe = next_probe(low, high, count_low, count_high, topk, guess, round)
        count = above + reaching(values, score_of(probe))
        enough = count >= topk
        low = tl.where(open & enough, probe, low)
        count_low = tl.where(open & enough, count, count_low)
        high = tl.where(open & ~enough, probe, high)
        count_high = tl.where(open & ~enough, count, count_high)
        round += 1
        searching = tl.max(is_open(low, high, count_low, topk, slack).to(tl.int32))
    return low, count_low, count_high


@triton.jit
def last_of_ties(scores, threshold, ties, crowded, n, last, rounds):
    """The key up to which as many as ``ties`` of a row equal its threshold, where crowded."""
    first = tl.where(crowded, -1, last - 1)  # too few up to here
    for _ in range(rounds):
        middle = (first + last + 1) >> 1
        # Not two comparisons: one of them would be kept through the loop.
        until = tl.where(n[None, :] <= middle[:, None], scores, float("nan"))
        tied = until == threshold[:, None]
        enough = tl.sum(tied.to(tl.int32), 1) >= ties
        last = tl.where(enough, middle, last)
        first = tl.where(enough, first, middle)
    return last
