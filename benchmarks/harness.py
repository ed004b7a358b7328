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

Tensors lie on the device that was asked for: it is torch's default device while a row is built
and checked, and random numbers come from ``generator(seed)``.

Ours and the peers run in turns in one process, and a ratio is the median over rounds of
(peer's time / our time) within that round: a machine that slows down slows both.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peak_memory
import torch
from accuracy import max_error, one_ulp  # tests/accuracy.py: one error bar for the whole project
from timing import Clock, clock
from torch import Tensor

import pyvit
from pyvit.ops import _backends

GPU_BACKENDS = ("triton", "cuda")
OURS = "ours"


@dataclass(frozen=True)
class Options:
    """What a run was asked for; ``cases()`` may shrink or extend its list by it."""

    quick: bool = False  # small batches, fewest rounds: a smoke test and no measurement
    seconds: float = 3.0  # time spent on a row's rounds, agreement and set-up aside
    compile: bool = False  # torch.compile'd peers too; each costs a compilation
    device: str = "cpu"  # or "cuda"
    gpu_rows: bool = False  # the rows for a GPU: large batches, and bfloat16 above all
    timed: bool = True  # else rows are built and checked alone, which compiles all kernels


@dataclass(frozen=True)
class Row:
    """One piece of work, ready to run."""

    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    flops: float
    bytes: float
    check: Callable[[Mapping[str, Any]], dict[str, str]]  # wrong callables: {name: why}
    dtype: torch.dtype = torch.float32  # what the work is done in: it sets a GPU's ceiling


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
    dtype: str = "float32"

    @property
    def fastest_peer(self) -> str | None:
        """Peers named "our …" are pyvit under other conditions, and no rivals."""
        rivals = [peer for peer in self.ratio if "our " not in peer] or list(self.ratio)
        return min(rivals, key=self.ratio.__getitem__, default=None)


def against_truth(
    truth: Callable[[], Any], factor: float = 2.0, yardstick: Callable[[], Any] | None = None
):
    """A ``check``: every result against ``truth()``, computed in float64 from the same inputs.

    Ours may have ``factor`` times the error of ``yardstick()``, else of the first peer (PyTorch's
    own op), plus one ulp of the result's scale: the bar of the tests. A peer counts as computing
    something else where its error passes √eps of the scale, half of the dtype's digits: rounding
    alone does not get there.
    """

    def check(results: Mapping[str, Any]) -> dict[str, str]:
        search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        wanted = _tensors(truth())  # no search for the fastest float64 kernels: it takes seconds
        torch.backends.cudnn.benchmark = search
        values = {name: _tensors(result) for name, result in results.items()}
        theirs = next((v for name, v in values.items() if name != OURS), None)
        if yardstick is not None:
            theirs = _tensors(yardstick())
        wrong = {}
        for name, outputs in values.items():
            for index, (output, exact) in enumerate(zip(outputs, wanted, strict=True)):
                ulp, error = one_ulp(output.dtype, exact), max_error(output, exact)
                if name == OURS:
                    bar = factor * max_error(theirs[index], exact) + ulp
                else:
                    bar = ulp / torch.finfo(output.dtype).eps ** 0.5
                if not error <= bar:
                    wrong[name] = f"result {index}: error {error:.3g} above {bar:.3g}"
        return wrong

    return check


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def generator(seed: int) -> torch.Generator:
    """Of random numbers on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def prepare(device: str) -> None:
    """Let the peers run at their best, and in float32 where a row says float32."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def run(case: Case, options: Options) -> Result:
    """Build, check and measure one case; one that raises is wrong, and the next ones still run."""
    try:
        with torch.device(options.device):
            row = case.build()
        return measure(case, row, options)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        wrong = {OURS: f"raised {type(error).__name__}: {lines[0]}"}
        return Result(case.op, case.group, case.name, 0.0, 0.0, wrong)
    finally:
        torch.cuda.empty_cache()  # does nothing where there is no GPU


def measure(case: Case, row: Row, options: Options) -> Result:
    dtype = str(row.dtype).removeprefix("torch.")
    result = Result(case.op, case.group, case.name, row.flops, row.bytes, dtype=dtype)
    callables = {OURS: row.ours, **row.peers}
    if options.device == "cuda" and case.op != "attacks":  # their graphs keep the kernels they have
        callables |= each_backend(row.ours)
    with torch.device(options.device):
        result.wrong = row.check({name: call() for name, call in callables.items()})
    if OURS in result.wrong or not options.timed:
        return result
    callables = {name: call for name, call in callables.items() if name not in result.wrong}
    for name, call in callables.items():
        if (peak := peak_memory.peak_of(call, options.device)) is not None:
            result.peak_bytes[name] = peak
    limits = (0.0, 3) if options.quick else (options.seconds, 5)
    samples = _in_turns(callables, clock(options.device), *limits)
    result.rounds = len(samples[OURS])
    for name, times in samples.items():
        result.seconds[name] = statistics.median(times)
        if name != OURS:
            ratios = [theirs / ours for theirs, ours in zip(times, samples[OURS], strict=True)]
            result.ratio[name] = statistics.median(ratios)
            low, _, high = statistics.quantiles(ratios, n=4)
            result.spread[name] = (low, high)
    return result


def each_backend(ours: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Ours by Triton's and by CUDA C++'s kernels, where both can run."""

    def with_kernels(name: str) -> Any:
        with pyvit.backend(name):
            return ours()

    if _backends.triton_problem() or _backends.cuda_problem():
        return {}
    return {f"our {name} kernels": functools.partial(with_kernels, name) for name in GPU_BACKENDS}


def _in_turns(
    callables: Mapping[str, Callable[[], Any]], clock: Clock, seconds: float, fewest_rounds: int
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round; a sample repeats calls that are short for the clock."""
    repeats = {}
    for name, call in callables.items():
        clock(call, 1)
        repeats[name] = max(1, round(clock.shortest / clock(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    try:
        for number in range(40):
            if number >= fewest_rounds and time.perf_counter() > end:
                break
            for name in order:
                samples[name].append(clock(callables[name], repeats[name]))
            order = order[1:] + order[:1]  # no one always runs after the same neighbour
    finally:
        gc.enable()
    return samples


def run_under_pytest(case: Case, options: Options, benchmark) -> None:
    """One case as a pytest-benchmark test: its statistics are ours, the ratios are extra info."""
    with torch.device(options.device):
        row = case.build()
    result = measure(case, row, options)
    assert OURS not in result.wrong, f"{case.id}: wrong result: {result.wrong[OURS]}"
    benchmark.group = f"{case.op} {case.group}"
    benchmark.extra_info.update(
        threads=torch.get_num_threads(), ratio=result.ratio, wrong_peers=result.wrong
    )
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None

    def ours():
        row.ours()
        synchronize()

    benchmark.pedantic(ours, rounds=result.rounds, iterations=1, warmup_rounds=1)
