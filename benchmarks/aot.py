"""``make aot``: the Triton kernels compiled for GPUs that are not here, and what came out.

The launchers of ``kernels/`` run on meta tensors, which have sizes but no memory, and every launch
they would make is recorded instead: so what is compiled is what a GPU would be given, in the
shipped configurations (aot_cases.py lists them). For each kernel a table tells registers, spilled
bytes, shared memory, matrix instructions, and how many programs a multiprocessor holds at once;
beside it what the work costs at least on an H200 (cost.py). A kernel fails that spills, that asks
for more shared memory than there is, or that multiplies matrices without matrix instructions:
HGMMA alone on sm_90 for 16-bit types, HMMA on sm_80. float32 has none, unless TF32 is allowed: its
products must be fused multiply-adds.

It compiles with the Triton that is installed. For another one, ``make aot TRITON=3.6.0``, which is

    pip install --no-deps --target build/triton-3.6.0 triton==3.6.0
    PYTHONPATH=build/triton-3.6.0 python benchmarks/aot.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # with it there is nothing to compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pyvit.kernels import tuning

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor, and of one program's shared memory."""

    registers: int
    warps: int
    programs: int
    shared: int
    shared_of_program: int


LIMITS = {
    80: Limits(65536, 64, 32, 164 << 10, 163 << 10),
    90: Limits(65536, 64, 32, 228 << 10, 227 << 10),
}


@dataclass
class Launch:
    """One launch that a launcher wanted."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Report:
    """What one kernel became on one architecture."""

    case: str
    kernel: str
    arch: int
    configuration: dict[str, Any]
    grid: int
    registers: int  # of a thread
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a program
    warps: int
    hgmma: int
    hmma: int
    programs: int  # that fit a multiprocessor at once
    problems: list[str]
    allowed: list[str]
    ffma: int = 0
    narrow: int = 0  # loads of two bytes, where sixteen may be had


# ---- from a case to machine code ----------------------------------------------------------------


def launches(call: Callable[[], Any], arch: int, tf32: bool = False) -> list[Launch]:
    """What ``call``, a launcher on meta tensors, would launch on such a GPU."""
    recorded = []

    def record(self, *args, grid, warmup, **options):
        sizes = grid(options) if callable(grid) else grid
        recorded.append(Launch(self, tuple(sizes), args, options))

    run, JITFunction.run = JITFunction.run, record
    capability, tuning.capability = tuning.capability, lambda tensor: arch
    try:
        with tuning.precision(tf32):
            call()
    finally:
        JITFunction.run, tuning.capability = run, capability
    return recorded


def prepare(launch: Launch, arch: int) -> tuple[ASTSource, GPUTarget, dict[str, Any], str]:
    """Source, target and options for ``triton.compile``, and a key that tells kernels apart."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*launch.args, **launch.options, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**launch.options, "debug": False}, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return source, target, dict(options.__dict__), f"{source.hash()} {options.hash()} {arch}"


def compile_for(launch: Launch, arch: int):
    source, target, options, _ = prepare(launch, arch)
    return triton.compile(source, target=target, options=options)


