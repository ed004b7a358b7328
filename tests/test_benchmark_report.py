"""The report of the benchmarks: medians, tables, files and plots from made-up results."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import report
import scaling
from harness import OURS, Result
from machine import Peaks

PEAKS = Peaks(flops=1e9, flops_source="made up", matmul_flops=5e8, copy_bandwidth=1e9)
MACHINE = {
    "processor": "a processor",
    "threads": 2,
    "instruction_set": "avx2",
    "torch": "2.99",
}


def row(name="a", seconds=2e-3, ratio=2.0, **changes) -> Result:
    """One million operations on two megabytes: a floor of 2 ms by its bytes."""
    values = dict(
        flops=1e6,
        bytes=2e6,
        seconds={OURS: seconds, "torch": seconds * ratio, "slow": seconds * 9},
        ratio={"torch": ratio, "slow": 9.0},
        spread={"torch": (ratio * 0.9, ratio * 1.1), "slow": (8.0, 10.0)},
        peak_bytes={OURS: 3 << 20},
        rounds=5,
    )
    return dataclasses.replace(Result("op", "forward", name, **values), **changes)


def without_speed(result: Result) -> Result:
    empty = {"seconds": {}, "ratio": {}, "spread": {}, "peak_bytes": {}}
    return dataclasses.replace(result, wrong={OURS: "error 1"}, **empty)


def test_share_of_floor_takes_the_larger_of_both_times():
    assert report.share_of_floor(row(seconds=4e-3), PEAKS) == pytest.approx(0.5)
    assert report.share_of_floor(row(seconds=4e-3, flops=4e6), PEAKS) == pytest.approx(1.0)


def test_means_are_geometric_and_the_fastest_peer_is_each_rows_own():
    means = report.geometric_means([row(ratio=2.0), row("b", ratio=8.0), row("c", ratio=32.0)])
    of_group = means["op", "forward"]
    assert of_group["torch"] == pytest.approx(8.0)
    assert of_group["fastest peer"] == pytest.approx((2 * 8 * 9) ** (1 / 3))


def test_ours_under_other_conditions_is_no_rival():
    result = row(ratio=2.0)
    result.ratio["our float32"] = 0.9
    assert result.fastest_peer == "torch"
    assert row().fastest_peer == "torch"
    assert without_speed(row()).fastest_peer is None


def test_medians_of_several_runs():
    runs = [[row(seconds=s, ratio=r), row("b")] for s, r in ((1e-3, 3.0), (9e-3, 1.0), (2e-3, 2.0))]
    first, second = report.medians(runs)
    assert first.seconds[OURS] == 2e-3
    assert first.ratio["torch"] == 2.0
    assert first.spread["torch"] == (1.0, 3.0)
    assert first.rounds == 15
    assert second.ratio == {"torch": 2.0, "slow": 9.0}


def test_what_was_wrong_in_one_run_is_wrong():
    good = row()
    bad_peer = row(wrong={"slow": "off by one"})
    del bad_peer.ratio["slow"]
    (merged,) = report.medians([[good], [bad_peer], [good]])
    assert merged.wrong == {"slow": "off by one"}
    assert merged.ratio == {"torch": 2.0}
    assert "slow" not in merged.seconds
    nothing = without_speed(row())
    (merged,) = report.medians([[good], [nothing], [good]])
    assert OURS in merged.wrong
    assert OURS not in merged.seconds


def test_table_and_summary_say_what_was_measured():
    wrong = without_speed(row("c"))
    results = [row(), row("b", seconds=4e-3, ratio=0.5), wrong]
    text = report.table(results, PEAKS)
    assert "2.00x" in text
    assert "0.50x" in text
    assert "WRONG ours in c: error 1" in text
    line = report.summary(results, PEAKS).splitlines()[-1].split()
    assert line == ["op", "forward", "2", "1.00x", "0.50x", "2.00x", "75%"]
    assert "medians of 3 runs" in report.heading(MACHINE | {"runs": 3}, PEAKS)


def test_results_come_back_from_json(tmp_path):
    file = tmp_path / "bench.json"
    results = [row(), row("b", ratio=0.5)]
    report.write_json(file, results, MACHINE, PEAKS)
    again, machine, peaks = report.read_json(file)
    assert [(r.name, r.seconds, r.ratio) for r in again] == [
        (r.name, r.seconds, r.ratio) for r in results
    ]
    assert (machine, peaks) == (MACHINE, PEAKS)
    assert json.loads(file.read_text())["rows"][0]["share_of_floor"] == pytest.approx(1.0)


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curves = [curve(1, 2.0), curve(2, 1.9), curve(1, 1.0, name="b", values=[1, 2])]
    report.plot(tmp_path / "bench.png", [row(), row("b", ratio=0.5)], MACHINE)
    scaling.plot(tmp_path / "scaling.png", curves, MACHINE)
    for name in ("bench.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def curve(threads, power, name="a", values=(8, 16, 64)) -> scaling.Curve:
    return scaling.Curve(
        name,
        "size",
        threads,
        list(values),
        work=[float(v) for v in values],
        seconds=[1e-4 * v**power / threads for v in values],
    )


def test_slopes():
    assert curve(1, 2.0).slope == pytest.approx(2.0)
    assert curve(1, 2.0).slope_of_work == pytest.approx(1.0)
    line = scaling.table([curve(1, 2.0)])[1]
    assert line == ["a, size", "8", "64", "1", "64.0x", "8.0x", "2.00", "1.00"]


def test_scaling_json(tmp_path):
    file = tmp_path / "scaling.json"
    scaling.write_json(file, [curve(2, 1.5)], MACHINE)
    (stored,) = json.loads(file.read_text())["curves"]
    assert stored["slope"] == pytest.approx(1.5)
    assert stored["threads"] == 2


def test_the_formulas_are_those_of_the_docstrings():
    dense = scaling.attention_work(1, 100, 100, backward=False)
    assert dense == scaling.HEADS * 4 * 100**2 * scaling.DIM
    half = scaling.attention_work(1, 100, 50, backward=False)
    assert half == scaling.HEADS * 3 * 100**2 * scaling.DIM
    assert math.isclose(
        scaling.attention_work(2, 100, 50, backward=True),
        2 * scaling.HEADS * 8 * 100 * 50 * scaling.DIM,
    )


def test_a_quick_run_of_the_sweeps():
    curves = scaling.run(scaling.sweeps(quick=True)[-1:], threads=[1], seconds=0.0)
    assert [(c.name, c.values) for c in curves] == [("patch_embed forward", [1, 2])]
    assert all(s > 0 for s in curves[0].seconds)
