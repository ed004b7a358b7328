"""``python -m pyvit bench``: every bench_<op>.py in this folder, in turn, and the report."""

from __future__ import annotations

import argparse
import functools
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import machine
import report
import scaling
import torch
from harness import OURS, Case, Options, Result, prepare, run

HERE = Path(__file__).parent


def ops() -> list[str]:
    return sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))


def collect(names: list[str], options: Options) -> list[Case]:
    return [
        case for name in names for case in importlib.import_module(f"bench_{name}").cases(options)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: a GPU")
    parser.add_argument("--gpu-rows", action="store_true", help="a GPU's rows on any device")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds: a check")
    parser.add_argument("--check", action="store_true", help="results alone, nothing is timed")
    parser.add_argument("--share", metavar="I/N", help="of the rows, each N-th from the I-th on")
    parser.add_argument("--only", action="append", choices=ops(), help="this op; may be repeated")
    parser.add_argument("--match", default="", help="only the rows whose title contains this")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="for each row")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd peers too (slow)")
    parser.add_argument("--threads", type=int, help="threads for ours and the peers alike")
    parser.add_argument("--repeat", type=int, default=1, help="so many separate runs, medians")
    parser.add_argument("--scaling", action="store_true", help="time against sizes, no peers")
    parser.add_argument("--merge", type=Path, nargs="+", help="report the rows of these files")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw the ratios there (needs matplotlib)")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit bench", description=__doc__)
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    if asked.scaling:
        return scale(asked)
    if asked.merge:
        results, described, peaks = merge(asked.merge)
    elif asked.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU here (python -m pyvit info says why)")
        return 2
    elif asked.repeat > 1:
        results, described, peaks = repeat(arguments, asked.repeat)
    else:
        if asked.threads:
            torch.set_num_threads(asked.threads)
        torch.manual_seed(0)
        prepare(asked.device)
        options = Options(
            quick=asked.quick,
            seconds=asked.seconds,
            compile=asked.compile,
            device=asked.device,
            gpu_rows=asked.gpu_rows or asked.device == "cuda",
            timed=not asked.check,
        )
        described = machine.describe(asked.device)
        cases = [c for c in collect(asked.only or ops(), options) if asked.match in c.id]
        if asked.share:
            first, count = map(int, asked.share.split("/"))
            cases = cases[first - 1 :: count]
        results, peaks = run_all(cases, options, described, asked.json)
    print(
        report.heading(described, peaks),
        report.table(results, peaks),
        report.summary(results, peaks),
        sep="\n\n",
    )
    if asked.quick:
        print("\na quick run: it shows that everything runs and agrees, and measures nothing")
    if asked.json:
        report.write_json(asked.json, results, described, peaks)
    if asked.plot:
        report.plot(asked.plot, results, described)
    return 1 if any(OURS in result.wrong for result in results) else 0


def scale(asked: argparse.Namespace) -> int:
    """The sweeps of scaling.py with one thread and with all (or as many as --threads says)."""
    threads = sorted({1, asked.threads or torch.get_num_threads()})
    curves = scaling.run(scaling.sweeps(asked.quick), threads, 0.0 if asked.quick else 0.2)
    described = machine.describe()
    print(f"{described['processor']}, {described['instruction_set']} kernels")
    print(report.aligned(scaling.table(curves)))
    if asked.json:
        scaling.write_json(asked.json, curves, described)
    if asked.plot:
        scaling.plot(asked.plot, curves, described)
    return 0


def merge(files: list[Path]) -> tuple[list[Result], dict[str, str | int], machine.Peaks]:
    """The rows of several files of one machine; the higher of each ceiling."""
    runs = [report.read_json(file) for file in files]
    peaks = functools.reduce(machine.Peaks.best_with, [p for *_, p in runs])
    return [row for rows, *_ in runs for row in rows], runs[-1][1], peaks


def repeat(
    arguments: list[str], times: int
) -> tuple[list[Result], dict[str, str | int], machine.Peaks]:
    """The medians of several runs, each a process of its own; the higher of each ceiling."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        for number in range(1, times + 1):
            print(f"run {number} of {times}", file=sys.stderr)
            own = ["--repeat", "1", "--json", str(file)]  # the last of an option counts
            command = [sys.executable, "-m", "pyvit", "bench", *arguments, *own]
            done = subprocess.run(command, stdout=subprocess.DEVNULL)
            if not file.exists():
                raise SystemExit(f"run {number} stopped with exit status {done.returncode}")
            runs.append(report.read_json(file))
            file.unlink()
    results = report.medians([rows for rows, _, _ in runs])
    described = {**runs[-1][1], "runs": times}
    return results, described, functools.reduce(machine.Peaks.best_with, [p for *_, p in runs])


def run_all(
    cases: list[Case],
    options: Options,
    described: dict[str, str | int] | None = None,
    file: Path | None = None,
) -> tuple[list[Result], machine.Peaks]:
    """Every case in order, and the machine's ceilings, measured before and after them.

    ``file`` has the rows so far after each, and the machine as ``described``: a run that is
    stopped leaves what it measured.
    """
    quick = options.quick or not options.timed
    peaks = machine.measure_peaks(quick, options.device)
    results = []
    for case in _shown(cases):
        results.append(run(case, options))
        if file:
            report.write_json(file, results, described or machine.describe(), peaks)
    return results, peaks.best_with(machine.measure_peaks(quick, options.device))


def _shown(cases: list[Case]) -> Iterator[Case]:
    """The cases under a progress bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from cases
        return
    with tqdm(cases, unit="row", disable=None) as bar:
        for case in bar:
            bar.set_description(f"{case.op} {case.group}")
            yield case


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
