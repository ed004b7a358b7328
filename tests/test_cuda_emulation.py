"""The emulation of CUDA itself: that it sees the faults it is there for (faults.cpp has them)."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch
from backends import CAN_EMULATE
from cuda_emulator import COMPILER, EMULATION, FLAGS, INCLUDES, Order, emulated, launches

import pyvit

THREADS = 128

pytestmark = pytest.mark.skipif(not CAN_EMULATE, reason="emulated on x86-64 Linux alone")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulation") / "faults"
    sources = [EMULATION / name for name in ("faults.cpp", "block.cpp", "fibre.cpp")]
    flags = [*FLAGS, *INCLUDES, "-O1", "-g", "-fsanitize=address"]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)

    def run(name, order):
        command = [program, name, str(int(order)), "7"]
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


def numbers(run) -> list[int]:
    assert run.returncode == 0, run.stdout + run.stderr
    return [int(number) for number in run.stdout.split()]


NEIGHBOURS = [(i + 1) % THREADS for i in range(THREADS)]
RIGHT = {
    "neighbours": NEIGHBOURS,
    "rounds": [2 * neighbour + 1000 for neighbour in NEIGHBOURS],
    "lanes": [i ^ 1 for i in range(THREADS)],
    "shared end": [1] * THREADS,
    "global end": [1] * THREADS,
    "masked": [120 if i % 32 < 16 else i % 32 for i in range(THREADS)],
    "copies": [neighbour + 1 for neighbour in NEIGHBOURS],
    "copies again": [THREADS - 1] * THREADS,
}


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right_in_every_order(faults, name, order):
    assert numbers(faults(name, order)) == RIGHT[name]


@pytest.mark.parametrize("name", ["neighbours", "rounds", "lanes", "copies again"])
def test_a_missing_barrier_shows_in_some_order(faults, name):
    results = [numbers(faults(f"{name} without barrier", order)) for order in Order]
    assert any(result != RIGHT[name] for result in results)


@pytest.mark.parametrize("order", Order)
def test_a_copy_that_is_not_waited_for_shows(faults, order):
    """In every order: a test runs in one of them."""
    assert numbers(faults("copies without waiting", order)) != RIGHT["copies"]


@pytest.mark.parametrize("memory", ["shared", "global"])
def test_a_write_beyond_the_end_is_seen(faults, memory):
    run = faults(f"beyond {memory} end", Order.FORWARD)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr and "WRITE of size 4" in run.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mask of lanes that do not come",
            r"with mask 0xffffffff for lane \d+, which has returned",
        ),
        ("mask without own lane", "with mask 0x0000ffff, which lacks the thread's own lane"),
        ("source outside mask", "takes the value of lane 20, which is not in its mask"),
        ("early return", "threads that have returned|others wait for it at a barrier"),
        ("half at barrier", "for lane 0, which waits at __syncthreads"),
        ("misaligned rows", "ldmatrix of a row that is not aligned to 16 bytes"),
    ],
)
@pytest.mark.parametrize("order", Order)
def test_a_broken_rule_stops_the_kernel(faults, name, message, order):
    run = faults(name, order)
    assert run.returncode == 3, run.stdout + run.stderr
    assert re.search(f"stopped: .*({message})", run.stdout), run.stdout


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_fragments_multiply_as_documented(faults, kind):
    """Against a plain product; fragments are filled element by element, or by ldmatrix."""
    assert faults(f"product {kind}", Order.SHUFFLED).stdout == "equal"


def test_launches_are_told_by_their_kernels():
    with emulated():
        pyvit.unfold(torch.zeros(1, 1, 40, 40), 3)
    found = {name: launch for name, launch in launches().items() if "unfold_kernel" in name}
    assert found and all(launch == (256, 0) for launch in found.values())
