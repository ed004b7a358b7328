"""Attention with exactly k keys a query, and dense attention with the k-sparse penalty's terms."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit.ops import _backends, _checks, _library

_WIDEST_ON_GPU = 256  # head dimension whose tiles fit a GPU's registers and shared memory
_NEEDS = "bool heads_last, bool needs_q, bool needs_k, bool needs_v"
# What is saved of a selection differs. On the CPU: indices and weights, [B, H, Nq, topk] each, none
# where every key is kept. On a GPU, where it is quicker to make tiles of scores again than to
# gather rows: a bit for each key, and each row's largest score and sum of exponentials.
_library.define(
    "topk_attention(Tensor q, Tensor k, Tensor v, int topk, float scale, bool save)"
    " -> (Tensor out, Tensor selection, Tensor weights)"
)
_library.define(
    "topk_attention_backward(Tensor grad, Tensor? out, Tensor? q, Tensor? k, Tensor? v,"
    f" Tensor selection, Tensor weights, int topk, int keys, float scale, {_NEEDS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
_library.define(
    "attention_with_penalty(Tensor q, Tensor k, Tensor v, int topk, float scale, bool save)"
    " -> (Tensor out, Tensor tail_energy, Tensor hoyer, Tensor selection)"
)
_library.define(
    "attention_dense_backward(Tensor grad, Tensor q, Tensor k, Tensor? v, Tensor? grad_tail,"
    f" Tensor? grad_hoyer, Tensor? selection, float scale, {_NEEDS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
_backends.gpu_kernels("topk_attention", "topk_attention", "attention_with_penalty", tf32="matmul")
_backends.gpu_kernels(
    "attention_backward",
    "topk_attention_backward",
    "attention_dense_backward",
    tf32="matmul",
)


def _empty_rows(like, batch, heads, rows, columns, heads_last):
    """[B, H, N, D]; in the memory order B, N, H, D where heads_last."""
    if heads_last:
        return like.new_empty((batch, rows, heads, columns)).transpose(1, 2)
    return like.new_empty((batch, heads, rows, columns))


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


@_library.fake("topk_attention")
def _(q, k, v, topk, scale, save):
    batch, heads, queries, _ = q.shape
    keys, rows = k.shape[2], (batch, heads, queries)
    out = _empty_rows(q, batch, heads, queries, v.shape[3], True)
    chosen = save and topk < keys
    if _backends.runs_on_gpu(q):
        bits = q.new_empty((*rows, (keys + 7) // 8 if chosen else 0), dtype=torch.uint8)
        return out, bits, q.new_empty((*rows, 2 if save else 0), dtype=torch.float32)
    columns = topk if chosen else 0
    indices = q.new_empty((*rows, columns), dtype=torch.int32)
    return out, indices, q.new_empty((*rows, columns), dtype=_compute_dtype(q))


@_library.fake("topk_attention_backward")
def _(
    grad, out, q, k, v, selection, weights, topk, keys, scale, heads_last, needs_q, needs_k, needs_v
):
    batch, heads, queries, value_dim = grad.shape

    def rows(wanted, count, columns):
        if wanted:
            return _empty_rows(grad, batch, heads, count, columns(), heads_last)
        return grad.new_empty((0,))

    return (
        rows(needs_q, queries, lambda: k.shape[3]),
        rows(needs_k, keys, lambda: q.shape[3]),
        rows(needs_v, keys, lambda: value_dim),
    )


@_library.fake("attention_with_penalty")
def _(q, k, v, topk, scale, save):
    batch, heads, queries, _ = q.shape
    terms = (batch, heads, queries)
    return (
        _empty_rows(q, batch, heads, queries, v.shape[3], True),
        q.new_empty(terms, dtype=_compute_dtype(q)),
        q.new_empty(terms, dtype=_compute_dtype(q)),
        q.new_empty((*terms, (k.shape[2] + 7) // 8 if save else 0), dtype=torch.uint8),
    )


@_library.fake("attention_dense_backward")
def _(
    grad, q, k, v, grad_tail, grad_hoyer, selection, scale, heads_last, needs_q, needs_k, needs_v
):
    batch, heads, queries, dim = q.shape

    def rows(wanted, count, columns):
        if wanted:
            return _empty_rows(grad, batch, heads, count, columns, heads_last)
        return grad.new_empty((0,))

    return (
        rows(needs_q, queries, dim),
        rows(needs_k, k.shape[2], dim),
        rows(needs_v, k.shape[2], grad.shape[3]),
    )


def _unit_columns(value: Tensor) -> Tensor:
    # Not contiguous(): that leaves the strides of a tensor without elements as they are.
    return value if value.stride(3) == 1 else value.clone(memory_format=torch.contiguous_format)


def _heads_last(value: Tensor) -> bool:
    """Whether heads lie inside rows in memory, as in slices of a packed projection."""
    return value.stride(1) < value.stride(2)


def _wanted(gradients, needs):
    return tuple(g if wanted else None for g, wanted in zip(gradients, needs, strict=True))


class _Selected(torch.autograd.Function):
    """Gradients through the chosen keys, as the forward pass saved them."""

    @staticmethod
    def forward(ctx, q, k, v, topk, scale):
        out, selection, weights = torch.ops.pyvit.topk_attention(q, k, v, topk, scale, True)
        ctx.needs = needs_q, needs_k, _ = ctx.needs_input_grad[:3]
        wants_scores = needs_q or needs_k
        again = _backends.runs_on_gpu(q)  # makes the scores again
        ctx.save_for_backward(
            out if again and wants_scores else None,
            q if needs_k or again else None,
            k if needs_q or again else None,
            v if wants_scores else None,
            selection,
            weights,
        )
        ctx.topk, ctx.keys = topk, k.shape[2]
        ctx.scale, ctx.heads_last = scale, _heads_last(q)
        return out

    @staticmethod
    @_library.once_differentiable("topk_attention")
    def backward(ctx, grad):
        gradients = torch.ops.pyvit.topk_attention_backward(
            _unit_columns(grad), *ctx.saved_tensors, ctx.topk, ctx.keys, ctx.scale,
            ctx.heads_last, *ctx.needs,
        )  # fmt: skip
        return *_wanted(gradients, ctx.needs), None, None


class _Dense(torch.autograd.Function):
    """Gradients of dense attention, whatever the forward pass kept: saves q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, topk, scale):
        out, _, _ = torch.ops.pyvit.topk_attention(q, k, v, topk, scale, False)
        ctx.needs = needs_q, needs_k, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(q, k, v if needs_q or needs_k else None)
        ctx.scale, ctx.heads_last = scale, _heads_last(q)
        return out

    @staticmethod
    @_library.once_differentiable("topk_attention")
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        gradients = torch.ops.pyvit.attention_dense_backward(
            _unit_columns(grad), q, k, v, None, None, None, ctx.scale, ctx.heads_last, *ctx.needs
        )
        return *_wanted(gradients, ctx.needs), None, None


