"""The gate for CUDA kernels (benchmarks/nvcc.py): what it lets pass and what it stops."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("nvcc_gate", BENCHMARKS / "nvcc.py")
gate = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gate  # dataclasses look their module up
spec.loader.exec_module(gate)

NVCC = gate.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: `make nvcc` fetches one")

GOOD = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }"
SPILLING = """
template <int N> __global__ void __launch_bounds__(1024) crowded(float* x, int rounds) {
  float kept[N];
#pragma unroll
  for (int i = 0; i < N; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < N; ++i) kept[i] += kept[(i + 1) % N] * x[round];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = kept[i];
}
template __global__ void crowded<96>(float*, int);
"""


def compiled(tmp_path, code):
    source = tmp_path / "kernel.cu"
    source.write_text(code)
    return gate.compile_source(NVCC, source, "80")


def test_a_good_kernel_passes(tmp_path):
    (kernel,) = compiled(tmp_path, GOOD)
    assert kernel.name == "twice" and kernel.registers > 0 and kernel.problems == []


def test_spills_are_found(tmp_path):
    (kernel,) = compiled(tmp_path, SPILLING)
    assert kernel.name == "crowded<96>"
    assert any("spilled" in problem for problem in kernel.problems)


def test_what_nvcc_refuses_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"kernel\.cu, sm_80: nvcc refuses it"):
        compiled(tmp_path, "__global__ void broken(float* x) { x = y; }")


def test_a_file_without_kernels(tmp_path, monkeypatch):
    read, write = os.pipe()  # a terminal's input, which does not end
    monkeypatch.setattr(
        gate.subprocess, "run", functools.partial(gate.subprocess.run, stdin=read, timeout=60)
    )
    assert compiled(tmp_path, "int host() { return 1; }") == []
    os.close(read)
    os.close(write)


def test_an_unknown_file_is_told(capsys):
    assert gate.main(["--only", "nothing like this"]) == 2
    assert "no file of csrc/cuda has 'nothing like this' in its name" in capsys.readouterr().out
