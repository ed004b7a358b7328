"""Turns results into a table, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from harness import OURS, Result
from machine import Peaks

_FASTEST = "fastest peer"


def share_of_floor(result: Result, peaks: Peaks) -> float:
    return peaks.floor(result.flops, result.bytes, result.dtype) / result.seconds[OURS]


def geometric_means(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, float]]:
    """{(op, group): {peer: geometric mean of ours' ratio to it}}, the fastest peer too."""
    logs: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        of_group = logs[result.op, result.group]
        for peer, ratio in result.ratio.items():
            of_group[peer].append(math.log(ratio))
        if result.fastest_peer is not None:
            of_group[_FASTEST].append(math.log(result.ratio[result.fastest_peer]))
    return {
        group: {peer: math.exp(sum(values) / len(values)) for peer, values in peers.items()}
        for group, peers in logs.items()
    }


def medians(runs: Sequence[Sequence[Result]]) -> list[Result]:
    """One result a row from several runs of the same rows: medians of times and ratios.

    A row, or a peer, that was wrong in any run is wrong.
    """
    merged = []
    for rows in zip(*runs, strict=True):
        first = rows[0]
        assert all((r.op, r.group, r.name) == (first.op, first.group, first.name) for r in rows)
        wrong = {name: why for row in rows for name, why in row.wrong.items()}

        def over_runs(attribute: str, pick, rows=rows, wrong=wrong) -> dict:
            tables = [getattr(row, attribute) for row in rows]
            shared = [n for n in tables[0] if n not in wrong and all(n in t for t in tables)]
            return {name: pick([table[name] for table in tables]) for name in shared}

        merged.append(
            dataclasses.replace(
                first,
                wrong=wrong,
                seconds=over_runs("seconds", statistics.median),
                ratio=over_runs("ratio", statistics.median),
                spread=over_runs("ratio", lambda ratios: (min(ratios), max(ratios))),
                peak_bytes=over_runs("peak_bytes", max),
                rounds=sum(row.rounds for row in rows),
            )
        )
    return merged


def summary(results: Sequence[Result], peaks: Peaks) -> str:
    """One line for each (op, group): ours against the fastest peer of each row."""
    lines = [["", "rows", "mean", "lowest", "highest", "of floor"]]
    means = geometric_means(results)
    for op, group in dict.fromkeys((r.op, r.group) for r in results if r.ratio):
        rows = [r for r in results if (r.op, r.group) == (op, group) and r.ratio]
        ratios = sorted(r.ratio[r.fastest_peer] for r in rows)
        shares = statistics.median(share_of_floor(r, peaks) for r in rows)
        numbers = (means[op, group][_FASTEST], ratios[0], ratios[-1])
        lines.append(
            [f"{op} {group}", str(len(rows)), *(f"{n:.2f}x" for n in numbers), f"{shares:.0%}"]
        )
    return "against the fastest peer of each row\n" + aligned(lines)


def table(results: Sequence[Result], peaks: Peaks) -> str:
    """One block for each (op, group): its rows, then its geometric means."""
    means = geometric_means(results)
    blocks = []
    for op, group in dict.fromkeys((r.op, r.group) for r in results):
        rows = [r for r in results if (r.op, r.group) == (op, group)]
        peers = list(dict.fromkeys(peer for r in rows for peer in r.ratio))
        on_gpu = peaks.half_flops is not None  # a processor's times say little elsewhere
        lines = [["", *(f"vs {peer}" for peer in peers), "of floor", "peak MB"]]
        lines[0] += ["ms"] if on_gpu else []
        for row in rows:
            cells = _cells(row, peers, peaks)
            if on_gpu:
                cells.append(f"{row.seconds[OURS] * 1e3:.3f}" if OURS in row.seconds else "")
            lines.append(cells)
        of_group = means.get((op, group), {})
        if len(rows) > 1 and of_group:
            mean = [f"{of_group[peer]:.2f}x" if peer in of_group else "" for peer in peers]
            lines.append(["geometric mean", *mean, *("" for _ in lines[0][len(mean) + 1 :])])
        title = f"{op} {group}"
        if _FASTEST in of_group:
            title += f": {of_group[_FASTEST]:.2f}x the fastest peer of each row"
        blocks.append(title + "\n" + aligned(lines))
        for row in rows:
            blocks += [f"  WRONG {name} in {row.name}: {why}" for name, why in row.wrong.items()]
    return "\n\n".join(blocks)


def _cells(result: Result, peers: Sequence[str], peaks: Peaks) -> list[str]:
    if OURS not in result.seconds:  # wrong, or not timed
        state = "wrong" if OURS in result.wrong else ""
        return [result.name, *(state for _ in peers), "", ""]
    ratios = [
        "wrong"
        if peer in result.wrong
        else f"{result.ratio[peer]:.2f}x"
        if peer in result.ratio
        else ""
        for peer in peers
    ]
    memory = result.peak_bytes.get(OURS)
    peak = "" if memory is None else f"{memory / 2**20:.1f}"
    return [result.name, *ratios, f"{share_of_floor(result, peaks):.0%}", peak]


def aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def heading(machine: dict[str, str | int], peaks: Peaks) -> str:
    runs = f", medians of {machine['runs']} runs" if "runs" in machine else ""
    half = peaks.half_flops
    products = f"best torch.mm {_rate(peaks.matmul_flops)}"
    if half is not None:
        products = f"{_rate(half)} bfloat16: best torch.mm"
    return (
        f"{title(machine)}{runs}, {_kernels(machine)} kernels, torch {machine['torch']}\n"
        f"ceiling {_rate(peaks.flops)} float32: {peaks.flops_source}; {products}; "
        f"copy {peaks.copy_bandwidth / 1e9:.1f} GB/s\n"
        "ratios are (peer's time / our time): above 1 means that pyvit is faster"
    )


def title(machine: dict[str, str | int]) -> str:
    """What the rows ran on."""
    if "gpu" in machine:
        versions = f"driver {machine['driver']}, CUDA {machine['cuda']}"
        return f"{machine['gpu']}, {versions}"
    return f"{machine['processor']}, {machine['threads']} threads"


def _kernels(machine: dict[str, str | int]) -> str | int:
    return f"Triton {machine['triton']}" if "gpu" in machine else machine["instruction_set"]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s"


def write_json(
    path: Path, results: Sequence[Result], machine: dict[str, str | int], peaks: Peaks
) -> None:
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        if OURS in result.seconds:
            row["share_of_floor"] = share_of_floor(result, peaks)
        rows.append(row)
    means = [
        {"op": op, "group": group, "ratio": ratios}
        for (op, group), ratios in geometric_means(results).items()
    ]
    content = {
        "machine": machine,
        "peaks": dataclasses.asdict(peaks),
        "geometric_means": means,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> tuple[list[Result], dict[str, str | int], Peaks]:
    content = json.loads(path.read_text())
    names = {f.name for f in dataclasses.fields(Result)}
    rows = [{k: v for k, v in row.items() if k in names} for row in content["rows"]]
    return [Result(**row) for row in rows], content["machine"], Peaks(**content["peaks"])


def plot(path: Path, results: Sequence[Result], machine: dict[str, str | int]) -> None:
    """One bar a row: the ratio to its fastest peer, on a logarithmic axis; grouped by op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    timed = [r for r in results if r.ratio]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.21 * max(len(timed), 4)))
    groups = list(dict.fromkeys((r.op, r.group) for r in timed))
    colours = pyplot.get_cmap("tab10")
    for position, result in enumerate(timed):
        ratio = result.ratio[result.fastest_peer]
        colour = colours(groups.index((result.op, result.group)) % 10)
        axes.barh(position, ratio - 1, left=1, color=colour, height=0.75)
        label = f" {ratio:.2f}× {result.fastest_peer}"
        axes.text(max(ratio, 1), position, label, va="center", fontsize=6, color="0.3")
    axes.set_yticks(range(len(timed)))
    axes.set_yticklabels([f"{r.op} {r.group}  {r.name}" for r in timed], fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.25, y=0.01)
    axes.set_xlabel("speed relative to the fastest peer of the row (right of 1×: pyvit is faster)")
    axes.set_title(
        f"{title(machine)}, torch {machine['torch']}",
        fontsize=8,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
