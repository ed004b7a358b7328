"""Sizes at which a GPU's kernels change their way, and what must not change with them."""

from __future__ import annotations

import math

import pytest
import torch
from attention_truth import assert_selects_largest, own_selection, tensors, with_gradients
from backends import EMULATED, INTERPRETED

from pyvit.ops import attention_with_penalty, topk_attention
from pyvit.reference import topk_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# Keys of which scores stay in registers, in shared memory, or go to lists; a tile's end and beyond.
KEYS = [15, 32, 33, 63, 128, 129, 208, 209, 256, 257, 640, 1500]


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(keys=[15, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", KEYS)
def test_edges_of_tiles(keys, dtype):
    q, k, v = tensors((1, 1, 18, keys, 80, 96), dtype)
    grad = torch.randn(1, 1, 18, 96).to(dtype)
    for topk in (3, keys - 1):
        selection = own_selection(q, k, v, topk)
        assert_selects_largest(selection, q, k, topk)
        ours = with_gradients(topk_attention, (q, k, v), (grad,), topk=topk)
        doubled = [a.double() for a in (q, k, v)]

        def chosen(q, k, v, selection=selection):
            return reference.topk_attention(q, k, v, 0, selection=selection)

        truth = with_gradients(chosen, doubled, (grad.double(),))
        for name, mine, exact in zip(("out", "dq", "dk", "dv"), ours, truth):
            bound = 20 * torch.finfo(dtype).eps * max(float(exact.abs().max()), 0.1)
            assert float((mine.double() - exact).abs().max()) <= bound, name


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "sawtooth"])
def test_scores_in_order(order, backend):
    """Every key above all before it fills any list; equal ones are taken in their order."""
    n = 300 if backend == INTERPRETED else 1700
    scores = {
        "ascending": torch.arange(n) * 0.25,
        "descending": -torch.arange(n) * 0.25,
        "equal": torch.full((n,), 0.5),
        "sawtooth": (torch.arange(n) % 71) * 0.5,
    }[order]
    q, k, v = torch.ones(1, 1, 1, 1), scores.reshape(1, 1, n, 1).float(), torch.randn(1, 1, n, 2)
    for topk in (1, 40, 64):
        selection = own_selection(q, k, v, topk, 1.0).flatten()
        assert torch.equal(selection, reference.select(scores.float(), topk)), topk


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(topk=[])  # a minute each
@pytest.mark.parametrize("topk", [1, 64, 1000, 16_383])
def test_sixteen_thousand_keys(topk):
    q, k, v = tensors((1, 1, 3, 16_384, 32, 16), torch.float32)
    selection = own_selection(q, k, v, topk)
    assert_selects_largest(selection, q, k, topk)
    out, exact = topk_attention(q, k, v, topk), [a.double() for a in (q, k, v)]
    truth = reference.topk_attention(*exact, 0, selection=selection)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted(keys=[40])
@pytest.mark.parametrize("keys", [40, 197, 400, 1300])
def test_values_that_are_not_finite(keys, backend):
    """They reach the rows that kept their keys alone, in the columns that have them."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors((1, 2, 20, keys, 16, 100), dtype)
        clean = topk_attention(q, k, v, 9)
        v[0, 1, 5, 3], v[0, 1, 5, 70], v[0, 1, 11, 98] = math.inf, math.nan, -math.inf
        kept = own_selection(q, k, v, 9)[0, 1]
        out = topk_attention(q, k, v, 9)
        strange = ~out.isfinite()
        expected = torch.zeros_like(strange)
        for key, column in ((5, 3), (5, 70), (11, 98)):
            expected[0, 1, :, column] = kept[:, key]
        assert torch.equal(strange, expected), (keys, dtype)
        torch.testing.assert_close(out[~strange], clean[~strange])


@pytest.mark.interpreted(keys=[40])
@pytest.mark.parametrize("keys", [40, 197, 400, 1300])
def test_rows_of_nan(keys, backend):
    q, k, v = tensors((1, 1, 20, keys, 16, 24))
    q[0, 0, 17, 3] = math.nan
    out, dq, *_ = with_gradients(topk_attention, (q, k, v), (torch.randn(1, 1, 20, 24),), topk=4)
    expected = torch.zeros(1, 1, 20, dtype=torch.bool)
    expected[0, 0, 17] = True
    for result in (out, dq):
        assert torch.equal(result.isnan().all(-1), expected)
        assert torch.equal(result.isnan().any(-1), expected)


@pytest.mark.interpreted(keys=[40])
@pytest.mark.parametrize("keys", [40, 197, 400, 1300])
def test_what_is_saved(keys, backend):
    """The same for every GPU backend: bits, the largest score, the sum of exponentials."""
    if backend == "cpu":
        pytest.skip("the CPU saves indices and weights")
    q, k, v = tensors((1, 2, 19, keys, 32, 8))
    for topk in (5, keys):
        _, bits, softmax = torch.ops.pyvit.topk_attention(q, k, v, topk, 0.2, True)
        assert bits.shape == (1, 2, 19, (keys + 7) // 8 if topk < keys else 0)
        scores = reference.scores(q, k, 0.2)
        top = scores.amax(-1)
        kept = scores.masked_fill(~own_selection(q, k, v, topk, 0.2), -math.inf)
        torch.testing.assert_close(softmax[..., 0], top)
        torch.testing.assert_close(softmax[..., 1], (kept - top.unsqueeze(-1)).exp().sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [99 << 10, 227 << 10], ids=["sm_86", "sm_90"])
def test_other_gpus_shared_memory(most, dtype, backend):
    """Calls whose tiles exceed 99 KB, or come near: another way is taken then, and works."""
    if backend != EMULATED:
        pytest.skip("a GPU has what it has")
    from cuda_emulator import shared_memory

    wider = 256 if dtype is torch.bfloat16 else 240
    for keys, dim, value_dim in [(197, 128, 128), (256, 80, 80), (700, 64, 64), (90, 256, wider)]:
        q, k, v = tensors((1, 1, 18, keys, dim, value_dim), dtype)
        grad = torch.randn(1, 1, 18, value_dim).to(dtype)
        for function in (topk_attention, attention_with_penalty):
            grads = (grad, torch.randn(1, 1, 18), torch.randn(1, 1, 18))
            grads = grads[: 1 if function is topk_attention else 3]
            for topk in (9, keys):
                wanted = with_gradients(function, (q, k, v), grads, topk=topk)
                with shared_memory(most):
                    selection = own_selection(q, k, v, topk)
                    results = with_gradients(function, (q, k, v), grads, topk=topk)
                assert torch.equal(selection, own_selection(q, k, v, topk))
                for ours, others in zip(results, wanted, strict=True):
                    bound = 4 * torch.finfo(dtype).eps * max(float(others.abs().max()), 0.1)
                    assert float((ours - others).abs().max()) <= bound, (keys, topk)
                if most > 163 << 10:  # the same way
                    assert all(torch.equal(*pair) for pair in zip(results, wanted))


def test_what_no_tile_holds_is_told(backend):
    """Float32 gradients where both head dimensions exceed 240, in 99 KB."""
    if backend != EMULATED:
        pytest.skip("a GPU has what it has")
    from cuda_emulator import shared_memory

    arguments = tensors((1, 1, 2, 3, 256, 256))
    message = "no head dimensions of 256 and 256 on this GPU, .*'triton'"
    with shared_memory(99 << 10), pytest.raises(RuntimeError, match=message):
        with_gradients(topk_attention, arguments, (torch.randn(1, 1, 2, 256),), topk=2)
