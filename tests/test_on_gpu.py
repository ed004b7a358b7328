"""``make gpu``'s steps and the GPU's clock, where there is no GPU."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import on_gpu
import pytest
import suite
import timing
import torch
from on_gpu import Plan, Step


@pytest.fixture
def plan(tmp_path) -> Plan:
    plan = Plan("cpu", True, tmp_path, tmp_path)
    on_gpu.log_file(plan).write_text("")
    return plan


def test_every_op_is_measured():
    assert sorted(on_gpu.OPS) == suite.ops()


def test_each_step_gets_its_share_of_what_is_left(plan, monkeypatch):
    now, given = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes(seconds):
        def step(limit):
            given.append(limit)
            now[0] += seconds
            return "passed"

        return step

    on_gpu.run(plan, [Step("a", 1, takes(10)), Step("b", 2, takes(5)), Step("c", 3, takes(0))], 60)
    assert given == pytest.approx([10, 20, 45])


def test_a_failing_step_stops_no_other(plan):
    def fails(limit):
        raise OSError("no program")

    done = on_gpu.run(plan, [Step("a", 1, fails), Step("b", 1, lambda limit: "passed")], 60)
    assert [d.verdict for d in done] == ["OSError: no program", "passed"]
    assert "OSError: no program" in on_gpu.table(done)


def test_what_compiles_is_built_where_cuda_does_not(plan, monkeypatch):
    verdicts, asked = iter(["failed with exit status 1", "passed"]), []

    def command(plan, arguments, seconds, *, cwd, environment=None):
        asked.append((environment, seconds))
        return next(verdicts)

    monkeypatch.setattr(on_gpu, "command", command)
    assert on_gpu.build(plan, 100) == "failed with exit status 1; without CUDA C++: passed"
    assert asked == [(None, 75), ({"FORCE_CUDA": "0"}, pytest.approx(100, abs=5))]


@pytest.mark.parametrize(
    "code, verdict",
    [
        ("print('hello')", "passed"),
        ("raise SystemExit(3)", "failed with exit status 3"),
        ("import time; print('hello'); time.sleep(60)", "stopped: its time was over"),
    ],
)
def test_programs_are_run_logged_and_stopped(plan, code, verdict, capfd):
    begin = time.monotonic()
    assert on_gpu.command(plan, [sys.executable, "-u", "-c", code], 2.0) == verdict
    assert time.monotonic() - begin < 20
    if "hello" in code:
        assert "hello" in on_gpu.log_file(plan).read_text()
        assert "hello" in capfd.readouterr().out


def test_what_was_measured_before_a_step_was_stopped_is_reported(plan):
    assert on_gpu.write_report(plan, 30) == "nothing was measured"
    assert on_gpu.measure(plan, "unfold", 60) == "passed"
    assert on_gpu.write_report(plan, 60) == "passed"
    for name in ("gpu.json", "gpu.png", "table.txt"):
        assert (plan.out / name).stat().st_size > 100


def test_the_gpu_clock_flushes_before_each_call(monkeypatch):
    happened, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]
            happened.append("event")

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3  # milliseconds

    def flush():
        happened.append("flush")
        now[0] += 5.0

    def call():
        happened.append("call")
        now[0] += 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    clock = object.__new__(timing.GpuClock)
    clock.flushed = SimpleNamespace(zero_=flush)
    assert clock(call, 3) == pytest.approx(2.0)
    assert happened == 3 * ["flush", "event", "call", "event"] + ["synchronize"]
