from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pyvit import _native, conv2d
from pyvit.__main__ import main
from pyvit.ops import _library


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in printed
    assert "runs and is used" in printed
    for isa in _native.status():
        assert f"cpu {isa}" in printed


def test_info_says_why_nothing_runs(capsys, monkeypatch):
    monkeypatch.setattr(_native, "loaded_isa", None)
    monkeypatch.setattr(_native, "load_problem", "avx2: not built")
    assert main(["info"]) == 1
    assert "No CPU kernel is loaded: avx2: not built" in capsys.readouterr().out


def test_a_call_without_kernels_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_native, "loaded_isa", None)
    monkeypatch.setattr(_native, "load_problem", "avx2: not built: pip install …")
    with pytest.raises(NotImplementedError, match=r"pyvit\.conv2d: the CPU kernels are not avail"):
        conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 1, 1))


class OnGpu:
    """What a check of devices asks of a CUDA tensor."""

    is_cpu = False
    device = torch.device("cuda")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.mark.parametrize("op", ["conv2d", "unfold", "topk_attention", "projected_step", "linear"])
def test_a_gpu_without_triton_says_what_to_do(monkeypatch, op):
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    _library.triton_problem.cache_clear()
    message = rf"pyvit\.{op}: no kernel for CUDA tensors; Triton is not installed: pip install"
    with pytest.raises(NotImplementedError, match=message):
        _library.require_kernels(op, OnGpu())
    _library.triton_problem.cache_clear()


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_library.importlib.metadata, "version", lambda name: "3.2.0")
    _library.triton_problem.cache_clear()
    assert _library.triton_problem() == "Triton 3.2.0 is too old: pip install 'triton>=3.6'"
    _library.triton_problem.cache_clear()


def test_float64_stays_on_the_cpu(monkeypatch):
    monkeypatch.setattr(_library, "triton_problem", lambda: "")
    _library.require_kernels("conv2d", OnGpu())
    with pytest.raises(NotImplementedError, match="float64 runs on the CPU alone"):
        _library.require_kernels("conv2d", OnGpu(torch.float64))


def test_importing_pyvit_imports_no_triton():
    code = "import sys, pyvit, pyvit.nn, pyvit.attacks; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
