"""Loads the compiled CPU kernels: the best instruction set that was built and that runs here.

``PYVIT_CPU_ISA`` (baseline, avx2 or avx512) asks for one by name, for tests and comparisons.
Importing never fails: where nothing can be loaded, ``load_problem`` says why, and the ops raise
when they are called.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Best first, with the processor features each needs.
_NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),
}
_BUILD_COMMAND = "pip install --no-build-isolation . (in pyvit's source folder)"

loaded_isa: str | None = None
load_problem = ""


def library_path(isa: str) -> Path:
    return Path(__file__).parent / f"_cpu_{isa}.so"


def status() -> dict[str, str]:
    """For each instruction set, best first: "runs", or why it does not."""
    try:
        from pyvit import _C
    except ImportError as error:
        return {isa: f"pyvit._C is not built ({error}): {_BUILD_COMMAND}" for isa in _NEEDS}
    features = _C.cpu_features()
    report = {}
    for isa, needed in _NEEDS.items():
        missing = [feature for feature in needed if not features.get(feature)]
        if missing:
            report[isa] = f"this processor lacks {', '.join(missing)}"
        elif not library_path(isa).exists():
            report[isa] = f"not built: {_BUILD_COMMAND}"
        else:
            report[isa] = "runs"
    return report


def _load() -> None:
    global loaded_isa, load_problem
    report = status()
    asked = os.environ.get("PYVIT_CPU_ISA")
    if asked is not None and asked not in _NEEDS:
        load_problem = f"PYVIT_CPU_ISA={asked!r} is none of {', '.join(_NEEDS)}"
        return
    for isa in [asked] if asked else _NEEDS:
        if report[isa] != "runs":
            load_problem = load_problem or f"{isa}: {report[isa]}"
            continue
        try:
            torch.ops.load_library(str(library_path(isa)))
        except OSError as error:
            load_problem = f"{isa}: {error.__cause__ or error}"
            continue
        loaded_isa, load_problem = isa, ""
        return


_load()
