"""``python -m pyvit``: what is installed, and what runs here."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import pyvit
from pyvit import _native


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_lines() -> list[str]:
    lines = []
    if not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no GPU found"
        lines.append(f"cuda        does not run: {reason}")
    else:
        lines.append(
            f"cuda        {torch.cuda.get_device_name()}: no GPU kernel is part of this version"
        )
    try:
        import triton

        lines.append(f"triton      {triton.__version__} installed; no Triton kernel in this version")
    except ImportError:
        lines.append("triton      not installed (pip install triton); not needed on the CPU")
    return lines


def info() -> int:
    """Print what is built and what this machine can run; 1 where no CPU kernel runs."""
    print(f"pyvit       {pyvit.__version__}")
    print(f"torch       {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python      {platform.python_version()}")
    print(f"processor   {processor_name()}")
    try:
        from pyvit import _C

        build = _C.build_info()
        sanitized = ", with sanitizers" if build["sanitized"] else ""
        print(f"built by    {build['compiler']} against torch {build['torch']}{sanitized}")
    except ImportError:
        pass  # the lines below say that nothing is built, and what to do
    for isa, state in _native.status().items():
        used = " and is used" if isa == _native.loaded_isa else ""
        verdict = f"runs{used}" if state == "runs" else f"does not run: {state}"
        print(f"cpu {isa:<8}{verdict}")
    for line in gpu_lines():
        print(line)
    if _native.loaded_isa is None:
        print(f"\nNo CPU kernel is loaded: {_native.load_problem}")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built and what this machine can run, and why not")
    parser.parse_args(arguments)
    return info()


if __name__ == "__main__":
    sys.exit(main())
