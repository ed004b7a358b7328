"""Gradients of attention on a GPU: over chosen keys, over all, and of the k-sparse penalty's terms.

With weights w = exp(scale · q k^T − top) / sum, zero where a key was dropped, dP = dO v^T, and a
row's penalty terms as csrc/cpu/attention_backward.cpp has them,

    dW = dP + w · (norm + tail where the key is in the tail)
    dS = scale · w · (dW − Δ),   Δ = Σ w · dW
    dq = dS k    dk = dS^T q    dv = w^T dO

The forward pass over chosen keys saved a row's largest score and its sum of exponentials, and Δ is
dO · out; for the others one pass gives these, Δ and norm. (The logarithm of the sum, added to the
largest score, would be one number instead of two, and rounded where scores are large.) One pass
then gives dq by blocks of queries, and one dk and dv by blocks of keys, so nothing is added to by
two programs. Scores are made again in each, transposed where that is what is needed: no result of
a product is ever turned. Which keys were chosen is read from the saved bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels import tuning
from pyvit.kernels.attention_terms import delta_of_rows, softmax_and_terms
from pyvit.kernels.attention_tiles import chosen_bits, products_of_rows, rows_at

# ---- launch policy ------------------------------------------------------------------------------


def configuration(dim: int, kind: str, by_keys: bool, capability: int) -> dict[str, int]:
    """BLOCK rows whose gradients a program has (``by_keys``: dk and dv), STEP rows of the others
    that it takes at once, and how many terms of a score are summed at once."""
    width = triton.next_power_of_2(max(dim, 16))
    wide = width > 64
    if kind == "ieee":  # products by fused multiply-adds: small tiles, a few terms at a time
        return _configured(32, 16, 16, 8 if wide else 4)
    if kind == "tf32":
        return _configured(32, 16, 32) if wide else _configured(64, 32, 32)
    if width > 128:
        if by_keys and capability < 90:
            return _configured(32, 32, 32, num_warps=8)
        return _configured(64, 16 if by_keys else 32, 64, num_warps=8, num_stages=2)
    if capability >= 90:
        warps = 8 if wide and by_keys else 4
        return _configured(64, 32 if wide or by_keys else 64, width, warps, num_stages=2)
    if wide and by_keys:
        return _configured(64, 16, 32)
    return _configured(64, 32, 32 if by_keys else width, num_stages=2)


def _configured(
    block: int, step: int, chunk: int, num_warps: int = 4, num_stages: int = 1
) -> dict[str, int]:
    warps = {"num_warps": num_warps, "num_stages": num_stages}
    return {"BLOCK": block, "STEP": step, "CHUNK": chunk} | warps


# ---- the launches -------------------------------------------------------------------------------


def _rows_like(value: Tensor, rows: int, columns: int, heads_last: bool) -> Tensor:
    batch, heads = value.shape[:2]
    if heads_last:
        return value.new_empty((batch, rows, heads, columns)).transpose(1, 2)
    return value.new_empty((batch, heads, rows, columns))


def topk_attention_backward(
    grad, out, q, k, v, selection, softmax, topk, keys, scale, heads_last, needs_q, needs_k, needs_v
) -> tuple[Tensor, Tensor, Tensor]:
    """``pyvit::topk_attention_backward`` for CUDA tensors."""
    wants_scores = needs_q or needs_k
    delta = delta_of_rows(grad, out) if wants_scores else softmax
    return _gradients(
        *(grad, q, k, v, (softmax, delta, None, None)),
        *(selection if selection.shape[-1] > 0 else None, None, scale, heads_last),
        *(needs_q, needs_k, needs_v),
        one=topk == 1,
    )


def attention_dense_backward(
    grad, q, k, v, grad_tail, grad_hoyer, selection, scale, heads_last, needs_q, needs_k, needs_v
) -> tuple[Tensor, Tensor, Tensor]:
    """``pyvit::attention_dense_backward`` for CUDA tensors."""
    wants_scores = needs_q or needs_k
    penalty = wants_scores and grad_tail is not None
    softmax, delta, norm = softmax_and_terms(
        *(q, k, v if wants_scores else None, grad),
        *((selection, grad_tail, grad_hoyer) if penalty else (None, None, None)),
        *(scale, _tile(q, max(q.shape[3], v.shape[3]), by_keys=False), _precision()),
    )
    return _gradients(
        *(grad, q, k, v, (softmax, delta, *((norm, grad_tail) if penalty else (None, None)))),
        *(None, selection if penalty else None, scale, heads_last, needs_q, needs_k, needs_v),
    )


def _precision() -> str:
    return "tf32" if tuning.allows_tf32("matmul") else "ieee"


def _tile(q: Tensor, dim: int, by_keys: bool) -> dict[str, int]:
    kind = tuning.product_kind(q, tuning.allows_tf32("matmul"))
    shipped = configuration(dim, kind, by_keys, tuning.capability(q))
    way = "keys" if by_keys else "queries"
    name = f"attention gradients by {way} {kind} D<={triton.next_power_of_2(dim)}"
    return tuning.chosen(q, name, shipped)


def _gradients(
    grad, q, k, v, terms, chosen, outside_tail, scale, heads_last, needs_q, needs_k, needs_v,
    *, one=False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv from each row's terms: its softmax, Δ, and of the penalty norm and tail.

    ``chosen`` are the bits of the keys that have a weight (all where None), ``outside_tail``
    those of the keys that the penalty leaves alone. With ``one`` chosen key its weight is 1
    and its score has no gradient, exactly; sums in other orders would leave rounding there.
    """
    batch, heads, queries, value_dim = grad.shape
    keys, dim = k.shape[2], q.shape[3]
    none = grad.new_empty((0,))
    dq = _rows_like(grad, queries, dim, heads_last) if needs_q else none
    dk = _rows_like(grad, keys, dim, heads_last) if needs_k else none
    dv = _rows_like(grad, keys, value_dim, heads_last) if needs_v else none
    if batch * heads == 0 or queries == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return dq, dk, dv
    softmax, delta, norm, grad_tail = terms
    penalty = outside_tail is not None
    # Any pointer does where nothing is read.
    bits = outside_tail if penalty else softmax if chosen is None else chosen
    values = v if needs_q or needs_k else grad
    shared = (
        *(q, k, values, grad, bits, softmax, delta),
        *((norm, grad_tail) if penalty else (softmax, softmax)),
        *(heads, queries, keys, dim, value_dim, scale),
        *(*q.stride()[:3], *k.stride()[:3], *values.stride()[:3], *grad.stride()[:3]),
    )
    options = {
        "WIDTH": triton.next_power_of_2(max(dim, 16)),
        "VALUE_WIDTH": triton.next_power_of_2(max(value_dim, 16)),
        "MASKED": chosen is not None,
        "PENALTY": penalty,
        "ONE": one or keys == 1,
        "PRECISION": _precision(),
    }
    if needs_q:
        tile = _tile(q, max(dim, value_dim), by_keys=False)
        by_queries = (batch * heads * triton.cdiv(queries, tile["BLOCK"]),)
        _queries_kernel[by_queries](*shared, dq, *dq.stride()[:3], **options, **tile)
    if needs_k or needs_v:
        tile = _tile(q, max(dim, value_dim), by_keys=True)
        by_keys = (batch * heads * triton.cdiv(keys, tile["BLOCK"]),)
        strides = [*(dk.stride()[:3] if needs_k else (0, 0, 0))]
        strides += [*(dv.stride()[:3] if needs_v else (0, 0, 0))]
        options |= {"KEYS": needs_k, "VALUES": needs_v}
        _keys_kernel[by_keys](*shared, dk, dv, *strides, **options, **tile)
    return dq, dk, dv


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _weights(counts, scores, top, sums, ONE: tl.constexpr):
    if ONE:
        return tl.where(counts, 1.0 + (sums - sums), 0.0)  # NaN in a row of NaN
    # A product of other tiles may round a score above the largest one; NaN passes.
    above = tl.where(scores > top, 0.0, scores - top)
    return tl.where(counts, tl.exp(above) * (1.0 / sums), 0.0)


