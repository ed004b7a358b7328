from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from attention_truth import (
    DTYPES,
    INTERPRETED_SHAPES,
    REFUSED_ON_GPU,
    SHAPES,
    assert_within,
    counts,
    doubled,
    own_selection,
    rounding_bounds,
    tensors,
    unpacked,
    vit,
    with_gradients,
)
from backends import INTERPRETED, ON_PROCESSOR
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_extra_bytes
from threads import torch_threads

from pyvit.ops import attention_with_penalty
from pyvit.reference import topk_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

NAMES = ("out", "tail_energy", "hoyer", "dq", "dk", "dv")


def grads_like(arguments):
    """Gradients of the three results; the terms' in the type they are computed in."""
    q, _, v = arguments
    compute = torch.promote_types(q.dtype, torch.float32)
    terms = (torch.randn(q.shape[:3], dtype=compute) for _ in range(2))
    return (torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), *terms)


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(shape=INTERPRETED_SHAPES, dtype=[torch.float32, torch.bfloat16])
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.refused_on_gpu(shape=REFUSED_ON_GPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype):
    arguments = tensors(SHAPES[shape], dtype)
    keys = arguments[1].shape[2]
    grads = grads_like(arguments)
    for topk in (1, max(1, keys // 6), keys + 5):
        options = {"topk": topk, "selection": own_selection(*arguments, topk)}
        function = reference.attention_with_penalty
        truth = with_gradients(function, doubled(arguments), doubled(grads), **options)
        ours = with_gradients(attention_with_penalty, arguments, grads, topk=topk)
        assert ours[1].dtype == ours[2].dtype == grads[1].dtype
        if dtype is torch.float64:
            everything = torch.ones_like(options["selection"])
            assert_within(ours, truth, rounding_bounds(*arguments, everything, grads), NAMES)
            continue
        theirs = with_gradients(function, arguments, grads, **options)
        for name, *values in zip(NAMES, ours, theirs, truth):
            assert_as_accurate(*values, 3 if name.startswith("d") else 2, name)


def test_reference_by_hand():
    """One query, weights 1/2, 1/4, 1/8, 1/8."""
    k = torch.log(torch.tensor([2.0, 1.0, 4.0, 1.0], dtype=torch.float64)).reshape(1, 1, 4, 1)
    q = v = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    v = v.expand(1, 1, 4, 1)
    for function in (reference.attention_with_penalty, attention_with_penalty):
        out, tail_energy, hoyer = function(q, k, v, 2, scale=1.0)
        norm = math.sqrt(1 / 4 + 1 / 16 + 2 / 64)
        assert out.item() == pytest.approx(1)
        assert tail_energy.item() == pytest.approx(2 / 64)
        assert hoyer.item() == pytest.approx(2 - 1 / norm)


@pytest.mark.usefixtures("backend")
def test_attention_is_dense():
    arguments = tensors(SHAPES["vit head"])
    grad = torch.randn(1, 1, 40, 64)
    none = torch.zeros(1, 1, 40)
    ours = with_gradients(attention_with_penalty, arguments, (grad, none, none), topk=16)
    theirs = with_gradients(F.scaled_dot_product_attention, arguments, (grad,))
    truth = with_gradients(F.scaled_dot_product_attention, doubled(arguments), (grad.double(),))
    for name, *values in zip(("out", "dq", "dk", "dv"), (ours[0], *ours[3:]), theirs, truth):
        assert_as_accurate(*values, 3, name)


@pytest.mark.usefixtures("backend")
def test_extremes():
    v = torch.randn(1, 1, 16, 4)
    even = torch.zeros(1, 1, 16, 2)
    out, tail_energy, hoyer = attention_with_penalty(even[:, :, :3], even, v, 4)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(tail_energy, torch.full((1, 1, 3), 12 / 256))
    torch.testing.assert_close(hoyer, torch.zeros(1, 1, 3))
    alone = even.clone()
    alone[0, 0, 9] = 100.0
    _, tail_energy, hoyer = attention_with_penalty(torch.ones(1, 1, 3, 2), alone, v, 1)
    assert not tail_energy.any()
    torch.testing.assert_close(hoyer, torch.ones(1, 1, 3))
    _, tail_energy, hoyer = attention_with_penalty(even[:, :, :3], even[:, :, :1], v[:, :, :1], 1)
    assert not tail_energy.any() and bool((hoyer == 1).all()), "one key"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    size = st.integers(1, 70)
    shape = (data.draw(st.integers(0, 3)), 2, data.draw(st.integers(0, 70)))
    arguments = tensors((*shape, *(data.draw(size) for _ in range(3))), torch.float64)
    topk = data.draw(st.integers(1, arguments[1].shape[2] + 3))
    grads = grads_like(arguments)
    ours = with_gradients(attention_with_penalty, arguments, grads, topk=topk)
    theirs = with_gradients(reference.attention_with_penalty, arguments, grads, topk=topk)
    for name, mine, other in zip(NAMES, ours, theirs):
        torch.testing.assert_close(mine, other, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_saved_selection_is_exact(backend):
    """Bits, ties to the lowest index, any number of keys."""
    for keys in (1, 7, 8, 31, 33, 197):
        q = torch.randint(-2, 3, (2, 2, 9, 4)).float()
        k = torch.randint(-1, 2, (2, 2, keys, 4)).float()
        for topk in counts(keys, few=backend == INTERPRETED and keys > 10):
            *_, bits = torch.ops.pyvit.attention_with_penalty(q, k, k, topk, 1.0, True)
            assert bits.shape == (2, 2, 9, (keys + 7) // 8)
            expected = reference.select(reference.scores(q, k, 1.0), topk)
            assert torch.equal(unpacked(bits, keys), expected), (keys, topk)


@pytest.mark.usefixtures("backend")
def test_strided_inputs_and_gradients():
    packed = torch.randn(2, 33, 3, 4, 40)
    arguments = packed.permute(2, 0, 3, 1, 4).unbind(0)
    grad = torch.randn(2, 33, 4, 40).transpose(1, 2)
    term = torch.randn(2, 33, 4).transpose(1, 2)
    ours = with_gradients(attention_with_penalty, arguments, (grad, term, term), topk=5)
    plain = [a.contiguous() for a in arguments]
    grads = (grad.contiguous(), term.contiguous(), term.contiguous())
    expected = with_gradients(attention_with_penalty, plain, grads, topk=5)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    expanded = (
        grad[:1, :1, :1, :1].expand(2, 4, 33, 40),
        *(term[:1, :1, :1].expand(2, 4, 33),) * 2,
    )
    ours = with_gradients(attention_with_penalty, plain, expanded, topk=5)
    grads = [g.contiguous() for g in expanded]
    expected = with_gradients(attention_with_penalty, plain, grads, topk=5)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.accuracy
def test_nan_query_stays_in_its_row(backend):
    arguments = tensors(vit(backend))
    clean = attention_with_penalty(*arguments, 16)
    arguments[0][1, 0, 7, 3] = math.nan
    expected = torch.zeros(vit(backend)[:3], dtype=torch.bool)
    expected[1, 0, 7] = True
    for result, before in zip(attention_with_penalty(*arguments, 16), clean):
        rows = result.isnan().reshape(*vit(backend)[:3], -1)
        assert torch.equal(rows.all(-1), expected) and torch.equal(rows.any(-1), expected)
        assert torch.equal(result[~expected], before[~expected])


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeatable_and_batch_invariant(dtype, backend):
    batch, heads, tokens = (3, 1, 40) if backend in ON_PROCESSOR else (5, 3, 197)
    arguments = tensors((batch, heads, tokens, tokens, 64, 64), dtype)
    grads = grads_like(arguments)
    first = with_gradients(attention_with_penalty, arguments, grads, topk=16)
    for _ in range(1 if backend in ON_PROCESSOR else 3):
        again = with_gradients(attention_with_penalty, arguments, grads, topk=16)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for count in (1,) if backend != "cpu" else (1, 3):
        with torch_threads(count):
            head = (slice(2, 3), slice(heads - 1, heads))
            alone = [a[head] for a in arguments], [g[head] for g in grads]
            one = with_gradients(attention_with_penalty, *alone, topk=16)
            assert all(torch.equal(a[head], b) for a, b in zip(first, one))


# What is kept besides the inputs: a bit a key where a gradient goes through the weights.
SAVED = {"q": ("qkv", True), "k": ("qkv", True), "v": ("qk", False), "qkv": ("qkv", True)}


@pytest.mark.parametrize("wanted", SAVED)
def test_what_is_kept(wanted):
    arguments = dict(zip("qkv", tensors(SHAPES["vit"])))
    full = {n: a.clone().requires_grad_() for n, a in arguments.items()}
    sum(r.square().sum() for r in attention_with_penalty(**full, topk=16)).backward()
    for name in wanted:
        arguments[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = attention_with_penalty(**arguments, topk=16)
    pointers = {a.data_ptr(): n for n, a in arguments.items()}
    inputs = {pointers[t.data_ptr()] for t in kept if t.data_ptr() in pointers}
    others = sum(t.nbytes for t in kept if t.data_ptr() not in pointers)
    names, bits = SAVED[wanted]
    assert inputs == set(names)
    assert others == (2 * 2 * 197 * 25 if bits else 0)
    sum(r.square().sum() for r in results).backward()
    for name in wanted:
        assert torch.equal(arguments[name].grad, full[name].grad), name


def test_no_matrix_of_scores_in_memory():
    threads, heads, tokens = 2, 4, 2048
    setup = f"""
        from pyvit.ops import attention_with_penalty
        def work(n):
            leaves = [torch.randn(1, {heads}, n, 64, requires_grad=True) for _ in range(3)]
            results = attention_with_penalty(*leaves, 16)
            grads = [torch.ones_like(r) for r in results]
            return leaves, torch.autograd.grad(results, leaves, grads)
        work(64)
    """
    # q, k, v, out, its gradient, three gradients; the selection; terms of rows and gradients.
    known = 8 * heads * tokens * 64 * 4 + heads * tokens * (tokens // 8 + 40)
    extra = peak_extra_bytes(setup, f"result = work({tokens})", threads) - known
    assert extra <= threads * 2**21, f"{extra / 2**20:.1f} MB"  # a matrix of scores: 67 MB


@pytest.mark.parametrize("topk", [1, 3, 9])
def test_gradcheck(topk):
    arguments = [a.requires_grad_() for a in tensors((2, 1, 5, 9, 4, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: attention_with_penalty(*a, topk), arguments)


def test_second_derivative_is_refused():
    q, k, v = tensors(SHAPES["small"])
    hoyer = attention_with_penalty(q.requires_grad_(), k, v, 3)[2]
    (grad,) = torch.autograd.grad(hoyer.square().sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"pyvit\.attention_with_penalty: second derivatives"
    ):
        grad.sum().backward()


def test_no_function_without_gradients():
    assert all(r.grad_fn is None for r in attention_with_penalty(*tensors(SHAPES["small"]), 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    q, k, v = tensors(SHAPES["rectangular"], dtype)
    for topk, save in ((7, True), (7, False), (60, True)):
        arguments = (q, k, v, topk, 0.1, save)
        torch.library.opcheck(torch.ops.pyvit.attention_with_penalty.default, arguments)
    grad, tail, hoyer, bits = torch.ops.pyvit.attention_with_penalty(q, k, v, 7, 0.1, True)
    for flags in ((True, True, True, True), (False, False, True, False)):
        arguments = (grad, q, k, v, tail, hoyer, bits, 0.1, *flags)
        torch.library.opcheck(torch.ops.pyvit.attention_dense_backward.default, arguments)


def test_compile():
    def loss(q, k, v):
        out, tail_energy, hoyer = attention_with_penalty(q, k, v, 5)
        return out.square().sum() + tail_energy.sum() + hoyer.square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [a.clone().requires_grad_() for a in tensors(SHAPES["small"])]
        torch.manual_seed(0)
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
        torch.manual_seed(0)
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager)


def test_autocast_and_meta():
    arguments = tensors(SHAPES["small"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, tail_energy, hoyer = attention_with_penalty(*arguments, 5)
    assert (out.dtype, tail_energy.dtype, hoyer.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    q, k, v = (a.to("meta") for a in arguments)
    shapes = [tuple(r.shape) for r in attention_with_penalty(q, k, v, 5)]
    assert shapes == [(2, 3, 17, 96), (2, 3, 17), (2, 3, 17)]


def zeros(*size, **options):
    return torch.zeros(*size, **options)


BAD_CALLS = {
    "q is a number": (TypeError, "q", {"q": 1.0}),
    "q of integers": (TypeError, "q", {"q": zeros(2, 3, 5, 8, dtype=torch.int32)}),
    "q of two dimensions": (ValueError, "q", {"q": zeros(5, 8)}),
    "k of another dtype": (TypeError, "k", {"k": zeros(2, 3, 7, 8, dtype=torch.float16)}),
    "k of another head dimension": (ValueError, "k", {"k": zeros(2, 3, 7, 9)}),
    "k of other heads": (ValueError, "k", {"k": zeros(2, 2, 7, 8)}),
    "no keys": (ValueError, "k", {"k": zeros(2, 3, 0, 8), "v": zeros(2, 3, 0, 4)}),
    "v of other keys": (ValueError, "v", {"v": zeros(2, 3, 8, 4)}),
    "v on another device": (ValueError, "v", {"v": zeros(2, 3, 7, 4, device="meta")}),
    "topk of zero": (ValueError, "topk", {"topk": 0}),
    "topk a float": (TypeError, "topk", {"topk": 3.0}),
    "scale a list": (TypeError, "scale", {"scale": [0.5]}),
    "scale infinite": (ValueError, "scale", {"scale": -math.inf}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    kind, argument, changed = BAD_CALLS[case]
    good = {"q": zeros(2, 3, 5, 8), "k": zeros(2, 3, 7, 8), "v": zeros(2, 3, 7, 4), "topk": 2}
    with pytest.raises(kind) as raised:
        attention_with_penalty(**{**good, **changed})
    assert type(raised.value) is kind
    assert f"pyvit.attention_with_penalty: `{argument}`" in str(raised.value)
