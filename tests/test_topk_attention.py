from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, max_error
from attention_truth import (
    DTYPES,
    INTERPRETED_SHAPES,
    REFUSED_ON_GPU,
    SHAPES,
    assert_selects_largest,
    assert_within,
    counts,
    difference_bounds,
    doubled,
    own_selection,
    rounding_bounds,
    tensors,
    vit,
    with_gradients,
)
from backends import INTERPRETED, ON_PROCESSOR
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import torch_threads

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


@pytest.mark.interpreted(shape=INTERPRETED_SHAPES, dtype=[torch.float32, torch.bfloat16])
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.refused_on_gpu(shape=REFUSED_ON_GPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, backend):
    arguments = tensors(SHAPES[shape], dtype)
    q, k, v = arguments
    grad = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    few = backend == INTERPRETED and k.shape[2] > 100
    for topk in counts(k.shape[2], few=few):
        selection = own_selection(q, k, v, topk)
        assert_selects_largest(selection, q, k, topk)
        ours = with_gradients(topk_attention, arguments, (grad,), topk=topk)
        dense = topk >= k.shape[2]
        theirs = (
            with_gradients(F.scaled_dot_product_attention, arguments, (grad,)) if dense else None
        )
        assert_accurate(ours, arguments, selection, grad, theirs)


@pytest.mark.interpreted(shape=["rectangular", "odd"], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["rectangular", "vit head", "odd"])
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


@pytest.mark.usefixtures("backend")
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


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype, backend):
    """Small integers make exact scores, most of them tied: sorting stably gives the truth."""
    for keys in (2, 33, 197) if backend == INTERPRETED else (2, 17, 33, 197, 785, 1100):
        q = torch.randint(-2, 3, (2, 2, 31, 4)).to(dtype)
        k = torch.randint(-1, 2, (2, 2, keys, 4)).to(dtype)
        v = torch.randn(2, 2, keys, 3).to(dtype)
        for topk in counts(keys, few=backend == INTERPRETED and keys > 100):
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
def test_rows_that_are_hard_to_cut(row, dtype, backend):
    """q = 1 makes the scores of a row any numbers we like."""
    for n in (17, 197) if backend == INTERPRETED else (16, 17, 197, 1000, 1100):
        scores = row[1](n).to(dtype)
        k, q, v = scores.reshape(1, 1, n, 1), torch.ones(1, 1, 1, 1, dtype=dtype), torch.randn(n, 2)
        for topk in counts(n, few=backend == INTERPRETED):
            selection = own_selection(q, k, v.to(dtype).reshape(1, 1, n, 2), topk, 1.0)
            expected = reference.select(scores + 0.0, topk)
            assert torch.equal(selection.flatten(), expected), (n, topk)


@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_huge_and_tiny_values(value, backend):
    q, k, v = tensors(SHAPES["vit head"])
    grad = torch.randn(1, 1, 40, 64)
    for arguments in ((q * value, k / value, v), (q, k, v * value), (q * value**0.3, k, v)):
        selection = own_selection(*arguments, 16)
        ours = with_gradients(topk_attention, arguments, (grad,), topk=16)
        truth = reference_with_gradients(doubled(arguments), selection, grad.double())
        theirs = reference_with_gradients(arguments, selection, grad)
        bounds = (0.0,) * 4
        if backend != "cpu":  # where one weight is 1, PyTorch's dP - Δ happens to be exactly 0
            bounds = (0.0, *difference_bounds(*doubled(arguments), selection, grad.double()), 0.0)
        for name, mine, other, exact, bound in zip(NAMES, ours, theirs, truth, bounds):
            if max_error(mine, exact) > bound:
                assert_as_accurate(mine, other, exact, 3, name)


@pytest.mark.accuracy
def test_one_key_that_all_queries_choose(backend):
    """The longest sums that dk and dv can have: a term of every query."""
    queries = 300 if backend == INTERPRETED else 3000
    q, k, v = tensors((1, 2, queries, 50, 64, 64))
    k[:, :, 7] = 4 * q.mean(2).sign() + 0.1 * k[:, :, 7]
    q = q + 0.5 * q.mean(2, keepdim=True).sign()
    grad = 1 + torch.randn(1, 2, queries, 64)
    selection = own_selection(q, k, v, 3)
    assert bool(selection[..., 7].float().mean() > 0.99)
    ours = with_gradients(topk_attention, (q, k, v), (grad,), topk=3)
    assert_accurate(ours, (q, k, v), selection, grad)


