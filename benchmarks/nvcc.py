"""csrc/cuda compiled for sm_80 and sm_90a, on any machine; a spilled register fails.

Prints for every kernel what the compiler made of it: registers, bytes spilled and on the stack, and
tensor-core instructions. Threads and shared memory are asked for at a launch: with --launches every
op of tests/gpu_calls.py is run by the emulation, and the largest launch of each kernel is told,
with the blocks that a multiprocessor holds of it. Takes nvcc from CUDA_HOME, else from the path,
else from build/nvcc, where `make nvcc` puts one.

    python benchmarks/nvcc.py --only attention
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a")
# As in setup.py: products and sums fuse where fmaf says so and nowhere else.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
# Of a multiprocessor: registers, threads, blocks, and bytes of shared memory by architecture.
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, {"80": 164 << 10, "90a": 228 << 10}


@dataclasses.dataclass
class Kernel:
    source: str
    arch: str
    name: str
    registers: int = 0
    spilled: int = 0  # bytes stored
    stack: int = 0  # bytes
    matrix: int = 0  # tensor-core instructions
    threads: int = 0  # of a block, in the largest launch; 0 where there was none
    shared: int = 0  # bytes, likewise

    @property
    def blocks(self) -> int:
        """At once on a multiprocessor; registers are given out by warps, 256 at a time."""
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // (of_warp * -(-self.threads // 32))
        by_shared = SHARED[self.arch] // (self.shared + 1024)
        return min(by_registers, THREADS // self.threads, BLOCKS, by_shared)

    @property
    def problems(self) -> list[str]:
        found = [f"{self.spilled} bytes of registers are spilled"] if self.spilled else []
        return found + ([f"{self.stack} bytes on the stack"] if self.stack else [])


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return Path(home) / "bin/nvcc"
    if found := shutil.which("nvcc"):
        return Path(found)
    return next((ROOT / "build/nvcc").glob("nvidia/*/bin/nvcc"), None)


def demangled(names: list[str]) -> dict[str, str]:
    """Without namespaces and parameters: ``conv2d_kernel<float, 64>``."""
    if not names or not shutil.which("c++filt"):  # without names it would wait for its input
        return {name: name for name in names}
    run = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = {}
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        line = re.sub(r"\(anonymous namespace\)::|pyvit::cuda::|^void ", "", line)
        depth = 0
        for place, letter in enumerate(line):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0 and line[place - 1] != "<":
                line = line[:place]
                break
        short[name] = line
    return short


def disassembler() -> str | None:
    """cuobjdump: of the toolkit, or the one inside Triton's package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def matrix_instructions(cubin: Path) -> dict[str, int]:
    """Of each kernel, by its mangled name; empty where there is no disassembler."""
    program = disassembler()
    if program is None:
        return {}
    run = subprocess.run([program, "-sass", cubin], capture_output=True, text=True, check=True)
    counts: dict[str, int] = {}
    name = ""
    for line in run.stdout.splitlines():
        if "Function :" in line:
            name = line.split(":", 1)[1].strip()
            counts[name] = 0
        elif re.search(r"\b(HMMA|HGMMA)\.", line):
            counts[name] += 1
    return counts


def compile_source(nvcc: Path, source: Path, arch: str) -> list[Kernel]:
    """Raises RuntimeError with the compiler's words where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *FLAGS, code, "-cubin", source, "-o", cubin]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{source.name}, sm_{arch}: nvcc refuses it\n{run.stdout}")
        counts = matrix_instructions(cubin)
    kernels: list[Kernel] = []
    for line in run.stdout.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append(Kernel(source.name, arch, entry[1], matrix=counts.get(entry[1], 0)))
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            kernels[-1].stack, kernels[-1].spilled = int(frame[1]), int(frame[2])
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(used[1])
    names = demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return sorted(kernels, key=lambda kernel: kernel.name)


def add_launches(kernels: list[Kernel]) -> None:
    """Threads and shared memory, from the emulation of every op in every type."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from cuda_emulator import emulated, launches
    from gpu_calls import CALLS

    with emulated():
        for call in CALLS.values():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                call(dtype).results()
    found = launches()
    names = demangled(list(found))
    # The emulation's own types of 16 bits.
    of_host = [(r"\bbfloat16\b", "__nv_bfloat16"), (r"\bfloat16\b", "__half")]
    by_name = {}
    for symbol, launch in found.items():
        name = names[symbol]
        for pattern, replacement in of_host:
            name = re.sub(pattern, replacement, name)
        by_name[name] = launch
    for kernel in kernels:
        kernel.threads, kernel.shared = by_name.get(kernel.name, (0, 0))


def print_table(kernels: list[Kernel]) -> None:
    print("  arch  registers  spilled  stack  matrix  threads   shared  blocks  kernel")
    source = ""
    for k in kernels:
        if k.source != source:
            source = k.source
            print(f"\n{source}")
        launch = f"{k.threads:>7}  {k.shared / 1024:>4.0f} KB  {k.blocks:>6}" if k.threads else ""
        print(
            f"  {k.arch:>4}  {k.registers:>9}  {k.spilled:>7}  {k.stack:>5}  {k.matrix:>6}  "
            f"{launch:>24}  {k.name}"
        )
        for problem in k.problems:
            print(f"        FAILS: {problem}")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/nvcc.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only files with it in the name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    told = "run every op in the emulation and tell threads, shared memory, blocks (a minute)"
    parser.add_argument("--launches", action="store_true", help=told)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args(given)
    nvcc = find_nvcc()
    if nvcc is None or not nvcc.exists():
        print("nvcc is not found: set CUDA_HOME, or use `make nvcc`, which fetches one")
        return 2
    sources = [s for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) if options.only in s.name]
    if not sources:
        print(f"no file of csrc/cuda has {options.only!r} in its name")
        return 2
    begin = time.monotonic()
    jobs = [(source, arch) for source in sources for arch in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        try:
            results = list(pool.map(lambda job: compile_source(nvcc, *job), jobs))
        except RuntimeError as error:
            print(error)
            return 1
    kernels = [kernel for result in results for kernel in result]
    if options.launches:
        add_launches(kernels)
    print_table(kernels)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([dataclasses.asdict(k) for k in kernels], indent=1))
    wrong = [kernel for kernel in kernels if kernel.problems]
    print(
        f"\n{len(kernels)} kernels, {time.monotonic() - begin:.0f} s: {len(wrong) or 'none'} failed"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
