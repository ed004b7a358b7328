"""The benchmarks' rows for a GPU, where there is none: they build, run and agree."""

from __future__ import annotations

import contextlib

import bench_attacks
import harness
import pytest
import report
import suite
import torch
from harness import OURS, Options
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

LOOKS_AT_NUMBERS = DataDependentOutputException, DynamicOutputShapeException
OPS = [op for op in suite.ops() if op != "attacks"]
ROWS = suite.collect(suite.ops(), Options(gpu_rows=True, compile=False))


def first_of_each_group(cases):
    return list({(case.op, case.group): case for case in reversed(cases)}.values())[::-1]


def test_every_row_has_a_name_of_its_own():
    assert len({case.id for case in ROWS}) == len(ROWS)


@pytest.mark.parametrize("op", OPS)
def test_every_row_builds_and_runs_at_its_full_size(op, monkeypatch):
    """On tensors without numbers: shapes, dtypes and memory order are all that there is."""
    monkeypatch.setattr(harness, "max_error", lambda value, truth: 0.0)
    monkeypatch.setattr(harness, "one_ulp", lambda dtype, truth: 0.0)
    monkeypatch.setattr(torch, "equal", lambda a, b: a.shape == b.shape)
    for case in suite.collect([op], Options(gpu_rows=True)):
        with FakeTensorMode():
            row = case.build()
            assert row.bytes > 0
            # A truth, or a peer, may look at its numbers.
            with contextlib.suppress(*LOOKS_AT_NUMBERS):
                assert row.check({OURS: row.ours(), **{n: f() for n, f in row.peers.items()}}) == {}


def test_replayed_attacks_agree_with_those_that_run_each_step():
    options = Options(quick=True, gpu_rows=True, timed=False)
    cases = suite.collect(["attacks"], options)
    replayed = [case for case in cases if case.group.endswith("replayed")]
    assert len(replayed) == len(cases) / 2
    row = replayed[0].build()
    assert bench_attacks.OUR_LOOP in row.peers
    results = {OURS: row.ours(), **{name: peer() for name, peer in row.peers.items()}}
    assert row.check(results) == {}
    results[OURS] = results[OURS] + 1 / 255
    assert "replayed" in row.check(results)[OURS]


@pytest.mark.parametrize("op", OPS)
def test_rows_of_small_batches_agree(op):
    options = Options(quick=True, gpu_rows=True, timed=False)
    for case in first_of_each_group(suite.collect([op], options)):
        result = harness.run(case, options)
        assert result.wrong == {}, case.id
        assert result.dtype in ("float32", "bfloat16")


def test_both_kinds_of_kernels_are_measured_where_both_run(monkeypatch):
    asked = []
    monkeypatch.setattr(harness._backends, "triton_problem", lambda: "")
    monkeypatch.setattr(harness._backends, "cuda_problem", lambda: "")
    peers = harness.each_backend(lambda: asked.append(harness._backends._asked))
    assert list(peers) == ["our triton kernels", "our cuda kernels"]
    for call in peers.values():
        call()
    assert asked == ["triton", "cuda"]
    monkeypatch.setattr(harness._backends, "cuda_problem", lambda: "not built")
    assert harness.each_backend(lambda: None) == {}


def test_a_row_that_raises_is_wrong_and_the_next_one_runs():
    def fails():
        raise RuntimeError("no kernel\nand more")

    case = harness.Case("op", "forward", "a", fails)
    assert harness.run(case, Options()).wrong == {OURS: "raised RuntimeError: no kernel"}


def test_shares_of_the_rows_make_the_whole(monkeypatch, tmp_path):
    ran = []

    def measured(case, options):
        ran.append(case.id)
        return harness.Result(case.op, case.group, case.name, 1.0, 1.0)

    monkeypatch.setattr(suite, "run", measured)
    for share in ("1/3", "2/3", "3/3"):
        arguments = ["--only", "unfold", "--gpu-rows", "--check", "--share", share]
        assert suite.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
        assert report.read_json(tmp_path / "rows.json")[0][-1].name in ran[-1]
    assert sorted(ran) == sorted(case.id for case in ROWS if case.op == "unfold")
