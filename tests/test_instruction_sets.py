"""Every compiled instruction set that this processor runs passes the accuracy tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvit import _native

RUNNABLE = [isa for isa, state in _native.status().items() if state == "runs"]


@pytest.mark.parametrize("isa", [isa for isa in RUNNABLE if isa != _native.loaded_isa])
def test_accuracy_with(isa):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-m",
            "accuracy",
            "-k",
            "not triton and not cuda",
            str(Path(__file__).parent),
        ],
        env={**os.environ, "PYVIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def load_with(isa: str) -> str:
    code = "from pyvit import _native as n; print(n.loaded_isa, '|', n.load_problem)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYVIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_a_name_chooses():
    assert load_with("baseline").startswith("baseline |")


def test_a_wrong_name_is_reported():
    assert load_with("sse9").startswith("None | PYVIT_CPU_ISA='sse9' is none of")
