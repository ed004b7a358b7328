"""Tiles of attention: rows as matrix products take them, scores, and the saved bits."""

from __future__ import annotations

import triton
import triton.language as tl

# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def rows_from(pointer, start, i, stride, rows, columns, WIDTH: tl.constexpr):
    """Rows start + i of a matrix, [i, WIDTH], zero past the ends."""
    c = tl.arange(0, WIDTH)
    inside = (i[:, None] < rows - start) & (c[None, :] < columns)
    start = tl.cast(start, tl.int64)
    return tl.load(pointer + start * stride + i[:, None] * stride + c[None, :], inside, other=0.0)


@triton.jit
def scores_of_keys(
    rows, q, first_row, m, q_n, queries, k, start, n, k_n, keys, dim, scale,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of queries with the keys start + n; 0 past the last (NaN in a row of inf).

    Where CHUNK is less than WIDTH the products are summed so many at a time, with no use of
    ``rows``, the block's queries: float32 products have no matrix instruction, and as many
    registers as there are terms.
    """
    k += tl.cast(start, tl.int64) * k_n
    there = n[None, :] < keys - start
    if CHUNK == WIDTH:
        c = tl.arange(0, WIDTH)
        at = n[None, :] * k_n + c[:, None]
        tile = tl.load(k + at, there & (c[:, None] < dim), other=0.0)
        scores = tl.dot(rows, tile, input_precision=PRECISION)
    else:
        scores = tl.zeros([m.shape[0], n.shape[0]], tl.float32)
        q += tl.cast(first_row, tl.int64) * q_n
        for part in range(0, dim, CHUNK):
            c = part + tl.arange(0, CHUNK)
            inside = (m[:, None] < queries - first_row) & (c[None, :] < dim)
            some = tl.load(q + m[:, None] * q_n + c[None, :], inside, other=0.0)
            at = n[None, :] * k_n + c[:, None]
            tile = tl.load(k + at, there & (c[:, None] < dim), other=0.0)
            scores = tl.dot(some, tile, scores, input_precision=PRECISION)
    return scores * scale


@triton.jit
def kept_keys(scores, low, last, n, SELECTS: tl.constexpr):
    """Scores above `low`, and those at it up to the key `last`; past the last key none."""
    if SELECTS:
        return (scores > low[:, None]) | ((scores == low[:, None]) & (n[None, :] <= last[:, None]))
    else:
        return tl.broadcast_to(n[None, :] <= last[:, None], scores.shape)


@triton.jit
def store_bits(selection, row, start, of_row, there, marked, M: tl.constexpr, N: tl.constexpr):
    """Eight keys a byte, the first in the lowest bit. Added up as words: fewer sums."""
    kept = marked.to(tl.int32, bitcast=True) >= 0  # a zero has a sign, too
    WORD: tl.constexpr = min(N, 32)
    bits = kept.to(tl.int32).reshape(M, N // WORD, WORD) << tl.arange(0, WORD)[None, None, :]
    bytes = tl.sum(bits, 2)[:, :, None] >> (8 * tl.arange(0, WORD // 8))[None, None, :]
    byte = start // 8 + tl.arange(0, N // 8)[None, :]
    inside = there[:, None] & (byte < of_row)
    at = row[:, None] * of_row + byte
    tl.store(selection + at, bytes.reshape(M, N // 8).to(tl.uint8), inside)


@triton.jit
def stored_bits(selection, row, keys, of_row, there, n):
    """What store_bits left of the keys n."""
    inside = there[:, None] & (n[None, :] < keys)
    byte = tl.load(selection + row[:, None] * of_row + n[None, :] // 8, inside, other=0)
    return ((byte.to(tl.int32) >> (n[None, :] % 8)) & 1) != 0


@triton.jit
def marked_weights(scores, top, kept):
    """Weights before their division by a row's sum; those of dropped keys have a minus sign."""
    weights = tl.abs(tl.exp(scores - top[:, None]))
    return tl.where(kept, weights, -weights)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def rows_at(pointer, stride, i, rows, columns, WIDTH: tl.constexpr):
    """[i, WIDTH], zero past the end."""
    c = tl.arange(0, WIDTH)
    inside = (i[:, None] < rows) & (c[None, :] < columns)
    return tl.load(pointer + i[:, None].to(tl.int64) * stride + c[None, :], inside, other=0.0)


@triton.jit
def columns_at(pointer, stride, i, rows, columns, WIDTH: tl.constexpr):
    """[WIDTH, i], the same transposed."""
    c = tl.arange(0, WIDTH)
    inside = (i[None, :] < rows) & (c[:, None] < columns)
    return tl.load(pointer + i[None, :].to(tl.int64) * stride + c[:, None], inside, other=0.0)


@triton.jit
def products_of_rows(
    tile, left, l_stride, i, lefts, right, r_stride, j, rights, columns,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[i, j]: rows of one matrix with rows of another.

    The first are ``tile`` where CHUNK is WIDTH; else so many terms at a time are summed, of rows
    read anew: float32 products have no matrix instruction, and as many registers as terms.
    """
    if CHUNK == WIDTH:
        turned = columns_at(right, r_stride, j, rights, columns, WIDTH)
        return tl.dot(tile, turned, input_precision=PRECISION)
    else:
        sums = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for start in range(0, columns, CHUNK):
            some = rows_at(left + start, l_stride, i, lefts, columns - start, CHUNK)
            turned = columns_at(right + start, r_stride, j, rights, columns - start, CHUNK)
            sums = tl.dot(some, turned, sums, input_precision=PRECISION)
        return sums


@triton.jit
def chosen_bits(bits, head, first, m, n, queries, keys):
    """Whether query first + m chose key n, where m and n are shaped to give a tile."""
    of_row = (keys + 7) // 8
    bits += (head.to(tl.int64) * queries + first) * of_row
    inside = (m < queries - first) & (n < keys)
    byte = tl.load(bits + (m * of_row + n // 8), inside, other=0).to(tl.int32)
    return inside & ((byte >> (n % 8)) % 2 != 0)
