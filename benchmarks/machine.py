"""The machine that a run was made on, and its two ceilings, measured in the same run."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import pyvit
from pyvit import _native
from pyvit.__main__ import processor_name

_FMA_SOURCE = Path(__file__).with_name("fma_peak.cpp")


@dataclass(frozen=True)
class Peaks:
    """Ceilings of this machine with the threads that torch uses."""

    flops: float  # float32 operations a second
    flops_source: str
    matmul_flops: float  # the best torch.mm of several shapes, for orientation
    copy_bandwidth: float  # bytes a second, reads and writes both counted

    def floor(self, flops: float, nbytes: float) -> float:
        """Seconds that the work takes at least. Data that stays in cache can beat the copy."""
        return max(flops / self.flops, nbytes / self.copy_bandwidth)

    def best_with(self, other: Peaks) -> Peaks:
        """The higher of each ceiling: a busy moment can only lower a measured one."""
        return Peaks(
            max(self.flops, other.flops),
            self.flops_source,
            max(self.matmul_flops, other.matmul_flops),
            max(self.copy_bandwidth, other.copy_bandwidth),
        )


def describe() -> dict[str, str | int]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "instruction_set": _native.loaded_isa or "none loaded",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "pyvit": pyvit.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def measure_peaks(quick: bool = False) -> Peaks:
    seconds = 0.05 if quick else 0.25
    matmul = _best_matmul(seconds)
    fma = _fma_peak(seconds)
    source = "independent FMA chains on every thread (fma_peak.cpp)"
    if fma is None:
        source = "best of several torch.mm shapes (no C++ compiler for fma_peak.cpp)"
    return Peaks(fma or matmul, source, matmul, _copy_bandwidth(megabytes=256))


def _best_rate(work: float, call: Callable[[], object], seconds: float) -> float:
    """Most work a second that one call reached; at least three calls."""
    best, end, calls = 0.0, time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = max(best, work / (time.perf_counter() - begin))
        calls += 1
    return best


def _best_matmul(seconds: float) -> float:
    """Sizes that BLAS libraries like: square ones, and a deep one that amortises packing."""
    best = 0.0
    for m, n, k in ((1024, 1024, 1024), (2048, 2048, 1024), (768, 3136, 768), (1536, 1536, 2048)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        out = torch.empty(m, n)
        best = max(best, _best_rate(2.0 * m * n * k, lambda: torch.mm(a, b, out=out), seconds))  # noqa: B023
    return best


def _copy_bandwidth(megabytes: int) -> float:
    source = torch.rand(megabytes << 18)  # float32, and larger than the cache
    target = torch.zeros_like(source)
    return _best_rate(2.0 * 4 * source.numel(), lambda: target.copy_(source), seconds=0.5)


def _fma_peak(seconds: float) -> float | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        command = [*compiler.split(), *flags, str(_FMA_SOURCE), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        burst = ctypes.CDLL(str(library)).fma_burst  # ctypes lets go of the GIL while it runs
    burst.restype = ctypes.c_double
    burst.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    threads = torch.get_num_threads()

    def one_core(rounds: int) -> float:
        return burst(rounds, ctypes.byref(ctypes.c_float()))

    begin = time.perf_counter()
    one_core(1_000_000)
    rounds = max(1000, int(1_000_000 * 0.02 / (time.perf_counter() - begin)))  # 20 ms a burst
    with ThreadPoolExecutor(threads) as pool:
        work = sum(pool.map(one_core, [rounds] * threads))
        return _best_rate(work, lambda: list(pool.map(one_core, [rounds] * threads)), seconds)