@triton.jit
def _score_gradients(
    weights, products, chosen, delta, norm, tail, scale, PENALTY: tl.constexpr, ONE: tl.constexpr
):
    """dS of a tile; delta, norm and tail are shaped to spread over it."""
    if ONE:
        return weights - weights  # NaN where a weight is
    if PENALTY:
        products += weights * (norm + tl.where(chosen, 0.0, tail))
    return weights * (products - delta) * scale


@triton.jit
def _queries_kernel(
    q, k, v, grad, bits, softmax, delta, norm, grad_tail,
    heads, queries, keys, dim, value_dim, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    dq, dq_b, dq_h, dq_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, MASKED: tl.constexpr, PENALTY: tl.constexpr,
    ONE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK)
    head = tl.program_id(0) // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    m = first + tl.arange(0, BLOCK)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    there = m < queries
    at = head.to(tl.int64) * queries + m
    top = tl.load(softmax + 2 * at, there, other=0.0)
    total = tl.load(softmax + 2 * at + 1, there, other=1.0)
    of_row = tl.load(delta + at, there, other=0.0)
    of_norm = of_row
    tail = of_row
    if PENALTY:
        of_norm = tl.load(norm + at, there, other=0.0)
        tail = 2.0 * tl.load(grad_tail + at, there, other=0.0)
    VALUE_CHUNK: tl.constexpr = VALUE_WIDTH if CHUNK == WIDTH else CHUNK
    rows = rows_at(q, q_n, m, queries, dim, WIDTH)
    grads = rows_at(grad, g_n, m, queries, value_dim, VALUE_WIDTH)
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(0, keys, STEP):
        n = start + tl.arange(0, STEP)
        scores = products_of_rows(
            rows, q, q_n, m, queries, k, k_n, n, keys, dim, WIDTH, CHUNK, PRECISION
        )
        scores *= scale
        counts = tl.broadcast_to(n[None, :] < keys, [BLOCK, STEP])
        chosen = counts
        if MASKED or PENALTY:
            chosen = chosen_bits(bits, head, first, (m - first)[:, None], n[None, :], queries, keys)
        if MASKED:
            counts = chosen
        weights = _weights(counts, scores, top[:, None], total[:, None], ONE)
        dp = products_of_rows(
            grads, grad, g_n, m, queries, v, v_n, n, keys, value_dim,
            VALUE_WIDTH, VALUE_CHUNK, PRECISION,
        )  # fmt: skip
        ds = _score_gradients(
            weights, dp, chosen, of_row[:, None], of_norm[:, None], tail[:, None], scale,
            PENALTY, ONE,
        )  # fmt: skip
        again = rows_at(k, k_n, n, keys, dim, WIDTH)
        sums = tl.dot(ds.to(again.dtype), again, sums, input_precision=PRECISION)
    c = tl.arange(0, WIDTH)
    to = dq + b * dq_b + h * dq_h + m[:, None].to(tl.int64) * dq_n + c[None, :]
    tl.store(to, sums.to(dq.dtype.element_ty), there[:, None] & (c[None, :] < dim))


