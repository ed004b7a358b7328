"""Attention with exactly k keys a query on a GPU.

A program has a block of queries. Where a block's scores with all keys fit its registers, they are
made once, cut (select.py), and multiplied with the values.
Beyond, key tiles stream by: one pass finds where to look for each row's k-th largest score, mostly
one more finds it (attention_stream.py), and the last pass multiplies. Products are dense, with the
weights of dropped keys at zero: tensor cores finish them sooner than gathers could be issued.

What a row keeps is saved as one bit a key, with its largest score and sum of exponentials; the
backward passes read those bits and never compare scores with a threshold again.
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import tuning
from pyvit.kernels.attention_stream import (
    LISTED,
    kth_of_stream,
    largest_of_groups,
    last_of_streamed_ties,
    ranks_of_probes,
)
from pyvit.kernels.attention_tiles import (
    kept_keys,
    marked_weights,
    rows_from,
    scores_of_keys,
    store_bits,
    stored_bits,
)
from pyvit.kernels.select import last_of_ties, narrowed, order_keys, score_of

# ---- launch policy ------------------------------------------------------------------------------


def forward_configuration(
    keys: int, dim: int, kind: str, penalty: bool, capability: int
) -> dict[str, int]:
    """Tile sizes, the terms of a score that are summed at once, and warps.

    BLOCK_N covers all keys where scores are resident. A warp has 16 rows of scores, since the
    weights become an operand of the next product where they are: at 256 keys that is 128 registers
    of a thread, the most that leaves room for the rest.
    """
    columns, width = (triton.next_power_of_2(max(size, 16)) for size in (keys, dim))
    if kind == "ieee":  # products by fused multiply-adds: small tiles, a few terms at a time
        small = 32 if width <= 64 else 16
        rows = 32 if width <= 128 else 16
        return _tile(rows, small, 16, num_warps=4, num_stages=1)
    if kind == "tf32":
        return _tile(128, 32, 32)
    if width <= 64 and columns <= (256 if capability >= 90 and not penalty else 128):
        return _tile(64, max(columns, 32), width, num_warps=4, num_stages=1)
    if width > 128:
        return _tile(64, 32, 32)
    if capability >= 90:
        return _tile(128, 64 if width <= 64 else 32, width)
    return _tile(128 if width > 32 else 64, 32, width if width <= 64 else 32)


def _tile(
    rows: int, keys: int, chunk: int, num_warps: int = 8, num_stages: int = 2
) -> dict[str, int]:
    warps = {"num_warps": num_warps, "num_stages": num_stages}
    return {"BLOCK_M": rows, "BLOCK_N": keys, "CHUNK": chunk} | warps


# ---- the launches -------------------------------------------------------------------------------


def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk: int, scale: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``pyvit::topk_attention`` for CUDA tensors: (out, selection, softmax).

    ``selection`` is uint8 ``[B, H, Nq, ceil(Nk / 8)]``, bit j % 8 of byte j // 8 for key j, and
    has no columns where every key is kept; ``softmax`` is float32 ``[B, H, Nq, 2]``: the largest
    score, and the sum of exponentials of the scores less that. Neither has columns unless ``save``.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    columns = (keys + 7) // 8 if topk < keys else 0
    selection = q.new_empty((batch, heads, queries, columns), dtype=torch.uint8)
    softmax = q.new_empty((batch, heads, queries, 2 if save else 0), dtype=torch.float32)
    out = _launch_forward(
        *(q, k, v, topk, scale, selection, softmax, None, None),
        saves_bits=topk < keys,  # read again where values are not finite, if not in a backward
        selects=topk < keys,
    )
    return out, selection if save else selection[..., :0], softmax


def attention_with_penalty(
    q: Tensor, k: Tensor, v: Tensor, topk: int, scale: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``pyvit::attention_with_penalty`` for CUDA tensors: (out, tail energy, Hoyer, selection)."""
    rows, keys = q.shape[:3], k.shape[2]
    tail_energy = q.new_empty(rows, dtype=torch.float32)
    hoyer = q.new_empty(rows, dtype=torch.float32)
    selection = q.new_empty((*rows, (keys + 7) // 8 if save else 0), dtype=torch.uint8)
    out = _launch_forward(
        *(q, k, v, topk, scale, selection, None, tail_energy, hoyer),
        saves_bits=save,
        selects=topk < keys,
    )
    return out, tail_energy, hoyer, selection


def _launch_forward(
    q, k, v, topk, scale, selection, softmax, tail_energy, hoyer, *, saves_bits, selects
) -> Tensor:
    batch, heads, queries, dim = q.shape
    keys, value_dim = k.shape[2], v.shape[3]
    out = q.new_empty((batch, queries, heads, value_dim)).transpose(1, 2)
    if out.numel() == 0:
        return out
    tf32 = tuning.allows_tf32("matmul")
    kind = tuning.product_kind(q, tf32)
    wide, penalty = max(dim, value_dim), tail_energy is not None
    configuration = forward_configuration(keys, wide, kind, penalty, tuning.capability(q))
    if configuration["BLOCK_N"] < keys:  # where scores are resident, sizes leave no choice
        way = "penalty" if penalty else "topk"
        name = f"attention {way} {kind} D<={triton.next_power_of_2(wide)}"
        configuration = tuning.chosen(q, name, configuration)
    resident = configuration["BLOCK_N"] >= keys
    topk = min(topk, keys)
    # Where the k-th largest of normally distributed scores would be, in deviations from the mean.
    place = statistics.NormalDist().inv_cdf(1 - (topk - 0.5) / keys) if selects else 0.0
    grid = (batch * heads * triton.cdiv(queries, configuration["BLOCK_M"]),)
    groups = 2 * configuration["BLOCK_N"]
    candidates = out  # any pointer does where nothing is written
    if selects and not resident:
        room = (grid[0] * configuration["BLOCK_M"], LISTED.value)  # 512 bytes a query
        candidates = q.new_empty(room, dtype=torch.float32)
    saves_softmax = softmax is not None and softmax.shape[-1] > 0
    # Offsets within a tile are counted in 32 bits (64 would take registers from the scores).
    farthest = (1 << 31) // max(configuration["BLOCK_M"], configuration["BLOCK_N"])
    q, k, v = (x.contiguous() if x.stride(2) >= farthest else x for x in (q, k, v))
    _forward_kernel[grid](
        *(q, k, v, out, selection if saves_bits else out, softmax if saves_softmax else out),
        *((tail_energy, hoyer) if penalty else (out, out)),
        candidates,
        *(heads, queries, keys, dim, value_dim, topk, place, keys.bit_length()),
        *(*ranks_of_probes(topk, keys, groups), scale),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        WIDTH=triton.next_power_of_2(max(dim, 16)),
        VALUE_WIDTH=triton.next_power_of_2(max(value_dim, 16)),
        GROUPS=groups,
        RESIDENT=resident,
        SELECTS=selects,
        BITS=saves_bits,
        SOFTMAX=saves_softmax,
        PENALTY=penalty,
        PRECISION="tf32" if tf32 else "ieee",
        **configuration,
    )
    return out


# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def _with_extremes(
    q, k, v, selection, row, m, first_row, there, top, of_row,
    queries, keys, dim, value_dim, scale, q_n, k_n, v_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums anew where values are not finite: 0 · inf is NaN, and must reach no row that
    dropped the key. Which were kept is read from the bits; what is inf or NaN among the values is
    added to those rows alone, key by key."""
    n, e = tl.arange(0, N), tl.arange(0, VALUE_WIDTH)
    rows = rows_from(q, first_row, m, q_n, queries, dim, WIDTH)
    result = tl.zeros([M, VALUE_WIDTH], tl.float32)
    for start in range(0, keys, N):
        scores = scores_of_keys(
            rows, q, first_row, m, q_n, queries, k, start, n, k_n, keys, dim, scale,
            WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
        kept = stored_bits(selection, row, keys, of_row, there, start + n)
        weights = tl.where(kept, tl.exp(scores - top[:, None]), 0.0)
        values = rows_from(v, start, n, v_n, keys, value_dim, VALUE_WIDTH)
        wide = values.to(tl.float32)
        finite = tl.abs(wide) < float("inf")
        cleaned = tl.where(finite, wide, 0.0).to(values.dtype)
        result = tl.dot(weights.to(values.dtype), cleaned, result, input_precision=PRECISION)
        strange = tl.max((~finite).to(tl.int32), 1)
        key = -1
        for _ in range(tl.sum(strange)):
            key = tl.min(tl.where((strange != 0) & (n > key), n, N))
            has = tl.max((kept & (n[None, :] == key)).to(tl.int32), 1) != 0
            at = tl.cast(start + key, tl.int64) * v_n + e
            value = tl.load(v + at, e < value_dim, other=0.0).to(tl.float32)
            value = tl.where(tl.abs(value) < float("inf"), 0.0, value)
            result = tl.where(has[:, None], result + value[None, :], result)
    return result


@triton.jit
def _forward_kernel(
    q, k, v, out, selection, softmax, tail_energy, hoyer, candidates,
    heads, queries, keys, dim, value_dim, topk, place, halvings, rank_low, rank_high, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, GROUPS: tl.constexpr, RESIDENT: tl.constexpr,
    SELECTS: tl.constexpr, BITS: tl.constexpr, SOFTMAX: tl.constexpr, PENALTY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first_row = program % blocks * BLOCK_M
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = first_row + m < queries
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    rows = rows_from(q, first_row, m, q_n, queries, dim, WIDTH)

    # The range of each row, its mean and deviation. Scores past the last key are 0: sums need no
    # mask, and the least score may be taken for less than it is.
    if RESIDENT:
        # The values are fetched now, while there are registers to fetch them through.
        values = rows_from(v, 0, n, v_n, keys, value_dim, VALUE_WIDTH)
        scores = scores_of_keys(
            rows, q, first_row, m, q_n, queries, k, 0, n, k_n, keys, dim, scale,
            WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
        squares = tl.sum(scores * scores, 1)
        total = tl.sum(scores, 1)
        bottom = tl.min(scores, 1)
        scores = tl.where(n[None, :] < keys, scores, float("-inf"))
        top = tl.max(scores, 1)
        strange = total != total  # a score is NaN, or some are inf and some -inf
    else:
        groups, bottom = largest_of_groups(
            rows, q, first_row, m, q_n, queries, k, k_n, keys, dim, scale,
            WIDTH, CHUNK, GROUPS, PRECISION,
        )  # fmt: skip
        top = tl.max(groups, 1)
        strange = tl.max((groups != groups).to(tl.int32), 1) != 0  # such a row becomes NaN

    threshold = bottom
    last = tl.zeros([BLOCK_M], tl.int32) + (keys - 1)
    if SELECTS:
        if RESIDENT:
            mean = total / keys
            guess = mean + place * tl.sqrt(tl.maximum(squares / keys - mean * mean, 0.0))
            high = order_keys(top) + 1
            # A row with NaN is not searched, nor are rows past the last.
            low = tl.where(strange | ~there, high - 1, order_keys(bottom))
            none = tl.zeros([BLOCK_M], tl.int32)
            low, count_low, count_high = narrowed(
                scores, low, high, none + keys, none, none + topk, 0, guess, 0
            )
        else:
            STEP: tl.constexpr = min(BLOCK_N, 32)  # fewer at a time: lists take registers
            low, count_low, count_high = kth_of_stream(
                rows, q, first_row, m, q_n, queries, k, k_n, keys, dim, scale, strange | ~there,
                groups, bottom, top, topk, rank_low, rank_high,
                candidates + tl.cast(program, tl.int64) * (BLOCK_M * LISTED),
                WIDTH, CHUNK, STEP, GROUPS, PRECISION,
            )  # fmt: skip
        # Of the keys at `low` the first ones, up to `last`: as many as are needed.
        threshold = score_of(low)
        ties = topk - count_high
        crowded = (count_low > topk) & there & ~strange
        any_crowded = tl.max(crowded.to(tl.int32))
        if RESIDENT:
            rounds = tl.where(any_crowded != 0, halvings, 0)
            last = last_of_ties(scores, threshold, ties, crowded, n, last, rounds)
            if not PENALTY:  # noqa: SIM102 (decided at compile time)
                if rounds > 0:  # what is not among them goes now: one comparison less for others
                    dropped = (scores == threshold[:, None]) & (n[None, :] > last[:, None])
                    scores = tl.where(dropped, float("nan"), scores)
        else:
            if any_crowded != 0:
                last = last_of_streamed_ties(
                    rows, q, first_row, m, q_n, queries, k, k_n, keys, dim, scale,
                    threshold, ties, crowded,
                    WIDTH, CHUNK, STEP, PRECISION,
                )  # fmt: skip

    # Weights, their squares, and those of the tail, before the division by `sums`.
    row = head.to(tl.int64) * queries + first_row + m
    of_row = (keys + 7) // 8
    sums = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    tails = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
    if RESIDENT:
        if SELECTS and not PENALTY:
            marked = marked_weights(scores, top, scores >= threshold[:, None])
        else:
            marked = marked_weights(scores, top, kept_keys(scores, threshold, last, n, SELECTS))
        if BITS:
            store_bits(selection, row, 0, of_row, there, marked, BLOCK_M, BLOCK_N)
            tl.debug_barrier()  # first the bits, then the weights: both at once do not fit
        weights = tl.maximum(marked, 0.0)
        if PENALTY:
            weights = tl.abs(marked)
            squares = tl.sum(marked * marked, 1)
            tail = tl.minimum(marked, 0.0)
            tails = tl.sum(tail * tail, 1)
        sums = tl.sum(weights, 1)
        result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
    else:
        for start in range(0, keys, BLOCK_N):
            scores = scores_of_keys(
                rows, q, first_row, m, q_n, queries, k, start, n, k_n, keys, dim, scale,
                WIDTH, CHUNK, PRECISION,
            )  # fmt: skip
            scores = tl.where(n[None, :] < keys - start, scores, float("-inf"))
            marked = marked_weights(
                scores, top, kept_keys(scores, threshold, last, start + n, SELECTS)
            )
            if BITS:
                store_bits(selection, row, start, of_row, there, marked, BLOCK_M, BLOCK_N)
            weights = tl.maximum(marked, 0.0)
            if PENALTY:
                weights = tl.abs(marked)
                squares += tl.sum(marked * marked, 1)
                tail = tl.minimum(marked, 0.0)
                tails += tl.sum(tail * tail, 1)
            sums += tl.sum(weights, 1)
            values = rows_from(v, start, n, v_n, keys, value_dim, VALUE_WIDTH)
            result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)

    if SELECTS and not PENALTY:
        spoilt = tl.max(tl.max((result != result).to(tl.int32), 1))
        if spoilt != 0:  # it is 1, but the compiler, not knowing it, makes addresses anew
            tl.debug_barrier()  # the bits of this program's other threads
            result = _with_extremes(
                q, k, v, selection, row, m * spoilt, first_row, there, top, of_row,
                queries, keys, dim, value_dim, scale, q_n, k_n, v_n,
                WIDTH, VALUE_WIDTH, CHUNK, BLOCK_M, min(BLOCK_N, 32), PRECISION,
            )  # fmt: skip

    # Whatever NaN the comparisons lost comes back.
    sums = tl.where(strange, float("nan"), sums)
    e = tl.arange(0, VALUE_WIDTH)
    out += b * out_b + h * out_h + first_row.to(tl.int64) * out_n
    inside = there[:, None] & (e[None, :] < value_dim)
    result = (result / sums[:, None]).to(out.dtype.element_ty)
    tl.store(out + m[:, None] * out_n + e[None, :], result, inside)
    if SOFTMAX:
        tl.store(softmax + 2 * row, top, there)
        tl.store(softmax + 2 * row + 1, sums, there)
    if PENALTY:
        root = tl.sqrt(tl.cast(keys, tl.float32))
        spread = (root - sums / tl.sqrt(squares)) / (root - 1.0)
        tl.store(tail_energy + row, tails / (sums * sums), there)
        tl.store(hoyer + row, tl.where(keys > 1, spread, sums / sums), there)
