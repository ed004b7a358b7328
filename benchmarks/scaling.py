"""``python -m pyvit bench --scaling``: whether time grows as the formula of the work says.

A sweep varies one size and measures the time at each value, with one thread and with all. Beside
the times stands the work by the formula of the op's docstring, in floating-point operations; on
logarithmic axes both should have the same slope. Where the measured slope is steeper, something
costs more than it should; where it is flatter, a constant part (packing, waking threads) counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pyvit

HEADS, DIM, TOPK = 2, 64, 32


@dataclass(frozen=True)
class Sweep:
    """One size that varies; ``work(value)`` counts operations, ``make(value)`` gives the call."""

    name: str
    variable: str
    values: Sequence[int]
    work: Callable[[int], float]
    make: Callable[[int], Callable[[], Any]]


@dataclass
class Curve:
    """What one sweep gave with one number of threads."""

    name: str
    variable: str
    threads: int
    values: list[int]
    work: list[float]
    seconds: list[float] = field(default_factory=list)

    @property
    def slope(self) -> float:
        return slope(self.values, self.seconds)

    @property
    def slope_of_work(self) -> float:
        return slope(self.values, self.work)


def slope(values: Sequence[float], results: Sequence[float]) -> float:
    """Of the least-squares line through the logarithms: 1 is linear, 2 quadratic."""
    x, y = [math.log(v) for v in values], [math.log(r) for r in results]
    return statistics.linear_regression(x, y).slope


def sweeps(quick: bool = False) -> list[Sweep]:
    tokens = [33, 65, 129] if quick else [197, 394, 577, 785, 1025, 1569, 2305, 4096]
    kept = [4, 8, 16] if quick else [8, 16, 32, 64, 128, 256, 512]
    batches = [1, 2] if quick else [1, 2, 4, 8, 16, 32]
    length = 65 if quick else 1025  # where k varies
    found = []
    for backward in (False, True):
        title = f"topk_attention {'backward' if backward else 'forward'}"

        def sweep(variable, values, sizes, title=title, backward=backward) -> Sweep:
            """``sizes(value)`` is (batch, tokens, k)."""
            return Sweep(
                title,
                variable,
                values,
                lambda value: attention_work(*sizes(value), backward),
                lambda value: attention_call(*sizes(value), backward),
            )

        found += [
            sweep("tokens N", tokens, lambda n: (1, n, min(TOPK, n))),
            sweep("kept keys k", kept, lambda k: (1, length, k)),
            sweep("batch", batches, lambda b: (b, 197 if not quick else 33, TOPK)),
        ]
    found.append(Sweep("conv2d forward", "batch", batches, conv_work, conv_call))
    found.append(Sweep("patch_embed forward", "batch", batches, embed_work, embed_call))
    return found


def attention_work(batch: int, tokens: int, topk: int, backward: bool) -> float:
    scores = 0 if backward else 2 * tokens**2 * DIM
    chosen = (8 if backward else 2) * tokens * topk * DIM
    return float(batch * HEADS * (scores + chosen))


def attention_call(batch: int, tokens: int, topk: int, backward: bool) -> Callable[[], Any]:
    q, k, v = torch.randn(3, batch, HEADS, tokens, DIM).unbind(0)
    if not backward:
        return lambda: pyvit.topk_attention(q, k, v, topk)
    given = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone())]
    out = pyvit.topk_attention(*given, topk)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, given, grad, retain_graph=True)


def conv_work(batch: int) -> float:
    return 2.0 * batch * 64 * 28**2 * 64 * 9


def conv_call(batch: int) -> Callable[[], Any]:
    x, weight = torch.randn(batch, 64, 28, 28), torch.randn(64, 64, 3, 3)
    return lambda: pyvit.conv2d(x, weight, padding=1)


def embed_work(batch: int) -> float:
    return 2.0 * batch * 14**2 * 192 * 3 * 16**2


def embed_call(batch: int) -> Callable[[], Any]:
    image, weight = torch.randn(batch, 3, 224, 224), torch.randn(192, 3, 16, 16)
    return lambda: pyvit.patch_embed(image, weight)


def run(chosen: Sequence[Sweep], threads: Sequence[int], seconds: float) -> list[Curve]:
    """Every sweep with every number of threads; ``seconds`` for each point."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    points = [(s, n) for s in chosen for n in threads]
    curves = []
    try:
        for sweep, count in _shown(points):
            torch.set_num_threads(count)
            work = [sweep.work(value) for value in sweep.values]
            curve = Curve(sweep.name, sweep.variable, count, list(sweep.values), work)
            for value in sweep.values:
                curve.seconds.append(_median_time(sweep.make(value), seconds, count))
            curves.append(curve)
    finally:
        torch.set_num_threads(before)
    return curves


def _median_time(call: Callable[[], Any], seconds: float, threads: int) -> float:
    """Of one thread its processor time, to which other programs do not add; else wall time."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times)


def _shown(points: list[tuple[Sweep, int]]) -> Iterator[tuple[Sweep, int]]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield from points
        return
    with tqdm(points, unit="sweep", disable=None) as bar:
        for sweep, count in bar:
            bar.set_description(f"{sweep.name}, {sweep.variable}")
            yield sweep, count


def table(curves: Sequence[Curve]) -> list[list[str]]:
    lines = [["", "from", "to", "threads", "time grows", "work grows", "slope", "of the work"]]
    for c in curves:
        lines.append(
            [
                f"{c.name}, {c.variable}",
                str(c.values[0]),
                str(c.values[-1]),
                str(c.threads),
                f"{c.seconds[-1] / c.seconds[0]:.1f}x",
                f"{c.work[-1] / c.work[0]:.1f}x",
                f"{c.slope:.2f}",
                f"{c.slope_of_work:.2f}",
            ]
        )
    return lines


def write_json(path: Path, curves: Sequence[Curve], machine: dict[str, str | int]) -> None:
    rows = [
        {**dataclasses.asdict(c), "slope": c.slope, "slope_of_work": c.slope_of_work}
        for c in curves
    ]
    path.write_text(json.dumps({"machine": machine, "curves": rows}, indent=1) + "\n")


def plot(path: Path, curves: Sequence[Curve], machine: dict[str, str | int]) -> None:
    """A panel a sweep: times as points, the formula's growth as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = list(dict.fromkeys((c.name, c.variable) for c in curves))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 2.9 * rows), squeeze=False
    )
    colours = pyplot.get_cmap("tab10")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        of_panel = [c for c in curves if (c.name, c.variable) == panel]
        for number, c in enumerate(of_panel):
            label = f"{c.threads} thread{'s' if c.threads > 1 else ''}, slope {c.slope:.2f}"
            milliseconds = [s * 1e3 for s in c.seconds]
            axes.plot(
                c.values, milliseconds, "o-", markersize=3, color=colours(number), label=label
            )
            formula = [milliseconds[-1] * w / c.work[-1] for w in c.work]
            label = f"formula, slope {c.slope_of_work:.2f}" if number == 0 else None
            axes.plot(c.values, formula, "--", color="0.6", linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(of_panel[0].values[:: -max(1, len(of_panel[0].values) // 4)])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.set_title(panel[0], fontsize=9)
        axes.set_xlabel(panel[1], fontsize=8)
        axes.set_ylabel("ms", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(f"{machine['processor']}, torch {machine['torch']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
