"""``make gpu``: everything that a machine with a GPU can show, in ten minutes.

Each step has its share of the time that is left, and what it leaves over is the others'. One that
fails or is stopped does not keep the next ones from running; the table at the end, and the exit
status, say which did. Nothing is downloaded or installed: the interpreter that runs this has torch
with CUDA, Triton and pytest, and what is built lies in ``build/gpu/lib``.

``$OUT``, or else ``gpu-results/``, gets ``gpu.json`` and ``gpu.png`` (the benchmarks),
``table.txt`` and ``log.txt`` (all that the steps printed).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "gpu" / "lib"
SUITE = str(ROOT / "benchmarks" / "suite.py")
ONLY_ON_GPU = ["test_gpu.py", "-k"]
# Files of no use there: run by themselves, without a GPU, or by steps of their own.
OTHER_TESTS = ["gpu", "gpu_rows", "on_gpu", "cuda_emulation", "backends", "nvcc", "setup"]
SHOWN = 15  # last lines of a step's output
PROCESSES = 12  # that compile and check kernels side by side
# Seconds for each op's rows where nothing before took too long.
OPS = {
    "topk_attention": 40,
    "conv2d": 80,
    "patch_embed": 30,
    "attacks": 50,
    "projected_step": 15,
    "linear": 15,
    "unfold": 15,
}


@dataclass
class Plan:
    """What was asked for, and where things go."""

    device: str
    quick: bool  # a rehearsal: the same steps with little in them
    out: Path
    parts: Path  # the rows of each op, until they are merged


@dataclass
class Step:
    """``run(seconds)`` says how it went: "passed", or what was wrong."""

    name: str
    weight: float  # its share of the time that is left is weight / (weights from here on)
    run: Callable[[float], str]


@dataclass
class Done:
    name: str
    verdict: str
    seconds: float


def steps(plan: Plan) -> list[Step]:
    python = sys.executable
    alone = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    several = [*alone, *side_by_side(plan)]
    kernels, processor = test_selections(plan)
    found = [
        Step("build", 300, partial(build, plan)),  # nothing runs without it
        Step("info", 20, partial(command, plan, [python, "-m", "pyvit", "info"])),
        Step("GPU alone", 70, partial(command, plan, [*several, *ONLY_ON_GPU, "not 32_bits"])),
        Step("beyond 32 bits", 30, partial(command, plan, [*alone, *ONLY_ON_GPU, "32_bits"])),
        Step("tests of kernels", 120, partial(command, plan, [*several, *kernels])),
        Step("CPU accuracy", 30, partial(command, plan, [*several, *processor])),
        Step("memcheck", 30, partial(sanitize, plan, "memcheck")),
        Step("racecheck", 30, partial(sanitize, plan, "racecheck")),
        Step("rows agree", 70, partial(check_rows, plan)),
    ]
    found += [Step(f"bench {op}", weight, partial(measure, plan, op)) for op, weight in OPS.items()]
    return [*found, Step("report", 15, partial(write_report, plan))]


def run(plan: Plan, chosen: Sequence[Step], seconds: float) -> list[Done]:
    """Every step, each with its share of what is left of ``seconds``."""
    end, done = time.monotonic() + seconds, []
    for index, step in enumerate(chosen):
        begin = time.monotonic()
        share = step.weight / sum(s.weight for s in chosen[index:])
        say(plan, f"\n== {step.name}")
        try:
            verdict = step.run(max(1.0, (end - begin) * share))
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
        done.append(Done(step.name, verdict, time.monotonic() - begin))
        say(plan, f"== {step.name}: {verdict}, {done[-1].seconds:.0f} s")
    return done


def table(done: Iterable[Done]) -> str:
    return "\n".join(f"  {d.name:<24}{d.seconds:5.0f} s  {d.verdict}" for d in done)


# ---- processes -----------------------------------------------------------------------------------


def say(plan: Plan, line: str) -> None:
    print(line, flush=True)
    with log_file(plan).open("a") as log:
        log.write(line + "\n")


def log_file(plan: Plan) -> Path:
    return plan.out / "log.txt"


def command(
    plan: Plan,
    arguments: Sequence[str],
    seconds: float,
    *,
    cwd: Path = ROOT / "tests",  # not the checkout, whose pyvit would stand before the built one
    environment: dict[str, str] | None = None,
) -> str:
    """Run it, its output going to the log; the last lines are shown."""
    log = log_file(plan)
    begin = log.stat().st_size
    with log.open("a") as output:
        verdict = wait(start(arguments, output, cwd, environment), time.monotonic() + seconds)
    with log.open(errors="replace") as output:
        output.seek(begin)
        print("\n".join(output.read().splitlines()[-SHOWN:]), flush=True)
    return verdict


def start(arguments, output, cwd: Path = ROOT / "tests", environment=None) -> subprocess.Popen:
    before = filter(None, [os.environ.get("PYTHONPATH")])
    path = os.pathsep.join(map(str, (BUILT, ROOT / "tests", ROOT / "benchmarks", *before)))
    # Processes run side by side: threads that wait for work must not keep a core from another's.
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **threads}
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **variables, **(environment or {})},
        start_new_session=True,  # so that what it starts can be stopped with it
    )


def wait(process: subprocess.Popen, end: float) -> str:
    try:
        status = process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "stopped: its time was over"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "passed" if status == 0 else f"failed with exit status {status}"


# ---- steps ---------------------------------------------------------------------------------------


def build(plan: Plan, seconds: float) -> str:
    """All kernels; where CUDA's do not compile, the others, so that Triton's can be looked at."""
    arguments = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build"]
    arguments += ["--build-lib", str(BUILT)]
    end = time.monotonic() + seconds
    verdict = command(plan, arguments, seconds * 3 / 4, cwd=ROOT)
    if verdict == "passed":
        return verdict
    others = {"FORCE_CUDA": "0"}
    left = end - time.monotonic()
    then = command(plan, arguments, left, cwd=ROOT, environment=others)
    return f"{verdict}; without CUDA C++: {then}"


def side_by_side(plan: Plan) -> list[str]:
    """Where pytest-xdist is there: kernels are compiled on many cores at once."""
    if plan.quick or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(PROCESSES)]


def test_selections(plan: Plan) -> tuple[list[str], list[str]]:
    """What runs on a GPU, and the accuracy of what runs on the processor."""
    if plan.quick:
        return ["test_info.py"], ["test_unfold.py", "-m", "accuracy", "-k", "float16"]
    others = [f"--ignore=test_{name}.py" for name in OTHER_TESTS]
    return (
        [".", "-k", "triton or cuda or gpu", *others],
        [".", "-m", "accuracy", "-k", "not triton and not cuda", *others],
    )


def sanitize(plan: Plan, tool: str, seconds: float) -> str:
    """tests/sanitize_gpu.py under one of compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    script = [sys.executable, str(ROOT / "tests" / "sanitize_gpu.py"), plan.device]
    if program is None:
        return "left out: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
    options = ["--error-exitcode", "9", "--print-limit", "10"]
    options += ["--target-processes", "application-only"]  # not ptxas
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [program, "--tool", tool, *options, *script]
    return command(plan, watched, seconds, environment=no_cache)


