"""The CUDA C++ kernels on a machine without a GPU: built for the host, over cuda_emulation/."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import functools
import os
import shutil
import subprocess
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import ninja
import torch

from pyvit import _C
from pyvit.ops import _backends

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests/cuda_emulation"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
# Products and sums fuse nowhere but in fmaf, as nvcc is told in setup.py.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
if _C.cpu_features().get("fma"):
    FLAGS.append("-mfma")  # fmaf by itself: else it is a call
INCLUDES = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]  # in this order: see cuda/hardware.h


class Order(enum.IntEnum):
    """Which thread of a block is always ahead of all others."""

    FORWARD = 0
    BACKWARD = 1
    SHUFFLED = 2


def build(folder: Path, sanitized: bool) -> Path:
    """The emulated kernels and their registration with torch, as a library."""
    import torch.utils.cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "pyvit_cuda_emulated.so"
    torch_includes = torch.utils.cpp_extension.include_paths()
    torch_library = Path(torch.__file__).parent / "lib"
    flags = [*FLAGS, *INCLUDES, "-fPIC", "-fvisibility=hidden", "-DPYVIT_EMULATED"]
    flags += [f"-isystem {path}" for path in torch_includes]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-g", "-O1", "-fsanitize=address"] if sanitized else ["-O2"]
    sources = [
        *sorted((ROOT / "csrc/cuda").glob("*.cu")),
        *sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp")),
        *(EMULATION / "block.cpp", EMULATION / "fibre.cpp"),
    ]
    lines = [
        "rule compile",
        f"  command = {COMPILER} -MMD -MF $out.d {' '.join(flags)} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -shared {'-fsanitize=address' if sanitized else ''} $in -o $out"
        f" -L{torch_library} -ltorch_cpu",
    ]
    objects = [folder / f"{source.parent.name}_{source.name}.o" for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        lines.append(f"build {compiled}: compile {source}")
    lines.append(f"build {library}: link {' '.join(map(str, objects))}")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, others find it built
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the host:\n{made.stdout}")
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Build and register them: as ``pyvit_cuda::<op>`` for CPU tensors."""
    sanitized = _C.build_info()["sanitized"]
    library = build(ROOT / "build" / ("emulated-sanitized" if sanitized else "emulated"), sanitized)
    _backends.load_cuda(library)
    return ctypes.CDLL(str(library))


def launches() -> dict[str, tuple[int, int]]:
    """The kernels launched so far, by their symbols: most threads and most shared memory."""
    library = load()
    library.pyvit_emulation_launches.restype = ctypes.c_char_p
    lines = library.pyvit_emulation_launches().decode().splitlines()
    symbols = subprocess.run(["nm", library._name], capture_output=True, text=True, check=True)
    names = {
        int(line[:16], 16): line.split()[-1]
        for line in symbols.stdout.splitlines()
        if line[:1] != " "
    }
    found = (map(int, line.split()) for line in lines)
    return {names[place]: (threads, shared) for place, threads, shared in found}


@contextlib.contextmanager
def schedule(order: Order, seed: int = 0) -> Iterator[None]:
    """How launches are run while it lasts: see cuda_emulation/block.h."""
    set_schedule = load().pyvit_emulation_schedule
    set_schedule(int(order), ctypes.c_uint64(seed))
    try:
        yield
    finally:
        set_schedule(int(Order.FORWARD), ctypes.c_uint64(0))


@contextlib.contextmanager
def shared_memory(most: int) -> Iterator[None]:
    """Blocks of launches while it lasts have at most that many bytes; else 163 KB, as sm_80."""
    set_most = load().pyvit_emulation_shared_memory
    set_most(ctypes.c_uint64(most))
    try:
        yield
    finally:
        set_most(ctypes.c_uint64(163 << 10))


def any_schedule(name: str) -> contextlib.AbstractContextManager[None]:
    """One of the schedules, always the same one for a name."""
    seed = zlib.crc32(name.encode())
    return schedule(Order(seed % 3), seed)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """While it lasts, ``pyvit::`` ops on CPU tensors run the kernels of ``csrc/cuda``.

    TF32 is not allowed then: results are compared with the CPU's.
    """
    load()
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precision, conv.fp32_precision = conv.fp32_precision, "ieee"
    runs_on_gpu, _backends.runs_on_gpu = _backends.runs_on_gpu, lambda value: True
    library = torch.library.Library("pyvit", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for name in _backends.triton_modules:
            library.impl(name, _backends.launcher(name, "cuda"), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
        _backends.runs_on_gpu = runs_on_gpu
        conv.fp32_precision = precision
