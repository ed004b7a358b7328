"""projected_step as a PyTorch op: layouts, batches, tracing, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_as_accurate
from projected_step_checks import DTYPES, NORMS, eager_chain, sizes, tensors

from pyvit.ops import projected_step

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


LAYOUTS = {
    "nchw": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize(
    "norm, dtype",
    [
        *[(norm, torch.float32) for norm in NORMS],
        # L1 not: bfloat16 gradients tie, and ties are resolved in the order of memory.
        *[(norm, torch.bfloat16) for norm in ("linf", "l2")],
    ],
    ids=str,
)
def test_any_layout(norm, dtype):
    arguments = tensors((3, 3, 11, 17), dtype)
    options = sizes(norm, arguments[0].shape) | dict(quantile=0.9)
    x, grad, x0, before = arguments
    contiguous = projected_step(x, grad, x0, momentum=before, **options)
    truth = [t.double() for t in contiguous]
    for name, layout in LAYOUTS.items():
        for other in LAYOUTS.values():
            x, grad, x0, before = (f(t) for f, t in zip((layout, other, layout, other), arguments))
            y, after = projected_step(x, grad, x0, momentum=before, **options)
            if norm == "linf":
                assert torch.equal(y, contiguous[0]), name
            assert_as_accurate(y, contiguous[0], truth[0], 2, name)
            assert_as_accurate(after, contiguous[1], truth[1], 2, name)
            if name in ("nchw", "channels_last", "transposed", "batch last"):
                assert y.stride() == x.stride(), name


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(3, 3, 11, 17), (4, 2, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linf_of_any_layout_without_momentum(dtype, shape):
    """Then the images of a batch may be walked over as one."""
    x, grad, x0, _ = tensors(shape, dtype)
    expected = eager_chain(x, grad, x0, 0.01, 0.03, False)
    for layout in LAYOUTS.values():
        for other in LAYOUTS.values():
            for operands in ((layout, other, layout), (layout, layout, other)):
                arguments = [f(t) for f, t in zip(operands, (x, grad, x0))]
                ours = projected_step(*arguments, norm="linf", step_size=0.01, eps=0.03)
                assert torch.equal(ours, expected)


@pytest.mark.usefixtures("backend")
def test_expanded_inputs():
    x0 = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    grad = torch.randn(4, 1, 1, 8).expand(-1, 3, 8, -1)
    for norm in NORMS:
        y = projected_step(x0, grad, x0, norm=norm, step_size=0.1, eps=0.05)
        copies = (x0.contiguous(), grad.contiguous(), x0.contiguous())
        expected = projected_step(*copies, norm=norm, step_size=0.1, eps=0.05)
        torch.testing.assert_close(y, expected, rtol=0, atol=1.2e-7)


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.interpreted(shape=[(2, 3, 40, 40)])
@pytest.mark.parametrize(
    "shape", [(7, 3, 100, 90), (3, 5, 8, 8), (2, 3, 200, 200), (2, 3, 40, 40)], ids=str
)
def test_repeatable_and_batch_invariant(shape, layout, norm):
    arguments = [LAYOUTS[layout](t) for t in tensors(shape)]
    arguments[1] = LAYOUTS["nchw"](arguments[1].contiguous())
    options = sizes(norm, shape) | dict(decay=0.7)

    def step(images=slice(None)):
        x, grad, x0, before = (t[images] for t in arguments)
        return projected_step(x, grad, x0, momentum=before, **options)

    first = step()
    assert all(torch.equal(a, b) for a, b in zip(first, step()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(first, step())), "depends on threads"
    finally:
        torch.set_num_threads(threads)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        assert all(torch.equal(a[one], b) for a, b in zip(first, step(one)))
    backwards = step(torch.arange(shape[0] - 1, -1, -1))
    assert torch.equal(first[1].flip(0), backwards[1])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", NORMS)
def test_nan_stays_in_its_image(norm):
    x, grad, x0, before = tensors((3, 3, 70, 40))
    options = sizes(norm, x.shape)
    clean = projected_step(x, grad, x0, momentum=before, **options)
    plain = projected_step(x, grad, x0, **options)
    for poisoned in (x, grad, x0):
        kept = poisoned[1, 0, 5, 5].item()
        poisoned[1, 0, 5, 5] = float("nan")
        with_momentum = projected_step(x, grad, x0, momentum=before, **options)
        without = projected_step(x, grad, x0, **options)
        for ours, expected in zip((*with_momentum, without), (*clean, plain)):
            assert torch.equal(ours[[0, 2]], expected[[0, 2]])
        if norm != "linf":
            assert without[1].isnan().all()
        elif poisoned is grad:  # sign(NaN) is 0: the pixel stays, the others move
            assert without[1, 0, 5, 5] == torch.clamp(x[1, 0, 5, 5], 0, 1)
        else:
            assert without.isnan().sum() == 1
        poisoned[1, 0, 5, 5] = kept


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", NORMS)
def test_one_value_an_image(norm):
    x, grad, x0, _ = tensors((4, 3, 9, 9))
    steps = torch.tensor([0.01, 0.3, 0.0, 0.5])
    eps = torch.tensor([0.5, 0.01, 1.0, math.inf])
    together = projected_step(x, grad, x0, norm=norm, step_size=steps, eps=eps)
    for i in range(4):
        one = (x[i : i + 1], grad[i : i + 1], x0[i : i + 1])
        alone = projected_step(*one, norm=norm, step_size=float(steps[i]), eps=float(eps[i]))
        assert torch.equal(together[i : i + 1], alone)
    mixed = projected_step(x, grad, x0, norm=norm, step_size=steps.double()[:, None][:, 0], eps=0.2)
    for i in range(4):
        one = (x[i : i + 1], grad[i : i + 1], x0[i : i + 1])
        alone = projected_step(*one, norm=norm, step_size=float(steps[i]), eps=0.2)
        assert torch.equal(mixed[i : i + 1], alone)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", NORMS)
def test_without_a_ball(norm):
    x, grad, x0, _ = tensors((2, 3, 9, 9))
    options = dict(norm=norm, step_size=0.4, eps=math.inf, bounds=(-math.inf, math.inf))
    y = projected_step(x, grad, torch.rand_like(x0), **options)
    if norm == "linf":
        assert torch.equal(y, x + 0.4 * grad.sign())
    length = torch.linalg.vector_norm((y - x).flatten(1), 2 if norm == "l2" else 1, dim=1)
    if norm != "linf":
        torch.testing.assert_close(length, torch.full_like(length, 0.4), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("step", ["sign", "raw"])
@pytest.mark.parametrize("lo", [-math.inf, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l1_without_bounds_is_l1_with_far_bounds(dtype, lo, step):
    x, grad, x0, _ = tensors((3, 3, 17, 19), dtype)
    options = dict(norm="l1", step_size=5.0, eps=4.0, step=step)
    y = projected_step(x, grad, x0, bounds=(lo, math.inf), **options)
    far = projected_step(x, grad, x0, bounds=(max(lo, -1e4), 1e4), **options)
    assert torch.equal(y, far) and not torch.equal(y, x0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (0,)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_empty(norm, shape):
    x = torch.rand(shape)
    y, after = projected_step(x, x, x, norm=norm, step_size=0.1, eps=0.1, momentum=x)
    assert y.shape == after.shape == x.shape
    steps = torch.zeros(shape[0])
    assert projected_step(x, x, x, norm=norm, step_size=steps, eps=steps).shape == x.shape


@pytest.mark.usefixtures("backend")
def test_arguments_stay_and_no_graph_is_made():
    arguments = [t.requires_grad_() for t in tensors((2, 3, 9, 9))]
    copies = [t.detach().clone() for t in arguments]
    x, grad, x0, before = arguments
    for norm in NORMS:
        y, after = projected_step(x, grad, x0, norm=norm, step_size=0.1, eps=0.2, momentum=before)
        assert not y.requires_grad and not after.requires_grad
        assert not projected_step(x, grad, x0, norm=norm, step_size=0.1, eps=0.2).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_opcheck(layout):
    x, grad, x0, before = (LAYOUTS[layout](t) for t in tensors((2, 3, 9, 8)))
    steps = torch.full((2,), 0.1, dtype=torch.float64)
    operations = torch.ops.pyvit
    for norm in range(3):
        arguments = (x, grad, x0, norm, False, True, 0.1, 0.2, None, steps, 0.0, 1.0, 0.9)
        torch.library.opcheck(operations.projected_step.default, arguments)
        arguments += (before, 0.5)
        torch.library.opcheck(operations.projected_step_momentum.default, arguments)


def test_compile():
    x, grad, x0, before = tensors((2, 3, 9, 9))

    def step(x, grad, x0, before):
        y, after = projected_step(
            x, grad * 2, x0, norm="linf", step_size=0.01, eps=0.02, momentum=before
        )
        return y * 2, after

    compiled = torch.compile(step, fullgraph=True)
    for eager, graph in zip(step(x, grad, x0, before), compiled(x, grad, x0, before)):
        torch.testing.assert_close(graph, eager)


def test_compiled_step_takes_other_numbers():
    """torch.compile makes a number symbolic once it has seen a second value."""
    x, grad, x0, _ = tensors((2, 3, 9, 9))

    def step(step_size, eps):
        return projected_step(x, grad, x0, norm="linf", step_size=step_size, eps=eps)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for numbers in ((0.1, 0.2), (0.2, 0.3), (0.3, 0.25)):
        assert torch.equal(compiled(*numbers), step(*numbers))


def test_meta_tensors():
    x = torch.empty(2, 3, 8, 8, device="meta").to(memory_format=torch.channels_last)
    y = projected_step(x, x, x, norm="l2", step_size=0.1, eps=0.1)
    assert y.shape == x.shape and y.stride() == x.stride() and y.device.type == "meta"


BAD_CALLS = {
    "x is a number": (TypeError, "x", dict(x=0.5)),
    "x of integers": (TypeError, "x", dict(x=torch.zeros(2, 3, dtype=torch.uint8))),
    "x without a batch": (ValueError, "x", dict(x=torch.tensor(0.5))),
    "x sparse": (NotImplementedError, "x", dict(x=torch.zeros(2, 3).to_sparse())),
    "grad missing": (TypeError, "grad", dict(grad=None)),
    "grad of another dtype": (TypeError, "grad", dict(grad=torch.zeros(2, 3).half())),
    "grad of another shape": (ValueError, "grad", dict(grad=torch.zeros(2, 4))),
    "grad to be broadcast": (ValueError, "grad", dict(grad=torch.zeros(1, 3))),
    "grad on another device": (ValueError, "grad", dict(grad=torch.zeros(2, 3, device="meta"))),
    "x0 of another shape": (ValueError, "x0", dict(x0=torch.zeros(3, 2))),
    "x0 of another dtype": (TypeError, "x0", dict(x0=torch.zeros(2, 3).double())),
    "momentum is a number": (TypeError, "momentum", dict(momentum=0.9)),
    "momentum of another shape": (ValueError, "momentum", dict(momentum=torch.zeros(2, 1))),
    "norm unknown": (ValueError, "norm", dict(norm="Linf")),
    "norm is a number": (ValueError, "norm", dict(norm=2)),
    "step_size negative": (ValueError, "step_size", dict(step_size=-0.1)),
    "step_size NaN": (ValueError, "step_size", dict(step_size=math.nan)),
    "step_size infinite": (ValueError, "step_size", dict(step_size=math.inf)),
    "step_size a text": (TypeError, "step_size", dict(step_size="2/255")),
    "step_size of another batch": (ValueError, "step_size", dict(step_size=torch.zeros(3))),
    "step_size of two dimensions": (ValueError, "step_size", dict(step_size=torch.zeros(2, 1))),
    "step_size of integers": (
        TypeError,
        "step_size",
        dict(step_size=torch.zeros(2, dtype=torch.int64)),
    ),
    "eps negative": (ValueError, "eps", dict(eps=-1)),
    "eps NaN": (ValueError, "eps", dict(eps=math.nan)),
    "eps missing": (TypeError, "eps", dict(eps=None)),
    "eps on another device": (ValueError, "eps", dict(eps=torch.zeros(2, device="meta"))),
    "bounds is a number": (TypeError, "bounds", dict(bounds=1.0)),
    "bounds of three": (TypeError, "bounds", dict(bounds=(0, 1, 2))),
    "bounds of texts": (TypeError, "bounds", dict(bounds=("0", "1"))),
    "bounds the wrong way round": (ValueError, "bounds", dict(bounds=(1.0, 0.0))),
    "bounds NaN": (ValueError, "bounds", dict(bounds=(math.nan, 1.0))),
    "targeted is a number": (TypeError, "targeted", dict(targeted=1)),
    "decay NaN": (ValueError, "decay", dict(decay=math.nan)),
    "step unknown": (ValueError, "step", dict(step="gradient")),
    "quantile 1": (ValueError, "quantile", dict(quantile=1.0)),
    "quantile negative": (ValueError, "quantile", dict(quantile=-0.1)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    error, argument, changed = BAD_CALLS[case]
    arguments = dict(
        x=torch.zeros(2, 3),
        grad=torch.zeros(2, 3),
        x0=torch.zeros(2, 3),
        norm="linf",
        step_size=0.1,
        eps=0.1,
    )
    with pytest.raises(error, match=rf"pyvit\.projected_step: `{argument}` must be .*; got "):
        projected_step(**(arguments | changed))
