"""projected_step: steps and projections in every norm."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from projected_step_checks import DTYPES, NORMS, SHAPES, SMALL_SHAPES, eager_chain, sizes, tensors

from pyvit.ops import projected_step
from pyvit.reference.projected_step import projected_step as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@pytest.mark.interpreted(shape=SMALL_SHAPES)
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_is_the_eager_chain_bit_for_bit(dtype, shape, targeted):
    x, grad, x0, _ = tensors(shape, dtype)
    for step_size, eps in ((2 / 255, 8 / 255), (0.3, 0.1), (1e-3, 0.0), (0.0, 0.5), (3.0, 3.0)):
        ours = projected_step(
            x, grad, x0, norm="linf", step_size=step_size, eps=eps, targeted=targeted
        )
        assert torch.equal(ours, eager_chain(x, grad, x0, step_size, eps, targeted))


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_of_every_16_bit_pattern(dtype):
    """Rounding, subnormals, infinities and signed zeros as in PyTorch, 65536 numbers at once."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype if dtype.itemsize == 2 else torch.bfloat16).to(dtype).reshape(4, -1)
    grad, x0 = torch.randn(x.shape).to(dtype), torch.rand(x.shape).to(dtype)
    ours = projected_step(x, grad, x0, norm="linf", step_size=0.01, eps=0.03)
    theirs = eager_chain(x, grad, x0, 0.01, 0.03, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    ours = projected_step(x0, x, x0, norm="linf", step_size=0.01, eps=0.03)
    assert torch.equal(ours, eager_chain(x0, x, x0, 0.01, 0.03, False))


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_raw_step_is_the_eager_chain_bit_for_bit(dtype):
    x, grad, x0, _ = tensors((3, 3, 17, 19), dtype)
    options = dict(norm="linf", step_size=0.013, eps=8 / 255, step="raw")
    ours = projected_step(x, grad, x0, **options)
    assert torch.equal(ours, reference(x, grad, x0, **options))


@pytest.mark.interpreted(shape=SMALL_SHAPES, dtype=[torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("step", ["sign", "raw"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_and_l1_against_float64(dtype, shape, norm, step):
    x, grad, x0, _ = tensors(shape, dtype)
    for targeted in (False, True):
        options = sizes(norm, shape) | dict(targeted=targeted, step=step, quantile=0.7)
        ours = projected_step(x, grad, x0, **options)
        theirs = reference(x, grad, x0, **options)
        truth = reference(x.double(), grad.double(), x0.double(), **options)
        if dtype is torch.float64:
            # The reference's own roundings are as large as ours: four, of numbers up to 1 or
            # to the longest move.
            largest = max(1.0, options["step_size"] * float(grad.abs().max()))
            assert float((ours - truth).abs().max()) <= 4 * torch.finfo(dtype).eps * largest
        else:
            assert_as_accurate(ours, theirs, truth, 2)


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum(dtype, norm):
    x, grad, x0, before = tensors((3, 3, 70, 40), dtype)
    options = sizes(norm, x.shape) | dict(targeted=True)
    y, after = projected_step(x, grad, x0, momentum=before, decay=0.9, **options)
    exact = grad.double() / grad.double().abs().mean((1, 2, 3), keepdim=True)
    truth = exact + 0.9 * before.double()
    eager = grad / grad.abs().mean((1, 2, 3), keepdim=True) + before * 0.9
    assert_as_accurate(after, eager, truth, 2, "momentum")
    assert torch.equal(y, projected_step(x, after, x0, **options))


@pytest.mark.interpreted(norm=[])
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sums_of_a_large_image(norm):
    """CUDA kernels give each block more of an image that would have too many of them."""
    x, grad, x0, before = tensors((2, 512 * 4096 + 4099))
    options = sizes(norm, x.shape)
    y, after = projected_step(x, grad, x0, momentum=before, **options)
    truth = grad.double() / grad.double().abs().mean(1, keepdim=True) + before.double()
    eager = grad / grad.abs().mean(1, keepdim=True) + before
    assert_as_accurate(after, eager, truth, 2, "momentum")
    wide = [t.double() for t in (x, after, x0)]
    assert_as_accurate(y, reference(x, after, x0, **options), reference(*wide, **options), 2)
    assert torch.equal(y[1:], projected_step(x[1:], after[1:], x0[1:], **options))


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
def test_sums_survive_the_ends_of_the_range():
    """A gradient of 1e30 or 1e-30 points where it points: powers of two change nothing."""
    x, grad, x0, before = tensors((3, 3, 20, 20))
    for scale in (2.0**100, 2.0**-100, 2.0**-140):
        for norm in ("l2", "l1"):
            usual = projected_step(x, grad, x0, **sizes(norm, x.shape))
            scaled = projected_step(x, grad * scale, x0, **sizes(norm, x.shape))
            # Near the smallest float32 the scaled gradient itself has lost digits.
            tolerance = 2e-7 if scale > 1e-38 else 1e-3
            assert float((scaled - usual).abs().max()) <= tolerance
        options = sizes("linf", x.shape) | dict(momentum=before)
        _, usual = projected_step(x, grad, x0, **options)
        _, scaled = projected_step(x, grad * scale, x0, **options)
        tolerance = 1e-6 if scale > 1e-38 else 1e-2
        assert float((scaled - usual).abs().max()) <= tolerance


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
def test_a_norm_or_mean_beyond_the_range_of_float32():
    """Four pixels of 2^127 have the length 2^128; one of 2^-145 among 400 the mean 2^-153.6."""
    x0 = torch.full((2, 400), 0.5)
    grad = torch.zeros(2, 400)
    grad[0, :4], grad[1, 7] = 2.0**127, 2.0**-145
    expected = x0.clone()
    expected[0, :4] += 0.1
    expected[1, 7] += 0.2
    y = projected_step(x0, grad, x0, norm="l2", step_size=0.2, eps=1.0)
    torch.testing.assert_close(y, expected)
    _, after = projected_step(
        x0, grad, x0, norm="linf", step_size=0.2, eps=1.0, momentum=torch.zeros_like(x0)
    )
    expected = torch.zeros(2, 400)
    expected[0, :4], expected[1, 7] = 100.0, 400.0
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("excess", [0.999, 1.0, 1.001, 2.0])
def test_l2_shrinks_exactly_what_leaves_the_ball(excess):
    x0 = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    delta = torch.randn_like(x0)
    delta *= 0.3 * excess / delta.norm()
    y = projected_step(x0 + delta, torch.zeros_like(x0), x0, norm="l2", step_size=1.0, eps=0.3)
    torch.testing.assert_close(y - x0, delta / max(excess, 1.0), rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("backend")
def test_zero_gradient_moves_nothing_and_makes_no_nan():
    x, _, x0, before = tensors((3, 3, 9, 9))
    for norm in NORMS:
        options = dict(norm=norm, step_size=0.1, eps=1e3)
        y = projected_step(x, torch.zeros_like(x), x0, **options)
        assert float((y - x).abs().max()) <= 1.2e-7  # x0 + (x - x0) rounds twice
        y, after = projected_step(x, torch.zeros_like(x), x0, momentum=before, decay=0.5, **options)
        assert torch.equal(after, 0.5 * before)
        assert torch.isfinite(y).all()


@pytest.mark.usefixtures("backend")
def test_l1_keeps_exactly_the_wanted_pixels():
    x0 = torch.full((2, 10), 0.5)
    grad = torch.tensor([[3.0, -1, 2, 2, -2, 2, 0, 0, 0.5, 1], [0, 0, 0, 0, 7, 0, 0, 0, 0, 0]])
    options = dict(norm="l1", step_size=0.3, eps=1.0, quantile=0.7)
    moved = projected_step(x0, grad, x0, **options) - x0
    expected = torch.zeros(2, 10)
    expected[0, [0, 2, 3]] = 0.1  # of four ties the first two
    expected[1, 4] = 0.3  # the only one with a gradient takes the whole step
    torch.testing.assert_close(moved, expected, rtol=0, atol=6e-8)
    blocked = x0.clone()
    blocked[0, 0], blocked[0, 4] = 1.0, 0.0  # at the bound that their gradient points at
    moved = projected_step(blocked, grad, blocked, **options) - blocked
    expected[0] = torch.tensor([0, 0, 0.1, 0.1, 0, 0.1, 0, 0, 0, 0])
    torch.testing.assert_close(moved, expected, rtol=0, atol=6e-8)


@pytest.mark.usefixtures("backend")
def test_l1_projection_uses_the_whole_ball_within_the_bounds():
    """Nearest point of ball ∩ bounds: what a bound cuts off is spent on other pixels."""
    x0 = torch.tensor([[0.9, 0.5, 0.5]])
    grad = torch.tensor([[1.0, 1.0, 1.0]])
    y = projected_step(x0, grad, x0, norm="l1", step_size=0.9, eps=0.5, quantile=0.0)
    torch.testing.assert_close(y, torch.tensor([[1.0, 0.7, 0.7]]))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 3),
    step_size=st.floats(0, 3),
    targeted=st.booleans(),
    step=st.sampled_from(["sign", "raw"]),
    quantile=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_stays_in_ball_and_bounds(shape, norm, eps, step_size, targeted, step, quantile, seed):
    generator = torch.Generator().manual_seed(seed)
    x, grad, x0 = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    grad = grad - 0.5
    options = dict(norm=norm, step_size=step_size, eps=eps, targeted=targeted, step=step)
    y = projected_step(x, grad, x0, quantile=quantile, **options)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    distance = torch.linalg.vector_norm((y - x0).reshape(shape[0], -1), order, dim=1)
    assert bool((distance <= eps + 1e-12).all())
    assert bool(((y >= 0) & (y <= 1)).all())
    truth = reference(x, grad, x0, quantile=quantile, **options)
    assert float((y - truth).abs().max()) <= 1e-12
