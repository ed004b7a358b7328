"""``python -m pyvit bench``: every bench_<op>.py in this folder, in turn, and the report."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import machine
import report
import torch
from harness import OURS, Case, Options, Result, run

HERE = Path(__file__).parent


def ops() -> list[str]:
    return sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))


def collect(names: list[str], options: Options) -> list[Case]:
    return [
        case for name in names for case in importlib.import_module(f"bench_{name}").cases(options)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds: a check")
    parser.add_argument("--only", action="append", choices=ops(), help="this op; may be repeated")
    parser.add_argument("--match", default="", help="only the rows whose title contains this")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd peers too (slow)")
    parser.add_argument("--threads", type=int, help="threads for ours and the peers alike")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw the ratios there (needs matplotlib)")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit bench", description=__doc__)
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    options = Options(quick=asked.quick, compile=asked.compile)
    cases = [c for c in collect(asked.only or ops(), options) if asked.match in c.id]
    described, peaks = machine.describe(), machine.measure_peaks(asked.quick)
    print(report.heading(described, peaks), end="\n\n", flush=True)
    results = run_all(cases, options)
    print(report.table(results, peaks))
    if asked.json:
        report.write_json(asked.json, results, described, peaks)
    if asked.plot:
        report.plot(asked.plot, results, described)
    return 1 if any(OURS in result.wrong for result in results) else 0


def run_all(cases: list[Case], options: Options) -> list[Result]:
    """Every case in order, under a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return [run(case, options) for case in cases]
    results = []
    with tqdm(total=len(cases), unit="row", disable=None) as bar:
        for case in cases:
            bar.set_description(f"{case.op} {case.group}")
            results.append(run(case, options))
            bar.update()
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
