"""What the gradients of attention need of each row: its softmax, Δ, and the penalty's norm.

As kernels/attention_backward.py has them: Δ = Σ w · dW, where dW is dP = dO v^T and of the
penalty's terms w · (norm + tail where the key is in the tail).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.kernels.attention_tiles import chosen_bits, products_of_rows, rows_at


def delta_configuration(value_dim: int) -> dict[str, int]:
    return {"BLOCK_M": max(1, 4096 // triton.next_power_of_2(value_dim)), "num_warps": 4}


def delta_of_rows(grad: Tensor, out: Tensor) -> Tensor:
    """Δ where the result is at hand: dO · out of each row, [B, H, N] in float32."""
    delta = grad.new_empty(grad.shape[:3], dtype=torch.float32)
    if delta.numel() > 0:
        heads, queries, value_dim = grad.shape[1:]
        tile = delta_configuration(value_dim)
        _delta_kernel[(triton.cdiv(delta.numel(), tile["BLOCK_M"]),)](
            *(grad, out, delta, delta.numel(), heads, queries, value_dim),
            *(*grad.stride()[:3], *out.stride()[:3]),
            VALUE_WIDTH=triton.next_power_of_2(value_dim),
            **tile,
        )
    return delta


def softmax_and_terms(
    q, k, v, grad, outside_tail, grad_tail, grad_hoyer, scale, tile: dict[str, int], precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest score and sum of exponentials, [B, H, N, 2], its Δ and its norm.

    Without ``v`` no score has a gradient, and there is no Δ; without ``outside_tail`` (the bits
    of the keys that the penalty leaves alone) there is no penalty, and no norm.
    """
    batch, heads, queries, value_dim = grad.shape
    keys, dim = k.shape[2], q.shape[3]
    penalty = outside_tail is not None
    delta, norm = grad.new_empty((2, batch, heads, queries), dtype=torch.float32)
    softmax = grad.new_empty((batch, heads, queries, 2), dtype=torch.float32)
    if delta.numel() > 0:
        values = grad if v is None else v  # any pointer does where it is not read
        _terms_kernel[(batch * heads * triton.cdiv(queries, tile["BLOCK"]),)](
            *(q, k, values, grad),
            *((outside_tail, grad_tail, grad_hoyer) if penalty else (softmax, softmax, softmax)),
            *(softmax, delta, norm, heads, queries, keys, dim, value_dim, scale),
            *(*q.stride()[:3], *k.stride()[:3], *values.stride()[:3], *grad.stride()[:3]),
            WIDTH=triton.next_power_of_2(max(dim, 16)),
            VALUE_WIDTH=triton.next_power_of_2(max(value_dim, 16)),
            PENALTY=penalty,
            SCORES=v is not None,
            PRECISION=precision,
            **tile,
        )
    return softmax, delta, norm


@triton.jit
def _delta_kernel(
    grad, out, delta, count, heads, queries, value_dim, g_b, g_h, g_n, o_b, o_h, o_n,
    VALUE_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Δ of each row: its result is Σ w · v, so Σ w · (dO · v) is dO · result."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < count
    b, h, m = row // (heads * queries), row // queries % heads, row % queries
    e = tl.arange(0, VALUE_WIDTH)
    inside = there[:, None] & (e[None, :] < value_dim)
    grad_at = (b * g_b + h * g_h + m * g_n)[:, None] + e[None, :]
    out_at = (b * o_b + h * o_h + m * o_n)[:, None] + e[None, :]
    of_grad = tl.load(grad + grad_at, inside, other=0.0).to(tl.float32)
    of_out = tl.load(out + out_at, inside, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(of_grad * of_out, 1), there)


@triton.jit
def _terms_kernel(
    q, k, v, grad, bits, grad_tail, grad_hoyer, softmax, delta, norm,
    heads, queries, keys, dim, value_dim, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PENALTY: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
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
    VALUE_CHUNK: tl.constexpr = VALUE_WIDTH if CHUNK == WIDTH else CHUNK
    rows = rows_at(q, q_n, m, queries, dim, WIDTH)
    grads = rows
    if SCORES:
        grads = rows_at(grad, g_n, m, queries, value_dim, VALUE_WIDTH)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)  # Σ e, and with it Σ e·dP, Σ e², Σ e² over the tail
    products = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    tails = tl.zeros([BLOCK], tl.float32)
    for start in range(0, keys, STEP):
        n = start + tl.arange(0, STEP)
        scores = products_of_rows(
            rows, q, q_n, m, queries, k, k_n, n, keys, dim, WIDTH, CHUNK, PRECISION
        )
        scores *= scale
        counts = tl.broadcast_to(n[None, :] < keys, [BLOCK, STEP])
        # A NaN score must show: maximum() would drop it here and keep it out of the sum below.
        highest = tl.maximum(top, tl.max(tl.where(counts, scores, float("-inf")), 1))
        factor = tl.where(highest == top, 1.0, tl.exp(top - highest))
        exponentials = tl.where(counts, tl.exp(scores - highest[:, None]), 0.0)
        sums = sums * factor + tl.sum(exponentials, 1)
        if SCORES:
            dp = products_of_rows(
                grads, grad, g_n, m, queries, v, v_n, n, keys, value_dim,
                VALUE_WIDTH, VALUE_CHUNK, PRECISION,
            )  # fmt: skip
            products = products * factor + tl.sum(exponentials * dp, 1)
        if PENALTY:
            square = exponentials * exponentials
            squares = squares * factor * factor + tl.sum(square, 1)
            kept = chosen_bits(bits, head, first, (m - first)[:, None], n[None, :], queries, keys)
            tails = tails * factor * factor + tl.sum(tl.where(kept, 0.0, square), 1)
        top = tl.where(highest == float("-inf"), top, highest)
    there = m < queries
    at = head.to(tl.int64) * queries + m
    tl.store(softmax + 2 * at, top, there)
    tl.store(softmax + 2 * at + 1, sums, there)
    of_row = products / sums
    if PENALTY:
        length = tl.sqrt(squares) / sums
        of_norm = tl.zeros([BLOCK], tl.float32)
        if keys > 1:
            span = tl.sqrt(tl.cast(keys, tl.float32)) - 1.0
            of_norm = tl.load(grad_hoyer + at, there, other=0.0) / (span * length * length * length)
        twice = 2.0 * tl.load(grad_tail + at, there, other=0.0)
        of_row += of_norm * length * length + twice * tails / (sums * sums)
        tl.store(norm + at, of_norm, there)
    if SCORES:
        tl.store(delta + at, of_row, there)
