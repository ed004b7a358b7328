from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from attention_truth import (
    DTYPES,
    SHAPES,
    assert_selects_largest,
    assert_within,
    counts,
    doubled,
    own_selection,
    rounding_bounds,
    tensors,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_extra_bytes
from torch.autograd import forward_ad

from pyvit.ops import topk_attention
from pyvit.reference import topk_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

NAMES = ("out", "dq", "dk", "dv")


def reference_with_gradients(arguments, selection, grad):
    def function(q, k, v):
        return reference.topk_attention(q, k, v, 0, selection=selection)

    return with_gradients(function, arguments, (grad,))


def assert_accurate(ours, arguments, selection, grad, theirs=None):
    """Ours, float64 to rounding and else to twice (gradients thrice) PyTorch's own error."""
    exact = doubled(arguments)
    truth = reference_with_gradients(exact, selection, grad.double())
    if ours[0].dtype is torch.float64:
        assert_within(ours, truth, rounding_bounds(*exact, selection, (grad,)), NAMES)
        return
    theirs = theirs or reference_with_gradients(arguments, selection, grad)
    for name, *values in zip(NAMES, ours, theirs, truth):
        assert_as_accurate(*values, 2 if name == "out" else 3, name)


# ---- values ---------------------------------------------------------------------------------


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype):
    arguments = tensors(SHAPES[shape], dtype)
    q, k, v = arguments
    grad = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    for topk in counts(k.shape[2]):
        selection = own_selection(q, k, v, topk)
        assert_selects_largest(selection, q, k, topk)
        ours = with_gradients(topk_attention, arguments, (grad,), topk=topk)
        dense = topk >= k.shape[2]
        theirs = (
            with_gradients(F.scaled_dot_product_attention, arguments, (grad,)) if dense else None
        )
        assert_accurate(ours, arguments, selection, grad, theirs)


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["rectangular", "vit", "odd"])
def test_dense_backward_is_that_of_dense_attention(shape, dtype):
    arguments = tensors(SHAPES[shape], dtype)
    q, k, v = arguments
    topk = k.shape[2] // 6
    grad = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    everything = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    out, *gradients = with_gradients(
        topk_attention, arguments, (grad,), topk=topk, backward="dense"
    )
    assert torch.equal(out, topk_attention(q, k, v, topk))
    dense_out = topk_attention(q, k, v, k.shape[2])
    theirs = with_gradients(F.scaled_dot_product_attention, arguments, (grad,))
    assert_accurate((dense_out, *gradients), arguments, everything, grad, theirs)


def test_reference_is_attention():
    q, k, v = tensors(SHAPES["vit"], torch.float64)
    out = reference.topk_attention(q, k, v, 197)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    nearest = (q @ k.transpose(-2, -1)).argmax(-1, keepdim=True)
    expected = v.gather(2, nearest.expand(-1, -1, -1, v.shape[3]))
    torch.testing.assert_close(reference.topk_attention(q, k, v, 1), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    size = st.integers(1, 70)
    batch, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.integers(0, 70)), data.draw(size)
    arguments = tensors(
        (batch, heads, queries, keys, data.draw(size), data.draw(size)), torch.float64
    )
    topk = data.draw(st.integers(1, keys + 3))
    grad = torch.randn(batch, heads, queries, arguments[2].shape[3], dtype=torch.float64)
    for backward in ("selected", "dense"):
        ours = with_gradients(topk_attention, arguments, (grad,), topk=topk, backward=backward)
        count = keys if backward == "dense" else topk
        theirs = with_gradients(reference.topk_attention, arguments, (grad,), topk=count)
        out = reference.topk_attention(*arguments, topk)
        for name, mine, other in zip(NAMES, ours, (out, *theirs[1:])):
            torch.testing.assert_close(mine, other, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5, 7])
def test_scale(scale):
    arguments = tensors(SHAPES["small"])
    grad = torch.randn(2, 3, 17, 96)
    selection = own_selection(*arguments, 4, float(scale))
    options = {"scale": scale, "topk": 4}
    truth = with_gradients(
        reference.topk_attention,
        doubled(arguments),
        (grad.double(),),
        selection=selection,
        **options,
    )
    theirs = with_gradients(
        reference.topk_attention, arguments, (grad,), selection=selection, **options
    )
    ours = with_gradients(topk_attention, arguments, (grad,), **options)
    for values in zip(ours, theirs, truth):
        assert_as_accurate(*values, 3)