# ---- what it became -----------------------------------------------------------------------------


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump, which comes with Triton, says of machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def programs_at_once(registers: int, warps: int, shared: int, limits: Limits) -> int:
    """By registers (given out by warps, 256 at a time), warps and shared memory."""
    of_warp = -(-registers * 32 // 256) * 256
    fits = [limits.registers // of_warp // warps, limits.warps // warps, limits.programs]
    if shared:
        fits.append(limits.shared // (shared + 1024))
    return min(fits)


def expected(code: str, arch: int) -> str:
    """The instruction that a kernel's matrix products (of its Triton code) should become."""
    products = [line for line in code.splitlines() if "tt.dot " in line]
    narrow = any(re.search(r"x(bf16|f16)> \*", line) for line in products)
    if narrow:
        return "HGMMA" if arch >= 90 else "HMMA"
    if any("inputPrecision = tf32" in line for line in products):
        return "either"
    return "FFMA" if products else ""


def problems(report: Report, wanted: str) -> list[str]:
    found = []
    limit = LIMITS[report.arch].shared_of_program
    if report.spilled:
        found.append(f"spills {report.spilled} bytes a thread")
    if report.shared > limit:
        found.append(f"{report.shared >> 10} KB of shared memory, the limit is {limit >> 10}")
    if wanted == "HGMMA" and (report.hgmma == 0 or report.hmma > 0):
        found.append(f"{report.hgmma} HGMMA and {report.hmma} HMMA, not HGMMA alone")
    if wanted == "HMMA" and report.hmma == 0:
        found.append("no HMMA")
    if wanted == "either" and report.hgmma + report.hmma == 0:
        found.append("neither HGMMA nor HMMA")
    if wanted == "FFMA" and report.ffma == 0:
        found.append("no FFMA: products and sums are not fused")
    return found


def inspect(
    compiled, launch: Launch, arch: int, case: str = "", allowed: str = "", measured: bool = False
) -> Report:
    """From the machine code itself. ``allowed`` excuses a missing HGMMA and says why; where it was
    ``measured``, only what cannot run is a problem."""
    usage, code = dump(compiled.asm["cubin"], "-res-usage"), dump(compiled.asm["cubin"], "-sass")
    registers, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    simple = {k: v for k, v in launch.options.items() if k.isupper() or k.startswith("num_")}
    grid = 1
    for size in launch.grid:
        grid *= size
    report = Report(
        case=case,
        kernel=launch.kernel.fn.__name__,
        arch=arch,
        configuration=simple,
        grid=grid,
        registers=registers,
        spilled=local if re.search(r"\b(LDL|STL)\b", code) else 0,
        shared=shared,
        warps=warps,
        hgmma=len(re.findall(r"\bHGMMA\b", code)),
        hmma=len(re.findall(r"\bHMMA\b", code)),
        programs=programs_at_once(registers, warps, shared, LIMITS[arch]),
        problems=[],
        allowed=[],
        ffma=len(re.findall(r"\bFFMA\b", code)),
        narrow=len(re.findall(r"\bLDG\S*\.U16\b", code)),
    )
    wanted = expected(compiled.asm["ttir"], arch)
    report.problems = problems(report, wanted)
    if allowed and wanted == "HGMMA" and report.hmma:
        excused = [p for p in report.problems if "HGMMA" in p]
        report.problems = [p for p in report.problems if p not in excused]
        report.allowed = [f"{p}: {allowed}" for p in excused]
    if measured:
        report.allowed = [p for p in report.problems if "shared memory" not in p]
        report.problems = [p for p in report.problems if "shared memory" in p]
    return report


# ---- all of them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    case: int
    launch: int
    arch: int


def load(path: Path):
    """The cases of a Python file: what its ``cases()`` yields."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return list(module.cases())


def plan(cases, archs: list[int]) -> list[Job]:
    """Every kernel once, however many cases launch it."""
    jobs, seen = [], set()
    for i, case in enumerate(cases):
        for arch in archs:
            for j, launch in enumerate(launches(case.call, arch, case.dtype == "tf32")):
                key = prepare(launch, arch)[-1]
                if key not in seen:
                    seen.add(key)
                    jobs.append(Job(i, j, arch))
    return jobs


_cases: list = []  # of this process: workers are forked with it


def run(job: Job) -> Report:
    torch.set_num_threads(1)
    case = _cases[job.case]
    launch = launches(case.call, job.arch, case.dtype == "tf32")[job.launch]
    name = launch.kernel.fn.__name__
    try:
        compiled = compile_for(launch, job.arch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        empty = dict.fromkeys(("grid", "registers", "spilled", "shared", "warps"), 0)
        empty |= dict.fromkeys(("hgmma", "hmma", "programs"), 0)
        failed = [f"does not compile: {lines[-1]}"]
        return Report(case.id, name, job.arch, {}, problems=failed, allowed=[], **empty)
    allowed, measured = case.allowed.get((name, job.arch), ""), getattr(case, "measured", False)
    return inspect(compiled, launch, job.arch, case.id, allowed, measured)


def reports(cases, jobs: list[Job], workers: int) -> list[Report]:
    """In the order of ``jobs``, with a line of progress."""
    global _cases
    _cases = cases
    done: dict[Job, Report] = {}
    begin, shown = time.monotonic(), sys.stderr.isatty()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            line = f"compiled {len(done)} of {len(jobs)}, {time.monotonic() - begin:.0f} s"
            if shown:
                print(f"\r{line}", end="\n" if len(done) == len(jobs) else "", file=sys.stderr)
            elif len(done) % 20 == 0 or len(done) == len(jobs):
                print(line, file=sys.stderr, flush=True)
    return [done[job] for job in jobs]


# ---- what is printed ----------------------------------------------------------------------------


def time_of(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def remark(report: Report) -> str:
    """Whether the grid suits the H200, and loads memory."""
    import cost

    if report.programs == 0 or report.arch != 90:
        return ""
    count = cost.waves(report.grid, report.programs)
    share = cost.last_wave_share(report.grid, report.programs)
    idle = f", {1 - share:.0%} idle in the last" if count < 8 and share < 0.85 else ""
    narrow = f", {report.narrow} loads of 2 bytes" if report.narrow else ""
    return f"  {count:.1f} waves{idle}{narrow}"


def print_table(cases, found: list[Report]) -> None:
    by_case: dict[str, list[Report]] = {}
    for report in found:
        by_case.setdefault(report.case, []).append(report)
    print("  kernel            arch  registers  spilled  shared   matrix       programs x warps")
    for case in cases:
        if case.id not in by_case:
            continue
        work = case.cost
        floor = f"{time_of(work.floor(case.dtype))} ({work.bound(case.dtype)})"
        amounts = f"{work.flops / 1e9:.1f} GFLOP, {work.nbytes / 1e6:.0f} MB"
        print(f"\n{case.id}: {amounts}, floor {floor}")
        for r in by_case[case.id]:
            kinds = [f"{n} {name}" for n, name in ((r.hgmma, "HGMMA"), (r.hmma, "HMMA")) if n]
            print(
                f"  {r.kernel:<17} {r.arch:>4}  {r.registers:>9}  {r.spilled:>7}  "
                f"{r.shared / 1024:>4.0f} KB  {' '.join(kinds) or '-':<11}  "
                f"{r.programs:>8} x {r.warps}{remark(r)}"
            )
            for line in r.allowed:
                print(f"      allowed: {line}")
            for line in r.problems:
                print(f"      FAILS: {line}")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/aot.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="only cases whose line has this text")
    archs, cases = sorted(LIMITS), Path(__file__).with_name("aot_cases.py")
    add("--arch", type=int, nargs="+", choices=archs, default=archs, help="default: all of them")
    cores = os.cpu_count() or 1
    add("--jobs", type=int, default=cores, metavar="N", help="compilers at once (default: cores)")
    add("--json", type=Path, metavar="FILE", help="write what was found there too")
    listed = "Python file whose cases() lists what is compiled (default: benchmarks/aot_cases.py)"
    add("--cases", type=Path, default=cases, metavar="FILE", help=listed)
    kept = "compiled kernels stay here; an unchanged one is not compiled again (default: build/aot)"
    add("--cache", type=Path, default=ROOT / "build" / "aot", metavar="FOLDER", help=kept)
    add("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    sys.path[:0] = [str(Path(__file__).parent)]
    cases = [case for case in load(options.cases) if options.only in case.id]
    if options.list:
        print("\n".join(case.id for case in cases))
        return 0
    if not cases:
        print(f"no case has {options.only!r} in its line; --list prints them", file=sys.stderr)
        return 2
    begin = time.monotonic()
    found = reports(cases, plan(cases, options.arch), options.jobs)
    print_table(cases, found)
    if options.json:
        results = {
            "triton": triton.__version__,
            "cases": {
                c.id: {**asdict(c.cost), "floor_seconds": c.cost.floor(c.dtype)} for c in cases
            },
            "kernels": [asdict(r) for r in found],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [r for r in found if r.problems]
    print(
        f"\n{len(found)} kernels, Triton {triton.__version__}, "
        f"{time.monotonic() - begin:.0f} s: {len(wrong) or 'none'} failed"
    )
    for r in wrong:
        print(f"  {r.case}: {r.kernel} sm_{r.arch} {'; '.join(r.problems)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
