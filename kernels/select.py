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
def is_open(low, high, count_low, topk):
    """Whether a row's bracket must go on narrowing."""
    return (count_low != topk) & (high - 1 > low)