@triton.jit
def _keys_kernel(
    q, k, v, grad, bits, softmax, delta, norm, grad_tail,
    heads, queries, keys, dim, value_dim, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    dk, dv, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, MASKED: tl.constexpr, PENALTY: tl.constexpr,
    ONE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK)
    head = tl.program_id(0) // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    VALUE_CHUNK: tl.constexpr = VALUE_WIDTH if CHUNK == WIDTH else CHUNK
    of_keys = rows_at(k, k_n, n, keys, dim, WIDTH)
    of_values = of_keys
    if KEYS:
        of_values = rows_at(v, v_n, n, keys, value_dim, VALUE_WIDTH)
    sum_k = tl.zeros([BLOCK, WIDTH], tl.float32)
    sum_v = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
    for start in range(0, queries, STEP):
        m = start + tl.arange(0, STEP)
        there = m < queries
        at = head.to(tl.int64) * queries + m
        top = tl.load(softmax + 2 * at, there, other=0.0)
        total = tl.load(softmax + 2 * at + 1, there, other=1.0)
        scores = products_of_rows(  # [keys, queries]
            of_keys, k, k_n, n, keys, q, q_n, m, queries, dim, WIDTH, CHUNK, PRECISION
        )
        scores *= scale
        counts = there[None, :] & (n[:, None] < keys)
        chosen = counts
        if MASKED or PENALTY:
            chosen = chosen_bits(bits, head, start, (m - start)[None, :], n[:, None], queries, keys)
        if MASKED:
            counts = chosen
        weights = _weights(counts, scores, top[None, :], total[None, :], ONE)
        if VALUES:
            grads = rows_at(grad, g_n, m, queries, value_dim, VALUE_WIDTH)
            sum_v = tl.dot(weights.to(grads.dtype), grads, sum_v, input_precision=PRECISION)
        if KEYS:
            dp = products_of_rows(
                of_values, v, v_n, n, keys, grad, g_n, m, queries, value_dim,
                VALUE_WIDTH, VALUE_CHUNK, PRECISION,
            )  # fmt: skip
            of_row = tl.load(delta + at, there, other=0.0)
            of_norm = of_row
            tail = of_row
            if PENALTY:
                of_norm = tl.load(norm + at, there, other=0.0)
                tail = 2.0 * tl.load(grad_tail + at, there, other=0.0)
            at_row, at_norm, at_tail = of_row[None, :], of_norm[None, :], tail[None, :]
            ds = _score_gradients(
                weights, dp, chosen, at_row, at_norm, at_tail, scale, PENALTY, ONE
            )
            again = rows_at(q, q_n, m, queries, dim, WIDTH)
            sum_k = tl.dot(ds.to(again.dtype), again, sum_k, input_precision=PRECISION)
    c, e = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    row = n[:, None].to(tl.int64)
    if KEYS:
        to = dk + b * dk_b + h * dk_h + row * dk_n + c[None, :]
        tl.store(to, sum_k.to(dk.dtype.element_ty), (n[:, None] < keys) & (c[None, :] < dim))
    if VALUES:
        to_v = dv + b * dv_b + h * dv_h + row * dv_n + e[None, :]
        inside = (n[:, None] < keys) & (e[None, :] < value_dim)
        tl.store(to_v, sum_v.to(dv.dtype.element_ty), inside)
