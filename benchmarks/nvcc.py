"""csrc/cuda compiled for sm_80 and sm_90a, on any machine; a spilled register fails.

Prints for every kernel what the compiler made of it: registers, bytes spilled and on the stack,
tensor-core instructions, and blocks that a multiprocessor can hold by its registers (shared memory
is asked for at the launch and not known here). Takes nvcc from CUDA_HOME, else from the path, else
from build/nvcc, where `make nvcc` puts one.

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
REGISTERS = 65536  # of a multiprocessor, sm_80 and sm_90


@dataclasses.dataclass
class Kernel:
    source: str
    arch: str
    name: str
    registers: int = 0
    spilled: int = 0  # bytes stored
    stack: int = 0  # bytes
    matrix: int = 0  # tensor-core instructions

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
    if not shutil.which("c++filt"):
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


def print_table(kernels: list[Kernel]) -> None:
    print("  arch  registers  spilled  stack  matrix  threads  kernel")
    source = ""
    for k in kernels:
        if k.source != source:
            source = k.source
            print(f"\n{source}")
        held = REGISTERS // max(k.registers, 1) // 32 * 32
        print(
            f"  {k.arch:>4}  {k.registers:>9}  {k.spilled:>7}  {k.stack:>5}  {k.matrix:>6}  "
            f"{min(held, 2048):>7}  {k.name}"
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
