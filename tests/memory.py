"""Peak memory of a piece of code, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from pyvit import _C

_MEASURE = """
import torch

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

torch.set_num_threads({threads})
{setup}
# Allocations of a megabyte or more come from the system each time, so that the peak is theirs.
reset_peak()
before = status("VmRSS")
{work}
print(status("VmHWM") - before)
"""


def peak_extra_bytes(setup: str, work: str, threads: int) -> int:
    """Bytes by which ``work`` raised the peak resident memory above what ``setup`` left."""
    if _C.build_info()["sanitized"]:
        pytest.skip("sanitizers keep freed memory and shadow what is in use")
    code = _MEASURE.format(
        setup=textwrap.dedent(setup), work=textwrap.dedent(work), threads=threads
    )
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if "clear_refs" in run.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])
