"""How topk_attention is called: memory, strides, autograd, compilation, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_truth import SHAPES, tensors, with_gradients
from memory import peak_extra_bytes
from torch.autograd import forward_ad

from pyvit.ops import topk_attention

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


# ---- memory: strides, what is kept, what is needed --------------------------------------------


@pytest.mark.interpreted(topk=[9], dtype=[torch.bfloat16])
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [9, 33])
def test_strided_inputs(topk, dtype):
    packed = torch.randn(2, 33, 3, 4, 40).to(dtype)
    big = torch.randn(4, 6, 70, 90).to(dtype)
    views = {
        "packed projection": packed.permute(2, 0, 3, 1, 4).unbind(0),
        "slices": (big[:2, 1:5, 3:36, 7:47], big[2:, :4, :33, 5:45], big[1:3, 2:, 20:53, 50:]),
        "every other row": (
            big[::2, :4, :66:2, :40],
            big[:2, :4, :33, :40],
            big[:2, :4, 1:67:2, :9],
        ),
        "expanded": (
            big[:1, :1, :33, :40].expand(2, 4, -1, -1),
            *packed[:, :, :2].permute(2, 0, 3, 1, 4),
        ),
        "columns not contiguous": (
            big[:2, :4, :40, :33].transpose(2, 3),
            big[:2, :4, :33, :80:2],
            big[:2, :4, :11, :33].transpose(2, 3),
        ),
    }
    for name, arguments in views.items():
        plain = [a.contiguous() for a in arguments]
        grad = torch.randn(2, 4, 33, arguments[2].shape[3]).to(dtype)
        expected = with_gradients(topk_attention, plain, (grad,), topk=topk)
        for g in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2), grad.mT.contiguous().mT):
            ours = with_gradients(topk_attention, arguments, (g,), topk=topk)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected)), name
    expanded = torch.randn(1, 1, 1, 1).to(dtype).expand(2, 4, 33, 9)
    (q, k, v) = (a.contiguous() for a in views["every other row"])
    ours = with_gradients(topk_attention, (q, k, v), (expanded,), topk=topk)
    expected = with_gradients(topk_attention, (q, k, v), (expanded.contiguous(),), topk=topk)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_no_copy_of_a_packed_projection():
    packed = torch.randn(2, 33, 3, 4, 40, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = topk_attention(q, k, v, 5)
    pointers = {t.data_ptr() for t in kept}
    assert {q.data_ptr(), k.data_ptr(), v.data_ptr()} <= pointers
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr(), "the heads' rows do not lie together"


@pytest.mark.parametrize("heads_last", [False, True])
def test_gradients_lie_as_the_inputs(heads_last):
    arguments = tensors(SHAPES["vit"])
    if heads_last:
        arguments = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in arguments]
    for options in ({}, {"backward": "dense"}):
        leaves = [a.requires_grad_() for a in arguments]
        gradients = torch.autograd.grad(topk_attention(*leaves, 16, **options).sum(), leaves)
        assert all(g.stride() == a.stride() for g, a in zip(gradients, arguments))


SAVED = {
    "q": {"k", "v"},
    "k": {"q", "v"},
    "v": set(),
    "qk": {"q", "k", "v"},
    "qkv": {"q", "k", "v"},
}
SAVED_DENSE = {"q": "qkv", "k": "qkv", "v": "qk", "qk": "qkv", "qkv": "qkv"}


@pytest.mark.parametrize("topk", [16, 197])
@pytest.mark.parametrize("backward", ["selected", "dense"])
@pytest.mark.parametrize("wanted", SAVED)
def test_what_is_kept_and_computed(wanted, backward, topk):
    arguments = dict(zip("qkv", tensors(SHAPES["vit"])))
    full = {n: a.clone().requires_grad_() for n, a in arguments.items()}
    topk_attention(**full, topk=topk, backward=backward).square().sum().backward()
    for name in wanted:
        arguments[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = topk_attention(**arguments, topk=topk, backward=backward)
    pointers = {a.data_ptr(): n for n, a in arguments.items()}
    inputs = {pointers[t.data_ptr()] for t in kept if t.data_ptr() in pointers}
    others = sum(t.nbytes for t in kept if t.data_ptr() not in pointers)
    selects = backward == "selected" and topk < 197
    assert inputs == (SAVED[wanted] if selects else set(SAVED_DENSE[wanted]))
    assert others == (2 * 2 * 197 * topk * (4 + 4) if selects else 0)
    with torch.profiler.profile() as profile:
        out.square().sum().backward()
    kernels = {e.key for e in profile.key_averages() if e.key.startswith("pyvit::")}
    assert kernels == {
        "pyvit::topk_attention_backward" if selects else "pyvit::attention_dense_backward"
    }
    for name, argument in arguments.items():
        assert (argument.grad is not None) == (name in wanted)
        if name in wanted:
            assert torch.equal(argument.grad, full[name].grad), name


@pytest.mark.parametrize("backward", ["selected", "dense"])
def test_no_matrix_of_scores_in_memory(backward):
    """Peak memory of forward and backward: results, what is saved, and scratch by the thread."""
    threads, heads, tokens, topk = 2, 4, 2048, 16
    setup = f"""
        from pyvit.ops import topk_attention
        def work(n):
            leaves = [torch.randn(1, {heads}, n, 64, requires_grad=True) for _ in range(3)]
            out = topk_attention(*leaves, {topk}, backward="{backward}")
            return leaves, torch.autograd.grad(out, leaves, torch.ones(1, {heads}, n, 64))
        work(64)
    """
    tensor, choices = heads * tokens * 64 * 4, heads * tokens * topk * 4
    # q, k, v, out, its gradient, three gradients; indices, weights, gradients of scores; row
    # terms where dense.
    known = 8 * tensor + 3 * choices + heads * tokens * 20
    extra = peak_extra_bytes(setup, f"result = work({tokens})", threads) - known
    assert extra <= threads * 2**21, f"{extra / 2**20:.1f} MB"  # a matrix of scores: 67 MB


@pytest.mark.parametrize("topk", [16, 12000])
@pytest.mark.parametrize("backward", ["selected", "dense"])
def test_scratch_does_not_grow_with_the_keys(backward, topk):
    threads, queries, keys = 2, 64, 16384
    setup = f"""
        from pyvit.ops import topk_attention
        def work(n, topk):
            sizes = ({queries}, n, n)
            leaves = [torch.randn(1, 1, size, 64, requires_grad=True) for size in sizes]
            out = topk_attention(*leaves, topk, backward="{backward}")
            return leaves, torch.autograd.grad(out, leaves, torch.ones(1, 1, {queries}, 64))
        work(64, 16)
    """
    # k, v and their gradients; the same of q, and out; indices, weights, gradients of scores.
    known = 4 * 64 * (4 * keys + 4 * queries) + 3 * 4 * queries * topk
    extra = peak_extra_bytes(setup, f"result = work({keys}, {topk})", threads) - known
    assert extra <= threads * 2**21, f"{extra / 2**20:.1f} MB"


# ---- autograd, compile, dispatch ----------------------------------------------------------------


@pytest.mark.parametrize("backward,topk", [("selected", 3), ("selected", 9), ("dense", 9)])
def test_gradcheck(backward, topk):
    arguments = [a.requires_grad_() for a in tensors((2, 1, 5, 9, 4, 3), torch.float64)]

    def attend(q, k, v):
        return topk_attention(q, k, v, topk, backward=backward)

    assert torch.autograd.gradcheck(attend, arguments)


@pytest.mark.parametrize("topk", [5, 17])
def test_second_derivative_is_refused(topk):
    q, k, v = tensors(SHAPES["small"])
    q.requires_grad_()
    (grad,) = torch.autograd.grad(
        topk_attention(q, k, v, topk).square().sum(), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"pyvit\.topk_attention: second derivatives"):
        grad.sum().backward()


def test_no_function_without_gradients():
    q, k, v = tensors(SHAPES["small"])
    assert topk_attention(q, k, v, 5).grad_fn is None
    with torch.no_grad():
        assert topk_attention(q.requires_grad_(), k, v, 5).grad_fn is None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("batch,queries", [(0, 5), (2, 0)])
@pytest.mark.parametrize("topk", [3, 17])
@pytest.mark.parametrize("strided", [False, True])
def test_empty(batch, queries, topk, strided):
    arguments = tensors((batch, 3, queries, 17, 8, 4))
    grad = torch.randn(batch, 3, queries, 4)
    if strided:  # no two columns are neighbours
        arguments = [torch.stack([a, a], -1)[..., 0] for a in arguments]
        grad = torch.stack([grad, grad], -1)[..., 0]
    for backward in ("selected", "dense"):
        out, *gradients = with_gradients(
            topk_attention, arguments, (grad,), topk=topk, backward=backward
        )
        assert out.shape == (batch, 3, queries, 4)
        assert all(torch.equal(g, torch.zeros_like(a)) for g, a in zip(gradients, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k, v = tensors(SHAPES["rectangular"], dtype)
    operations, keys = torch.ops.pyvit, k.shape[2]
    for topk, save in ((7, True), (7, False), (keys, True)):
        torch.library.opcheck(operations.topk_attention.default, (q, k, v, topk, 0.1, save))
    grad, indices, weights = operations.topk_attention(q, k, v, 7, 0.1, True)
    for flags in (
        (True, True, True, True),
        (False, True, False, True),
        (False, False, True, False),
    ):
        arguments = (grad, None, q, k, v, indices, weights, 7, keys, 0.1, *flags)
        torch.library.opcheck(operations.topk_attention_backward.default, arguments)
    arguments = (grad, *[None] * 4, indices, weights, 7, keys, 0.1, True, False, False, True)
    torch.library.opcheck(operations.topk_attention_backward.default, arguments)
    for flags in ((True, True, True, True), (False, False, True, False)):
        arguments = (grad, q, k, v, None, None, None, 0.1, *flags)
        torch.library.opcheck(operations.attention_dense_backward.default, arguments)


def test_compile():
    packed = torch.randn(2, 33, 3, 4, 32)

    def loss(packed):
        q, k, v = (packed * 2).permute(2, 0, 3, 1, 4).unbind(0)
        results = [topk_attention(q, k, v, topk) for topk in (7, 40)]
        results.append(topk_attention(q, k, v, 7, backward="dense"))
        return sum(r.transpose(1, 2).flatten(2).square().sum() for r in results)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = packed.clone().requires_grad_()
        value = function(leaf)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager)


def test_autocast_casts_as_sdpa():
    leaves = [a.requires_grad_() for a in tensors(SHAPES["small"])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = topk_attention(*leaves, 5), F.scaled_dot_product_attention(*leaves)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    lowered = [a.bfloat16() for a in leaves]
    assert torch.equal(ours, topk_attention(*lowered, 5))
    ours.sum().backward()
    assert all(a.grad.dtype == torch.float32 for a in leaves)


def test_forward_mode_is_refused():
    """The bare op would let tangents pass as zeros."""
    q, k, v = tensors(SHAPES["small"])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        topk_attention(q, forward_ad.make_dual(k, k), v, 5)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda t: topk_attention(t, k, v, 5), (q,), (q,))


def test_meta_tensors():
    q, k, v = (torch.empty(2, 3, 17, 32, device="meta", requires_grad=True) for _ in range(3))
    for topk in (5, 17):
        out = topk_attention(q, k, v, topk)
        assert out.shape == (2, 3, 17, 32) and out.device.type == "meta"
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.shape == (2, 3, 17, 32) for g in gradients)


# ---- bad calls ----------------------------------------------------------------------------------


def zeros(*size, **options):
    return torch.zeros(*size, **options)


def call(q=None, k=None, v=None, topk=2, **options):
    default = (zeros(2, 3, 5, 8), zeros(2, 3, 7, 8), zeros(2, 3, 7, 4))
    q, k, v = (d if x is None else x for x, d in zip((q, k, v), default))
    return (q, k, v, topk), options


BAD_CALLS = {
    "q is a list": (TypeError, "q", call(q=[1.0])),
    "k is None": (TypeError, "k", ((zeros(1, 1, 2, 2), None, zeros(1, 1, 2, 2), 1), {})),
    "v is an array": (TypeError, "v", call(v=zeros(2, 3, 7, 4).numpy())),
    "q of integers": (TypeError, "q", call(q=zeros(2, 3, 5, 8, dtype=torch.int64))),
    "q complex": (TypeError, "q", call(q=zeros(2, 3, 5, 8, dtype=torch.complex64))),
    "q sparse": (NotImplementedError, "q", call(q=zeros(2, 3, 5, 8).to_sparse())),
    "q of three dimensions": (ValueError, "q", call(q=zeros(3, 5, 8))),
    "k of five dimensions": (ValueError, "k", call(k=zeros(1, 2, 3, 7, 8))),
    "k of another dtype": (TypeError, "k", call(k=zeros(2, 3, 7, 8, dtype=torch.float64))),
    "v of another dtype": (TypeError, "v", call(v=zeros(2, 3, 7, 4, dtype=torch.float16))),
    "v on another device": (ValueError, "v", call(v=zeros(2, 3, 7, 4, device="meta"))),
    "k of another head dimension": (ValueError, "k", call(k=zeros(2, 3, 7, 9))),
    "k of another batch": (ValueError, "k", call(k=zeros(1, 3, 7, 8))),
    "k of other heads": (ValueError, "k", call(k=zeros(2, 1, 7, 8))),
    "v of other keys": (ValueError, "v", call(v=zeros(2, 3, 6, 4))),
    "v of other heads": (ValueError, "v", call(v=zeros(2, 4, 7, 4))),
    "no keys": (ValueError, "k", call(k=zeros(2, 3, 0, 8), v=zeros(2, 3, 0, 4))),
    "no columns in q": (ValueError, "q", call(q=zeros(2, 3, 5, 0), k=zeros(2, 3, 7, 0))),
    "no columns in v": (ValueError, "v", call(v=zeros(2, 3, 7, 0))),
    "topk of zero": (ValueError, "topk", call(topk=0)),
    "topk below zero": (ValueError, "topk", call(topk=-3)),
    "topk a float": (TypeError, "topk", call(topk=2.0)),
    "topk a flag": (TypeError, "topk", call(topk=True)),
    "topk a tensor": (TypeError, "topk", call(topk=torch.tensor(2))),
    "scale a text": (TypeError, "scale", call(scale="1")),
    "scale a tensor": (TypeError, "scale", call(scale=torch.tensor(1.0))),
    "scale infinite": (ValueError, "scale", call(scale=math.inf)),
    "scale NaN": (ValueError, "scale", call(scale=math.nan)),
    "backward unknown": (ValueError, "backward", call(backward="masked")),
    "backward None": (ValueError, "backward", call(backward=None)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    kind, argument, (positional, options) = BAD_CALLS[case]
    with pytest.raises(kind) as raised:
        topk_attention(*positional, **options)
    assert type(raised.value) is kind
    assert f"pyvit.topk_attention: `{argument}`" in str(raised.value)