# ---- selection ------------------------------------------------------------------------------


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype):
    """Small integers make exact scores, most of them tied: sorting stably gives the truth."""
    for keys in (2, 17, 33, 197, 785):
        q = torch.randint(-2, 3, (2, 2, 31, 4)).to(dtype)
        k = torch.randint(-1, 2, (2, 2, keys, 4)).to(dtype)
        v = torch.randn(2, 2, keys, 3).to(dtype)
        for topk in counts(keys):
            expected = reference.select(reference.scores(q, k), topk)
            assert torch.equal(own_selection(q, k, v, topk), expected), (keys, topk)


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "row",
    {
        "equal": lambda n: torch.full((n,), 0.1),
        "zeros of both signs": lambda n: torch.tensor([0.0, -0.0]).repeat(n)[:n],
        "neighbouring floats": lambda n: 1 + torch.arange(n).flip(0) * 2**-23,
        "one far out": lambda n: torch.randn(n).index_fill(0, torch.tensor([n // 2]), 1e6),
        "one very far out": lambda n: torch.randn(n).index_fill(0, torch.tensor([n // 2]), -1e30),
        "two clusters": lambda n: (
            torch.where(torch.arange(n) % 3 > 0, -1e20, 1e20) + torch.randn(n) * 1e15
        ),
        "exponential": lambda n: torch.exp(torch.randn(n) * 20),
        "subnormal": lambda n: torch.randn(n) * 1e-40,
        "squares overflow": lambda n: torch.randn(n) * 1e30,
        "minus infinity": lambda n: torch.randn(n).masked_fill(torch.rand(n) < 0.8, -math.inf),
        "ascending": lambda n: torch.arange(n) * 1.0,
    }.items(),
    ids=lambda row: row[0],
)
def test_rows_that_are_hard_to_cut(row, dtype):
    """q = 1 makes the scores of a row any numbers we like."""
    for n in (16, 17, 197, 1000):
        scores = row[1](n).to(dtype)
        k, q, v = scores.reshape(1, 1, n, 1), torch.ones(1, 1, 1, 1, dtype=dtype), torch.randn(n, 2)
        for topk in counts(n):
            selection = own_selection(q, k, v.to(dtype).reshape(1, 1, n, 2), topk, 1.0)
            expected = reference.select(scores + 0.0, topk)
            assert torch.equal(selection.flatten(), expected), (n, topk)


@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_huge_and_tiny_values(value):
    q, k, v = tensors(SHAPES["vit"])
    grad = torch.randn(2, 2, 197, 64)
    for arguments in ((q * value, k / value, v), (q, k, v * value), (q * value**0.3, k, v)):
        selection = own_selection(*arguments, 16)
        ours = with_gradients(topk_attention, arguments, (grad,), topk=16)
        truth = reference_with_gradients(doubled(arguments), selection, grad.double())
        theirs = reference_with_gradients(arguments, selection, grad)
        for name, *values in zip(NAMES, ours, theirs, truth):
            assert_as_accurate(*values, 3, name)


def test_scores_that_underflow_are_ties():
    q, k, v = tensors((1, 1, 4, 40, 8, 8))
    out = topk_attention(q * 1e-30, k * 1e-30, v, 5)
    torch.testing.assert_close(out, v[:, :, :5].mean(2, keepdim=True).expand_as(out))


# ---- NaN and infinity -----------------------------------------------------------------------


def nan_rows(value):
    return value.isnan().all(-1)


@pytest.mark.accuracy
@pytest.mark.parametrize("topk", [1, 16, 196, 197])
def test_nan_query_stays_in_its_row(topk):
    arguments = tensors(SHAPES["vit"])
    clean = topk_attention(*arguments, topk)
    arguments[0][1, 0, 7, 3] = math.nan
    out = topk_attention(*arguments, topk)
    assert bool(out[1, 0, 7].isnan().all())
    out[1, 0, 7] = clean[1, 0, 7]
    assert torch.equal(out, clean)
    out, dq, *_ = with_gradients(topk_attention, arguments, (clean,), topk=topk)
    expected = torch.zeros(2, 2, 197, dtype=torch.bool)
    expected[1, 0, 7] = True
    assert torch.equal(nan_rows(dq), expected) and torch.equal(dq.isnan().any(-1), expected)


@pytest.mark.parametrize("topk", [1, 16, 197])
def test_nan_key_poisons_its_head_alone(topk):
    arguments = tensors(SHAPES["vit"])
    arguments[1][0, 1, 100, 0] = math.nan
    rows = nan_rows(topk_attention(*arguments, topk))
    expected = torch.zeros(2, 2, 197, dtype=torch.bool)
    expected[0, 1] = True
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("topk", [1, 16, 100, 196])
def test_nan_value_reaches_those_who_chose_it(topk):
    q, k, v = tensors(SHAPES["vit"])
    v[0, 0, 5] = math.nan
    selection = own_selection(q, k, v, topk)
    out = topk_attention(q, k, v, topk)
    expected = torch.zeros(2, 2, 197, dtype=torch.bool)
    expected[0, 0] = selection[0, 0, :, 5]
    assert bool(expected.any())
    assert torch.equal(nan_rows(out), expected) and torch.equal(out.isnan().any(-1), expected)


@pytest.mark.parametrize("topk", [3, 40])
def test_infinite_scores_are_those_of_softmax(topk):
    """A row with a score of +inf is NaN; -inf is a weight of zero."""
    q, v = torch.ones(1, 1, 1, 1), torch.randn(1, 1, 40, 8)
    k = torch.randn(1, 1, 40, 1)
    k[0, 0, 11] = -math.inf
    torch.testing.assert_close(
        topk_attention(q, k, v, topk), reference.topk_attention(q, k, v, topk)
    )
    k[0, 0, 11] = math.inf
    assert bool(topk_attention(q, k, v, topk).isnan().all())


# ---- memory: strides, what is kept, what is needed --------------------------------------------


@pytest.mark.parametrize("topk", [9, 33])
def test_strided_inputs(topk):
    packed = torch.randn(2, 33, 3, 4, 40)
    big = torch.randn(4, 6, 70, 90)
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
        grad = torch.randn(2, 4, 33, arguments[2].shape[3])
        expected = with_gradients(topk_attention, plain, (grad,), topk=topk)
        for g in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2), grad.mT.contiguous().mT):
            ours = with_gradients(topk_attention, arguments, (g,), topk=topk)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected)), name
    expanded = torch.randn(1, 1, 1, 1).expand(2, 4, 33, 9)
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
    # q, k, v, out, its gradient, three gradients; indices, weights, gradients of scores, and
    # the choices by key (three numbers each); row terms where dense.
    known = 8 * tensor + 6 * choices + heads * tokens * 20
    extra = peak_extra_bytes(setup, f"result = work({tokens})", threads) - known
    assert extra <= threads * 2**21, f"{extra / 2**20:.1f} MB"  # a matrix of scores: 67 MB


# ---- determinism ------------------------------------------------------------------------------


@pytest.mark.accuracy
@pytest.mark.parametrize("topk", [16, 100, 197])
@pytest.mark.parametrize("backward", ["selected", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeatable_and_batch_invariant(topk, backward, dtype):
    arguments = tensors((5, 3, 197, 197, 64, 64), dtype)
    grad = torch.randn(5, 3, 197, 64).to(dtype)
    options = {"topk": topk, "backward": backward}
    first = with_gradients(topk_attention, arguments, (grad,), **options)
    for _ in range(3):
        again = with_gradients(topk_attention, arguments, (grad,), **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = with_gradients(topk_attention, arguments, (grad,), **options)
            assert all(torch.equal(a, b) for a, b in zip(first, again)), "depends on threads"
            # One head: fewer heads than threads, so that rows and keys are cut.
            for head in ((slice(2, 3), slice(1, 2)), (slice(4, 5), slice(0, 1))):
                one = with_gradients(
                    topk_attention, [a[head] for a in arguments], (grad[head],), **options
                )
                assert all(torch.equal(a[head], b) for a, b in zip(first, one))
    finally:
        torch.set_num_threads(threads)


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
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_function_without_gradients():
    q, k, v = tensors(SHAPES["small"])
    assert topk_attention(q, k, v, 5).grad_fn is None
    with torch.no_grad():
        assert topk_attention(q.requires_grad_(), k, v, 5).grad_fn is None


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
        arguments = (grad, q, k, v, indices, weights, keys, 0.1, *flags)
        torch.library.opcheck(operations.topk_attention_backward.default, arguments)
    arguments = (grad, None, None, None, indices, weights, keys, 0.1, True, False, False, True)
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
