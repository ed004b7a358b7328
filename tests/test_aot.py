"""``benchmarks/aot.py`` finds what it is there for, in kernels with planted faults."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

ROOT = Path(__file__).resolve().parents[1]

# Kernels and their cases, in the form that --cases takes.
PLANTED = """
import dataclasses
from cost import Cost
import torch
import triton
import triton.language as tl


@triton.jit
def good(x, y, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(x + i * N + j), tl.load(y + i * N + j))
    tl.store(out + i * N + j, product.to(out.dtype.element_ty))


@triton.jit
def spilling(x, y, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    left, right = tl.load(x + i * N + j), tl.load(y + i * N + j)
    tl.store(out + i * N + j, tl.dot(left, right, input_precision="ieee"))


@triton.jit
def narrow(x, y, out, N: tl.constexpr):  # a warp group multiplies 64 rows, and here are 16
    i, j, k = tl.arange(0, 16)[:, None], tl.arange(0, N)[None, :], tl.arange(0, N)[:, None]
    product = tl.dot(tl.load(x + i * N + j), tl.load(y + k * N + j))
    tl.store(out + i * N + j, product.to(out.dtype.element_ty))


@dataclasses.dataclass(frozen=True)
class Case:
    id: str
    dtype: str
    call: object
    allowed: dict = dataclasses.field(default_factory=dict)
    cost: Cost = Cost(1.0, 1.0)


def case(kernel, dtype, width, name=None, **more):
    x = torch.empty(width, width, dtype=getattr(torch, dtype), device="meta")
    return Case(name or kernel.fn.__name__, dtype, lambda: kernel[(1,)](x, x, x, N=width), **more)


def cases():
    yield case(good, "bfloat16", 64)
    yield case(spilling, "float32", 128)
    yield case(narrow, "bfloat16", 64)
    yield case(narrow, "float16", 64, "excused", allowed={("narrow", 90): "16 rows are all it has"})
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """Run the gate over some planted cases: its exit status, its reports by case, its output."""
    folder = tmp_path_factory.mktemp("aot")
    (folder / "planted.py").write_text(PLANTED)

    def run(only: str):
        command = [sys.executable, ROOT / "benchmarks" / "aot.py", "--cases", "planted.py"]
        command += ["--arch", "90", "--json", "out.json", "--cache", "cache", "--only", only]
        # What conftest.py sets for this process must not reach the compiler's.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads((folder / "out.json").read_text()), done.stdout

    return run


def test_a_good_kernel_passes(gate):
    status, found, output = gate("good")
    (report,) = found["kernels"]
    assert status == 0 and report["problems"] == [], output
    assert report["hgmma"] > 0 and report["hmma"] == 0 and report["spilled"] == 0
    assert report["registers"] > 0 and report["programs"] >= 1
    assert report["narrow"] == 0  # its rows are contiguous
    assert "none failed" in output


def test_spills_are_found(gate):
    status, found, output = gate("spilling")
    (report,) = found["kernels"]
    assert status == 1 and report["spilled"] > 0, output
    assert "spills" in report["problems"][0] and "spilling sm_90 spills" in output


def test_a_missing_matrix_instruction_is_found(gate):
    status, found, output = gate("narrow")
    (report,) = found["kernels"]
    assert status == 1 and report["hgmma"] == 0, output
    assert any("HGMMA" in problem for problem in report["problems"])


def test_a_missing_matrix_instruction_can_be_excused(gate):
    status, found, output = gate("excused")
    (report,) = found["kernels"]
    assert status == 0 and report["hgmma"] == 0, output
    assert "16 rows are all it has" in output


def test_too_much_shared_memory_is_found(gate):
    # Not compiled, which takes minutes: the rule alone.
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import aot

    sizes = {"grid": 1, "registers": 32, "spilled": 0, "warps": 4, "hgmma": 0, "hmma": 0}
    report = aot.Report("case", "kernel", 80, {}, shared=164 << 10, programs=1, problems=[],
                        allowed=[], **sizes)  # fmt: skip
    assert "the limit is 163" in aot.problems(report, "")[0]
    report.shared = 163 << 10
    assert aot.problems(report, "") == []
    assert "no FFMA" in aot.problems(report, "FFMA")[0]
    report.ffma = 1
    assert aot.problems(report, "FFMA") == []


def test_what_a_matrix_product_should_become():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import aot

    half = "%1 = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
    single = "%1 = tt.dot %a, %b, %c{} : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>"
    codes = half, single.format(", inputPrecision = tf32"), single.format(""), "tt.load %a"
    assert [aot.expected(code, 90) for code in codes] == ["HGMMA", "either", "FFMA", ""]
    assert aot.expected(half, 80) == "HMMA"


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(255, 4, 0, 2), (128, 8, 0, 2), (32, 4, 0, 16), (64, 4, 100 << 10, 2), (16, 1, 0, 32)],
)
def test_programs_of_a_multiprocessor(registers, warps, shared, programs):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import aot

    assert aot.programs_at_once(registers, warps, shared, aot.LIMITS[90]) == programs
