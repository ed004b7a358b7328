"""How every benchmark here is run: agreement first, then ratios taken in turns.

A ``bench_<op>.py`` has two things. ``cases(options)`` lists what is measured, without allocating
anything, and one test function hands each case to pytest-benchmark::

    def cases(options: Options) -> list[Case]:
        return [Case("conv2d", "forward", "16x64x56x56 3x3 to 64", build=functools.partial(...))]

    def test_conv2d(case, options, benchmark):
        harness.run_under_pytest(case, options, benchmark)

``build()`` allocates the inputs and returns a ``Row``: ours and its peers as callables without
arguments, the floating-point operations and the fewest bytes of the work, and ``check``, which
gets every callable's result by name and names those that are wrong. Nothing is timed where ours
is wrong; a peer that is wrong loses its column.

Ours and the peers run in turns in one process, and a ratio is the median over rounds of
(peer's time / our time) within that round: a machine that slows down slows both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peak_memory
import torch
from accuracy import max_error, one_ulp  # tests/accuracy.py: one error bar for the whole project
from torch import Tensor

OURS = "ours"


@dataclass(frozen=True)
class Options:
    """What a run was asked for; ``cases()`` may shrink or extend its list by it."""

    quick: bool = False  # small batches, fewest rounds: a smoke test and no measurement
    seconds: float = 3.0  # time spent on a row's rounds, agreement and set-up aside
    compile: bool = False  # torch.compile'd peers too; each costs a compilation


@dataclass(frozen=True)
class Row:
    """One piece of work, ready to run."""

    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    flops: float
    bytes: float
    check: Callable[[Mapping[str, Any]], dict[str, str]]  # wrong callables: {name: why}


@dataclass(frozen=True)
class Case:
    """A row that is not built yet: ``group`` is what the summary takes geometric means over."""

    op: str
    group: str
    name: str
    build: Callable[[], Row]

    @property
    def id(self) -> str:
        return f"{self.op} {self.group} {self.name}"


@dataclass
class Result:
    """What one row gave. Seconds are medians over rounds; ``ratio`` > 1 means ours is faster."""

    op: str
    group: str
    name: str
    flops: float
    bytes: float
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    # of the ratio: its quartiles over rounds; of several runs, the lowest and the highest
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    rounds: int = 0

    @property
    def fastest_peer(self) -> str | None:
        """Peers named "our …" are pyvit under other conditions, and no rivals."""
        rivals = [peer for peer in self.ratio if "our " not in peer] or list(self.ratio)
        return min(rivals, key=self.ratio.__getitem__, default=None)


def against_truth(truth: Callable[[], Any], factor: float = 2.0):
    """A ``check``: every result against ``truth()``, computed in float64 from the same inputs.

    Ours may have ``factor`` times the error of the first peer (PyTorch's own op) plus one ulp of
    the result's scale: the bar of the tests. A peer counts as computing something else where its
    error passes √eps of the scale, half of the dtype's digits: rounding alone does not get there.
    """

    def check(results: Mapping[str, Any]) -> dict[str, str]:
        wanted = _tensors(truth())
        values = {name: _tensors(result) for name, result in results.items()}
        yardstick = next(name for name in values if name != OURS)
        wrong = {}
        for name, outputs in values.items():
            for index, (output, exact) in enumerate(zip(outputs, wanted, strict=True)):
                ulp, error = one_ulp(output.dtype, exact), max_error(output, exact)
                if name == OURS:
                    bar = factor * max_error(values[yardstick][index], exact) + ulp
                else:
                    bar = ulp / torch.finfo(output.dtype).eps ** 0.5
                if not error <= bar:
                    wrong[name] = f"result {index}: error {error:.3g} above {bar:.3g}"
        return wrong

    return check


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def run(case: Case, options: Options) -> Result:
    """Build, check and measure one case."""
    return measure(case, case.build(), options)


def measure(case: Case, row: Row, options: Options) -> Result:
    result = Result(case.op, case.group, case.name, row.flops, row.bytes)
    callables = {OURS: row.ours, **row.peers}
    result.wrong = row.check({name: call() for name, call in callables.items()})
    if OURS in result.wrong:
        return result
    callables = {name: call for name, call in callables.items() if name not in result.wrong}
    for name, call in callables.items():
        if (peak := peak_memory.peak_of(call)) is not None:
            result.peak_bytes[name] = peak
    samples = _in_turns(callables, *((0.0, 3) if options.quick else (options.seconds, 5)))
    result.rounds = len(samples[OURS])
    for name, times in samples.items():
        result.seconds[name] = statistics.median(times)
        if name != OURS:
            ratios = [theirs / ours for theirs, ours in zip(times, samples[OURS], strict=True)]
            result.ratio[name] = statistics.median(ratios)
            low, _, high = statistics.quantiles(ratios, n=4)
            result.spread[name] = (low, high)
    return result


def _in_turns(
    callables: Mapping[str, Callable[[], Any]],
    seconds: float,
    fewest_rounds: int,
    shortest: float = 2e-3,
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round; a sample repeats calls shorter than ``shortest``."""
    single = {name: _time(call, 1) for name, call in callables.items()}
    repeats = {name: max(1, round(shortest / s)) for name, s in single.items()}
    one_round = sum(single[name] * repeats[name] for name in callables)
    rounds = min(40, max(fewest_rounds, round(seconds / one_round)))
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(_time(callables[name], repeats[name]))
            order = order[1:] + order[:1]  # no one always runs after the same neighbour
    finally:
        gc.enable()
    return samples


def _time(call: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def run_under_pytest(case: Case, options: Options, benchmark) -> None:
    """One case as a pytest-benchmark test: its statistics are ours, the ratios are extra info."""
    row = case.build()
    result = measure(case, row, options)
    assert OURS not in result.wrong, f"{case.id}: wrong result: {result.wrong[OURS]}"
    benchmark.group = f"{case.op} {case.group}"
    benchmark.extra_info.update(
        threads=torch.get_num_threads(), ratio=result.ratio, wrong_peers=result.wrong
    )
    benchmark.pedantic(row.ours, rounds=result.rounds, iterations=1, warmup_rounds=1)
