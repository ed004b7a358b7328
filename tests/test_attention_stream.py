"""More keys than a GPU program keeps: the k-th largest score of rows that stream by."""

from __future__ import annotations

import math

import pytest
import torch
from attention_truth import own_selection
from backends import BACKENDS

from pyvit.ops import attention_with_penalty, topk_attention
from pyvit.reference import topk_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

KEYS = 301  # more than are resident in any configuration
GPU_BACKENDS = [name for name in BACKENDS if name != "cpu"]

ROWS = {
    "normal": lambda n: torch.randn(n),
    "a few numbers": lambda n: torch.randint(-2, 3, (n,)) * 1.0,
    "equal": lambda n: torch.full((n,), 0.1),
    "more equal ones than are listed": lambda n: torch.cat([torch.randn(100), torch.ones(n - 100)]),
    "ascending": lambda n: torch.arange(n) * 1.0,
    "descending": lambda n: torch.arange(n).flip(0) * 1.0,
    "one group of keys": lambda n: (
        torch.where(torch.arange(n) % 64 == 0, 10.0, 0.0) + torch.rand(n)
    ),
    "exponential": lambda n: torch.exp(torch.randn(n) * 15),
    "clusters": lambda n: torch.where(torch.arange(n) % 3 > 0, -1e20, 1e20) + torch.randn(n) * 1e15,
    "minus infinity": lambda n: torch.randn(n).masked_fill(torch.rand(n) < 0.8, -math.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_many_keys(row, dtype, backend):
    """q = 1 makes the scores of a row any numbers we like; two rows, of which one is another."""
    scores = ROWS[row](KEYS).to(dtype)
    q, k = torch.tensor([1.0, 0.5], dtype=dtype).reshape(1, 1, 2, 1), scores.reshape(1, 1, KEYS, 1)
    v = torch.randn(1, 1, KEYS, 2).to(dtype)
    for topk in (1, 40, KEYS // 2, KEYS - 1):
        expected = reference.select(reference.scores(q.float(), k.float(), 1.0) + 0.0, topk)
        assert torch.equal(own_selection(q, k, v, topk, 1.0), expected), topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_rows(dtype, backend):
    q, k = torch.randn(1, 2, 7, 8).to(dtype), torch.randn(1, 2, KEYS, 8).to(dtype)
    v = torch.randn(1, 2, KEYS, 4).to(dtype)
    clean = topk_attention(q, k, v, 40)
    for value in (math.nan, math.inf):
        spoilt = q.clone()
        spoilt[0, 1, 3, 5] = value
        out = topk_attention(spoilt, k, v, 40)
        assert bool(out[0, 1, 3].isnan().all())
        out[0, 1, 3] = clean[0, 1, 3]
        assert torch.equal(out, clean)


@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_list_is_reached_at_once(dtype, backend, monkeypatch):
    """Whatever the scores' distribution: no second pair of probes is asked for."""
    if backend == "triton":
        pytest.skip("what a GPU asks for cannot be counted")
    from pyvit.kernels import attention_stream

    asked = []

    def probes_around(*arguments):
        asked.append(arguments[-1])
        raise AssertionError("asked for more probes")

    monkeypatch.setattr(attention_stream, "probes_around", probes_around)
    q, v = torch.ones(1, 1, 1, 1, dtype=dtype), torch.randn(1, 1, 1100, 1).to(dtype)
    for row in (torch.randn(1100), torch.randn(1100).exp(), torch.randn(1100) ** 5):
        for topk in (1, 16, 48):
            k = row.to(dtype).reshape(1, 1, 1100, 1)
            expected = reference.select(row.to(dtype).float().reshape(1, 1, 1, 1100), topk)
            assert torch.equal(own_selection(q, k, v, topk, 1.0), expected)


def test_ranks_of_probes():
    if not GPU_BACKENDS:
        pytest.skip("Triton is not installed")
    from pyvit.kernels.attention_stream import ranks_of_probes

    below, above = ranks_of_probes(64, 4096, 128)
    assert 64 < below < 128 and 0 < above < 64
    assert ranks_of_probes(1, 4096, 128)[1] == 0, "none above the largest"
    assert ranks_of_probes(4095, 4096, 128)[0] > 128, "none below the least"
    # A thousand rows: how many scores are above those maxima, beside what was wanted.
    scores = torch.randn(1000, 4096)
    maxima = scores.reshape(1000, -1, 128).amax(1).sort(-1, descending=True).values
    for rank, wanted in ((below, 64 + 42), (above, 64 - 42)):
        count = (scores >= maxima[:, int(rank) - 1, None]).sum(-1).float()
        assert abs(float(count.mean()) - wanted) < 5
        assert float((count - wanted).abs().max()) < 42


@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
def test_heads_too_wide_for_a_gpu_are_refused(backend):
    wide, narrow = torch.zeros(1, 1, 3, 257), torch.zeros(1, 1, 3, 8)
    for function in (topk_attention, attention_with_penalty):
        for q, v in ((wide, narrow), (narrow, wide)):
            expected = rf"pyvit\.{function.__name__}: head dimensions beyond 256 \(here 257\)"
            with pytest.raises(NotImplementedError, match=expected):
                function(q, q, v, 2)