def bench(plan: Plan, *arguments: str) -> list[str]:
    rows = ["--device", plan.device, "--gpu-rows", *(["--quick"] if plan.quick else ["--compile"])]
    return [sys.executable, SUITE, *rows, *arguments]


def check_rows(plan: Plan, seconds: float) -> str:
    """Every row's result at its full size, many at once, which also compiles all the kernels."""
    count = 2 if plan.quick else PROCESSES
    only = ["--only", "unfold"] if plan.quick else []
    end, verdicts, processes = time.monotonic() + seconds, [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            output = (Path(folder) / f"{number}.txt").open("w+")
            arguments = bench(plan, "--check", "--share", f"{number}/{count}", *only)
            processes.append((start(arguments, output), output))
        for process, output in processes:
            verdicts.append(wait(process, end))
            output.seek(0)
            printed = output.read()
            output.close()
            with log_file(plan).open("a") as log:
                log.write(printed)
            wrong = [line for line in printed.splitlines() if line.lstrip().startswith("WRONG")]
            print("\n".join(wrong), end="\n" if wrong else "", flush=True)
    return next((v for v in verdicts if v != "passed"), "passed")


def measure(plan: Plan, op: str, seconds: float) -> str:
    """One op's rows, in a process of its own: an error that ends it ends no other op's."""
    file = ["--json", str(plan.parts / f"{op}.json")]
    return command(plan, bench(plan, "--only", op, "--seconds", "0.2", *file), seconds)


def write_report(plan: Plan, seconds: float) -> str:
    """All that was measured, in one file, one picture and one table."""
    parts = [str(plan.parts / f"{op}.json") for op in OPS if (plan.parts / f"{op}.json").exists()]
    if not parts:
        return "nothing was measured"
    files = ["--json", str(plan.out / "gpu.json"), "--plot", str(plan.out / "gpu.png")]
    arguments = [sys.executable, SUITE, "--merge", *parts, *files]
    with (plan.out / "table.txt").open("w") as output:
        verdict = wait(start(arguments, output), time.monotonic() + seconds)
    print((plan.out / "table.txt").read_text(), flush=True)
    return verdict


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=570, help="for everything together")
    parser.add_argument("--only", action="append", default=[], help="steps with this in their name")
    parser.add_argument("--rehearse", action="store_true", help="every step, quickly, on the CPU")
    asked = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT") or ROOT / "gpu-results")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as parts:
        device = "cpu" if asked.rehearse else "cuda"
        plan = Plan(device, asked.rehearse, out, Path(parts))
        log_file(plan).write_text("")
        chosen = [s for s in steps(plan) if not asked.only or any(o in s.name for o in asked.only)]
        done = run(plan, chosen, asked.seconds)
    say(plan, "\n" + table(done) + f"\n\nresults are in {out}")
    well = ("passed", "left out")
    return 0 if all(d.verdict.startswith(well) for d in done) else 1


if __name__ == "__main__":
    sys.exit(main())
