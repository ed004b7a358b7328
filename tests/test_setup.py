"""What setup.py makes of the CUDA that is there, and of what it is asked to build for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from backends import CAN_EMULATE

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(not CAN_EMULATE, reason="a script stands in for nvcc"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source checkout"),
]


@pytest.fixture
def setup(tmp_path):
    """Runs setup.py with a program that answers as nvcc does; returns what it prints."""

    def run(release: str = "13.0", **environment: str) -> str:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        known = "sm_80 sm_86 sm_90 sm_100"
        nvcc.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V" || echo {known}\n'
        )
        nvcc.chmod(0o755)
        variables = {"FORCE_CUDA": "1", "CUDA_HOME": str(tmp_path), **environment}
        # Only reading the file: nothing is compiled.
        command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "--version"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (done.stdout.strip() == "0.1.0"), done
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("named", ["8.0;9.0+PTX", "9.0a", "5.2 7.5 8.0 9.0+PTX", "10.0f"])
def test_architectures_that_can_be_built(setup, named):
    assert setup(TORCH_CUDA_ARCH_LIST=named).strip() == "0.1.0"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("Ampere", "'Ampere', which is no compute capability"),
        ("7.5+PTX", "has compute capability 8.0 or later"),
        ("8.0;12.0", "nvcc 13.0 in .* does not know compute capability 12.0"),
    ],
)
def test_architectures_that_cannot(setup, named, message):
    printed = setup(TORCH_CUDA_ARCH_LIST=named)
    assert re.search(message, printed), printed


def test_an_old_nvcc_is_refused(setup):
    assert "is older than 12.0" in setup("11.5", TORCH_CUDA_ARCH_LIST="8.0")
    assert setup("11.5", FORCE_CUDA="0").strip() == "0.1.0"