class _WithPenalty(torch.autograd.Function):
    """Saves q, k, v and the selection, one bit for each query and key."""

    @staticmethod
    def forward(ctx, q, k, v, topk, scale):
        ctx.needs = needs_q, needs_k, _ = ctx.needs_input_grad[:3]
        wants_scores = needs_q or needs_k
        out, tail_energy, hoyer, selection = torch.ops.pyvit.attention_with_penalty(
            q, k, v, topk, scale, wants_scores
        )
        ctx.save_for_backward(
            q, k, v if wants_scores else None, selection if wants_scores else None
        )
        ctx.scale, ctx.heads_last = scale, _heads_last(q)
        return out, tail_energy, hoyer

    @staticmethod
    @_library.once_differentiable("attention_with_penalty")
    def backward(ctx, grad, grad_tail, grad_hoyer):
        q, k, v, selection = ctx.saved_tensors
        if selection is None:
            grad_tail = grad_hoyer = None
        else:
            grad_tail, grad_hoyer = grad_tail.contiguous(), grad_hoyer.contiguous()
        gradients = torch.ops.pyvit.attention_dense_backward(
            _unit_columns(grad), q, k, v, grad_tail, grad_hoyer, selection, ctx.scale,
            ctx.heads_last, *ctx.needs,
        )  # fmt: skip
        return *_wanted(gradients, ctx.needs), None, None


