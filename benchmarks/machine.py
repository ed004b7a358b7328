"""The machine that a run was made on, and its two ceilings, measured in the same run."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timing import Clock, GpuClock, HostClock

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
    half_flops: float | None = None  # of bfloat16 and float16, where they have units of their own

    def floor(self, flops: float, nbytes: float, dtype: str = "float32") -> float:
        """Seconds that the work takes at least. Data that stays in cache can beat the copy."""
        is_half = self.half_flops is not None and dtype in ("bfloat16", "float16")
        peak = self.half_flops if is_half else self.flops
        return max(flops / peak, nbytes / self.copy_bandwidth)

    def best_with(self, other: Peaks) -> Peaks:
        """The higher of each ceiling: a busy moment can only lower a measured one."""
        return Peaks(
            max(self.flops, other.flops),
            self.flops_source,
            max(self.matmul_flops, other.matmul_flops),
            max(self.copy_bandwidth, other.copy_bandwidth),
            max(self.half_flops or 0.0, other.half_flops or 0.0) or None,
        )


def describe(device: str = "cpu") -> dict[str, str | int]:
    return _describe_processor() | (_describe_gpu() if device == "cuda" else {})


def _describe_gpu() -> dict[str, str | int]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_mib": properties.total_memory >> 20,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver_version(),
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or 0,
        "triton": importlib.metadata.version("triton"),
    }


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return printed.strip().splitlines()[0] if printed.strip() else "unknown"


def _describe_processor() -> dict[str, str | int]:
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


def measure_peaks(quick: bool = False, device: str = "cpu") -> Peaks:
    seconds = 0.05 if quick else 0.25
    if device == "cuda":
        return _measure_gpu(seconds)
    shapes = ((1024, 1024, 1024), (2048, 2048, 1024), (768, 3136, 768), (1536, 1536, 2048))
    matmul = _best_matmul(shapes, torch.float32, HostClock(), seconds)
    fma = _fma_peak(seconds)
    source = "independent FMA chains on every thread (fma_peak.cpp)"
    if fma is None:
        source = "best of several torch.mm shapes (no C++ compiler for fma_peak.cpp)"
    return Peaks(fma or matmul, source, matmul, _copy_bandwidth(256, HostClock()))


def _measure_gpu(seconds: float) -> Peaks:
    """Random numbers, as everywhere: zeros cost a GPU less power, and let it run faster."""
    gpu_clock = GpuClock()
    with torch.device("cuda"):
        squares = ((4096, 4096, 4096), (8192, 8192, 8192))
        single = _best_matmul(squares, torch.float32, gpu_clock, seconds)
        half = _best_matmul(squares, torch.bfloat16, gpu_clock, seconds)
        copied = _copy_bandwidth(1024, gpu_clock)
    return Peaks(single, "best torch.mm, TF32 off", single, copied, half)


def _best_rate(work: float, call: Callable[[], object], seconds: float, clock: Clock) -> float:
    """Most work a second that one call reached; at least three calls."""
    best, end, calls = 0.0, time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        best = max(best, work / clock(call, 1))
        calls += 1
    return best


def _best_matmul(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, clock: Clock, seconds: float
) -> float:
    """Sizes that BLAS libraries like: square ones, and a deep one that amortises packing."""
    best = 0.0
    for m, n, k in shapes:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        product = partial(torch.mm, a, b, out=torch.empty(m, n, dtype=dtype))
        best = max(best, _best_rate(2.0 * m * n * k, product, seconds, clock))
    return best


def _copy_bandwidth(megabytes: int, clock: Clock) -> float:
    source = torch.rand(megabytes << 18)  # float32, and larger than the cache
    target = torch.zeros_like(source)
    return _best_rate(2.0 * 4 * source.numel(), lambda: target.copy_(source), 0.5, clock)


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
        all_cores = partial(pool.map, one_core, [rounds] * threads)
        return _best_rate(work, lambda: list(all_cores()), seconds, HostClock())