@pytest.mark.usefixtures("backend")
def test_scores_that_underflow_are_ties():
    q, k, v = tensors((1, 1, 4, 40, 8, 8))
    out = topk_attention(q * 1e-30, k * 1e-30, v, 5)
    torch.testing.assert_close(out, v[:, :, :5].mean(2, keepdim=True).expand_as(out))


# ---- NaN and infinity -----------------------------------------------------------------------


def nan_rows(value):
    return value.isnan().all(-1)


@pytest.mark.interpreted(topk=[16, 197])
@pytest.mark.accuracy
@pytest.mark.parametrize("topk", [1, 16, 196, 197])
def test_nan_query_stays_in_its_row(topk, backend):
    arguments = tensors(vit(backend))
    clean = topk_attention(*arguments, topk)
    arguments[0][1, 0, 7, 3] = math.nan
    out = topk_attention(*arguments, topk)
    assert bool(out[1, 0, 7].isnan().all())
    out[1, 0, 7] = clean[1, 0, 7]
    assert torch.equal(out, clean)
    out, dq, *_ = with_gradients(topk_attention, arguments, (clean,), topk=topk)
    expected = torch.zeros(vit(backend)[:3], dtype=torch.bool)
    expected[1, 0, 7] = True
    assert torch.equal(nan_rows(dq), expected) and torch.equal(dq.isnan().any(-1), expected)


@pytest.mark.interpreted(topk=[16])
@pytest.mark.parametrize("topk", [1, 16, 197])
def test_nan_key_poisons_its_head_alone(topk, backend):
    arguments = tensors(vit(backend))
    arguments[1][0, 1, 20, 0] = math.nan
    rows = nan_rows(topk_attention(*arguments, topk))
    expected = torch.zeros(vit(backend)[:3], dtype=torch.bool)
    expected[0, 1] = True
    assert torch.equal(rows, expected)


@pytest.mark.interpreted(topk=[16])
@pytest.mark.parametrize("topk", [1, 16, 100, 196])
def test_nan_value_reaches_those_who_chose_it(topk, backend):
    q, k, v = tensors(vit(backend))
    v[0, 0, 5] = math.nan
    selection = own_selection(q, k, v, topk)
    out = topk_attention(q, k, v, topk)
    expected = torch.zeros(vit(backend)[:3], dtype=torch.bool)
    expected[0, 0] = selection[0, 0, :, 5]
    assert bool(expected.any())
    assert torch.equal(nan_rows(out), expected) and torch.equal(out.isnan().any(-1), expected)


@pytest.mark.usefixtures("backend")
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


# ---- determinism ------------------------------------------------------------------------------


@pytest.mark.accuracy
@pytest.mark.interpreted(topk=[16, 197])
@pytest.mark.parametrize("topk", [16, 100, 197])
@pytest.mark.parametrize("backward", ["selected", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeatable_and_batch_invariant(topk, backward, dtype, backend):
    batch, heads, tokens = (3, 1, 40) if backend in ON_PROCESSOR else (5, 3, 197)
    arguments = tensors((batch, heads, tokens, tokens, 64, 64), dtype)
    grad = torch.randn(batch, heads, tokens, 64).to(dtype)
    options = {"topk": min(topk, tokens), "backward": backward}
    first = with_gradients(topk_attention, arguments, (grad,), **options)
    for _ in range(1 if backend in ON_PROCESSOR else 3):
        again = with_gradients(topk_attention, arguments, (grad,), **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for count in (1,) if backend != "cpu" else (1, 3):
        with torch_threads(count):
            # One head: fewer heads than threads, so that rows and keys are cut.
            for head in ((slice(2, 3), slice(heads - 1, heads)), (slice(0, 1), slice(0, 1))):
                alone = [a[head] for a in arguments]
                one = with_gradients(topk_attention, alone, (grad[head],), **options)
                assert all(torch.equal(a[head], b) for a, b in zip(first, one))


@pytest.mark.accuracy
@pytest.mark.parametrize("backward", ["selected", "dense"])
def test_independent_of_threads(backward):
    arguments = tensors((2, 3, 197, 197, 64, 64), torch.float32)
    grad = torch.randn(2, 3, 197, 64)
    options = {"topk": 16, "backward": backward}
    first = with_gradients(topk_attention, arguments, (grad,), **options)
    for count in (1, 3):
        with torch_threads(count):
            again = with_gradients(topk_attention, arguments, (grad,), **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
