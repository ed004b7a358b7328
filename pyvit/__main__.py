"""``python -m pyvit``: what is installed, what runs here, and how fast."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from pathlib import Path

import torch

import pyvit
from pyvit import _native
from pyvit.ops import _backends


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_lines() -> list[str]:
    """Which kernels a GPU has here, and why not others."""
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no GPU found"
        gpu = f"none: {reason}"
    triton = _backends.triton_problem() or _backends.triton_version()
    return [
        f"gpu           {gpu}",
        f"  triton      {triton}",
        f"  cuda c++    {_backends.cuda_problem() or 'built'}",
    ]


def info() -> int:
    """Print what is built and what this machine can run; 1 where no CPU kernel runs."""
    print(f"pyvit         {pyvit.__version__}")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python        {platform.python_version()}")
    print(f"processor     {processor_name()}")
    try:
        from pyvit import _C  # type: ignore[attr-defined]  # compiled

        build = _C.build_info()
        sanitized = ", with sanitizers" if build["sanitized"] else ""
        print(f"built by      {build['compiler']} against torch {build['torch']}{sanitized}")
    except ImportError:
        pass  # the lines below say that nothing is built, and what to do
    for isa, state in _native.status().items():
        used = " and is used" if isa == _native.loaded_isa else ""
        verdict = f"runs{used}" if state == "runs" else f"does not run: {state}"
        print(f"cpu {isa:<10}{verdict}")
    for line in gpu_lines():
        print(line)
    if _native.loaded_isa is None:
        print(f"\nNo CPU kernel is loaded: {_native.load_problem}")
        return 1
    return 0


def checkout_folder(name: str, marker: str) -> Path | None:
    """A folder of the source checkout: beside this package, or in the working directory."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / name / marker).is_file():
            return root / name
    return None


def bench(arguments: list[str]) -> int:
    """Run the benchmark suite, which lives beside the package in a source checkout."""
    benchmarks, tests = (
        checkout_folder("benchmarks", "suite.py"),
        checkout_folder("tests", "accuracy.py"),
    )
    if benchmarks is None or tests is None:
        print(
            "The benchmarks are not part of an installed pyvit: they lie in the source checkout.\n"
            "Run this from its folder, or `make bench` there.",
            file=sys.stderr,
        )
        return 2
    sys.path[:0] = [str(benchmarks), str(tests)]
    return importlib.import_module("suite").main(arguments)


def tune() -> int:
    """Measure configurations of the GPU kernels and keep the fastest for later calls."""
    if not torch.cuda.is_available():
        print("pyvit tune: there is no GPU here to measure on.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("pyvit tune: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    return importlib.import_module("pyvit.kernels.tune").main()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built and what this machine can run, and why not")
    commands.add_parser("tune", help="measure the GPU kernels' configurations on this GPU")
    commands.add_parser("bench", help="every kernel against PyTorch (bench --help)", add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return tune() if chosen.command == "tune" else info()


if __name__ == "__main__":
    sys.exit(main())