def _checked(op: str, q, k, v, topk, scale):
    """q, k, v cast and laid out as the kernels take them, and the scale as a number."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(op, name, value, ndim=4)
    q, k, v = _library.autocast(q, k, v)
    _checks.like(op, "k", k, "q", q)
    _checks.like(op, "v", v, "q", q)
    _backends.require_kernels(op, q)
    batch, heads, _, dim = q.shape
    if dim < 1:
        _checks.fail(ValueError, op, "q", "of head dimension at least 1", _checks.shape_of(q))
    if k.shape[2] < 1:
        _checks.fail(ValueError, op, "k", "a tensor of at least one key", _checks.shape_of(k))
    if v.shape[3] < 1:
        _checks.fail(ValueError, op, "v", "of head dimension at least 1", _checks.shape_of(v))
    _checks.shape(op, "k", k, (batch, heads, k.shape[2], dim), " (q's batch, heads, dimension)")
    _checks.shape(op, "v", v, (batch, heads, k.shape[2], v.shape[3]), " (k's batch, heads, keys)")
    if _backends.runs_on_gpu(q) and max(dim, v.shape[3]) > _WIDEST_ON_GPU:
        raise NotImplementedError(
            f"pyvit.{op}: head dimensions beyond {_WIDEST_ON_GPU} (here {max(dim, v.shape[3])}) "
            "run on the CPU alone; move the tensors there with .cpu()"
        )
    _checks.integer(op, "topk", topk, minimum=1)
    scale = dim**-0.5 if scale is None else _checks.number(op, "scale", scale)
    return _unit_columns(q), _unit_columns(k), _unit_columns(v), scale


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    scale: float | None = None,
    backward: str = "selected",
) -> Tensor:
    """Softmax attention in which each query keeps exactly its ``min(topk, Nk)`` largest scores.

    Equal scores are kept in the order of their keys, the lowest index first. ``topk >= Nk`` is
    dense attention.

    Args:
        q: queries ``[B, H, Nq, D]``.
        k: keys ``[B, H, Nk, D]``, Nk at least 1.
        v: values ``[B, H, Nk, Dv]``.
        topk: how many keys each query keeps, at least 1.
        scale: factor of ``q·k``; ``1 / sqrt(D)`` where None.
        backward: "selected" gives the gradient of this function, which flows through the kept
            keys alone; "dense" gives that of dense softmax attention at the same q, k, v, for
            an evaluation that masked gradients cannot fool.

    Returns:
        ``[B, H, Nq, Dv]`` in q's dtype; rows of all heads lie together in memory, so
        ``out.transpose(1, 2).flatten(2)`` is free.

    q, k, v are float32, float64, bfloat16 or float16, and may have any strides: slices of a
    packed projection are read where they lie. A tensor whose last stride is not 1 is copied.
    Scores, softmax and sums are float32 (float64 for float64). Under autocast the arguments are
    cast as for ``F.scaled_dot_product_attention``.

    On a GPU D and Dv are at most 256, and there is no float64.

    A query with a NaN score gives a row of NaN and disturbs no other; a NaN in ``v[j]`` reaches
    the queries that kept key j.

    Once differentiable in q, k, v; only wanted gradients are computed. For backward, "selected"
    keeps on the CPU Nq·topk indices (int32) and weights (float32) a head, and of q, k, v what
    the wanted gradients need; on a GPU a bit for each query and key, q, k, v and the result;
    "dense", and ``topk >= Nk``, keep q, k, v alone. No Nq × Nk matrix of numbers is ever in
    memory. Deterministic and batch-invariant, forward and backward: the result for one
    image is the same bits alone and in any batch, with any number of threads.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost a head: ``2·Nq·Nk·D`` floating-point operations for the scores, a few passes over them
    in the cache for the selection, ``2·Nq·topk·Dv`` for the sums; backward
    ``2·Nq·topk·(2·D + 2·Dv)``, or ``2·Nq·Nk·(3·D + 2·Dv)`` where dense (``4·D + 3·Dv`` where
    Nk exceeds about 1500 at D = 64, or threads exceed heads). Scratch: at most 2 MB a thread; on
    a GPU nothing, or from a few hundred keys on 512 bytes a query.

    Source: exact top-k attention of Wang et al., KVT: k-NN attention for boosting vision
    transformers (ECCV 2022); the tiling follows FlashAttention (Dao et al., 2022).

    Example:
        >>> import torch, pyvit
        >>> q, k, v = torch.randn(3, 2, 4, 197, 64).unbind(0)
        >>> pyvit.topk_attention(q, k, v, 16).shape
        torch.Size([2, 4, 197, 64])
    """
    op = "topk_attention"
    q, k, v, scale = _checked(op, q, k, v, topk, scale)
    _checks.choice(op, "backward", backward, ("selected", "dense"))
    if not _library.needs_grad(q, k, v):
        return torch.ops.pyvit.topk_attention(q, k, v, topk, scale, False)[0]
    all_kept = topk >= k.shape[2] and not _backends.runs_on_gpu(q)  # nothing is saved of that
    if backward == "dense" or all_kept:
        return _Dense.apply(q, k, v, topk, scale)
    return _Selected.apply(q, k, v, topk, scale)


def attention_with_penalty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense softmax attention, and how far each row of its weights is from k-sparse.

    Args:
        q: queries ``[B, H, Nq, D]``.
        k: keys ``[B, H, Nk, D]``, Nk at least 1.
        v: values ``[B, H, Nk, Dv]``.
        topk: how many weights of a row the penalty leaves alone, at least 1.
        scale: factor of ``q·k``; ``1 / sqrt(D)`` where None.

    Returns:
        ``(out, tail_energy, hoyer)``: ``out`` ``[B, H, Nq, Dv]`` as
        ``F.scaled_dot_product_attention`` (memory as of :func:`topk_attention`); and, with w
        the weights of a row, ``[B, H, Nq]`` in float32 (float64 for float64): ``tail_energy``,
        the sum of w² over the keys outside the ``topk`` largest scores (0 where ``topk >= Nk``;
        ties go to the lowest index), the numerator of the k-sparse penalty; ``hoyer``, the
        Hoyer sparsity ``(√Nk − 1/‖w‖₂) / (√Nk − 1)``, from 0 (uniform) to 1 (one key), and 1
        where there is but one key.

    Dtypes, strides, autocast, NaN, determinism: as :func:`topk_attention`. Once differentiable
    in q, k, v through all three results; the selection is held fixed. Saves q, k, v and, where
    the gradient of q or k is wanted, one bit for each query and key.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted.

    Cost a head: ``2·Nq·Nk·(D + Dv)`` floating-point operations, backward as dense
    :func:`topk_attention`; tiles of scores stay in the cache.

    Source: the penalty method of Lu and Zhang, Sparse approximation via penalty decomposition
    methods (SIAM J. Optim., 2013); Hoyer, Non-negative matrix factorization with sparseness
    constraints (JMLR, 2004).

    Example:
        >>> import torch, pyvit
        >>> q, k, v = torch.randn(3, 2, 4, 197, 64).unbind(0)
        >>> out, tail_energy, hoyer = pyvit.attention_with_penalty(q, k, v, 16)
        >>> tail_energy.shape
        torch.Size([2, 4, 197])
    """
    q, k, v, scale = _checked("attention_with_penalty", q, k, v, topk, scale)
    if not _library.needs_grad(q, k, v):
        return torch.ops.pyvit.attention_with_penalty(q, k, v, topk, scale, False)[:3]
    return _WithPenalty.apply(q, k, v, topk, scale)
