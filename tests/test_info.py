from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyvit
from pyvit import _native, conv2d
from pyvit.__main__ import main
from pyvit.ops import _backends


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


@pytest.fixture
def forgetful():
    """What was found out about the backends is found out anew, in the test and after it."""
    found = (_backends.triton_problem, _backends.cuda_problem, _backends.choose)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


@pytest.mark.parametrize("op", ["conv2d", "unfold", "topk_attention", "projected_step", "linear"])
def test_a_gpu_without_kernels_says_what_to_do(monkeypatch, forgetful, op):
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_backends, "CUDA_LIBRARY", Path("nowhere.so"))
    message = (
        rf"pyvit\.{op}: no kernel for CUDA tensors: Triton is not installed: pip install .*; or "
        "the CUDA C.. kernels are not built: FORCE_CUDA=1 pip install"
    )
    with pytest.raises(NotImplementedError, match=message):
        _backends.require_kernels(op, OnGpu())


def test_an_old_triton_is_refused(monkeypatch, forgetful):
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_backends.importlib.metadata, "version", lambda name: "3.2.0")
    assert _backends.triton_problem() == "Triton 3.2.0 is too old: pip install 'triton>=3.6'"


def test_a_backend_that_is_asked_for_and_cannot_run(monkeypatch, forgetful):
    monkeypatch.setattr(_backends, "triton_problem", lambda: "")
    monkeypatch.setattr(_backends, "CUDA_LIBRARY", Path("nowhere.so"))
    _backends.require_kernels("conv2d", OnGpu())
    message = "backend 'cuda' is asked for, but the CUDA C.. kernels are not built"
    with pyvit.backend("cuda"), pytest.raises(NotImplementedError, match=message):
        _backends.require_kernels("conv2d", OnGpu())
    _backends.require_kernels("conv2d", OnGpu())


def test_a_triton_of_another_name_is_found(monkeypatch, forgetful):
    """torch's nightly builds bring it as pytorch-triton."""

    def unknown(name):
        raise _backends.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_backends.importlib.metadata, "version", unknown)
    stand_in = SimpleNamespace(__version__="3.7.0+git1")
    monkeypatch.setattr(_backends.importlib, "import_module", lambda name: stand_in)
    assert _backends.triton_problem() == ""
    assert _backends.triton_version() == "3.7.0+git1"


def test_a_backend_inside_a_compiled_function_holds_there():
    asked = []

    def record(x):
        asked.append(_backends._asked)
        return x.clone()

    library = torch.library.Library("pyvit_test", "FRAGMENT")
    library.define("record(Tensor x) -> Tensor")
    library.impl("record", record, "CPU")
    library.impl("record", torch.empty_like, "Meta")

    @torch.compile(backend="eager")
    def compiled(x):
        x = torch.ops.pyvit_test.record(x)
        with pyvit.backend("cuda"):
            x = torch.ops.pyvit_test.record(x)
        return torch.ops.pyvit_test.record(x)

    compiled(torch.ones(2))
    with pyvit.backend("triton"):
        compiled(torch.ones(2))
    assert asked[-6:] == ["auto", "cuda", "auto", "triton", "cuda", "triton"]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'auto', 'triton', 'cuda'; got 'cudnn'"):
        pyvit.backend("cudnn")
    code = "import pyvit"
    environment = {**os.environ, "PYVIT_BACKEND": "cudnn"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "PYVIT_BACKEND" in run.stderr and "cudnn" in run.stderr


@pytest.mark.parametrize("table", ["triton", "cuda"])
def test_auto_takes_what_the_table_says_where_it_can_run(monkeypatch, forgetful, table):
    problems = {"triton": "", "cuda": ""}
    monkeypatch.setattr(_backends, "problem", lambda kind: problems[kind])
    monkeypatch.setitem(_backends.AUTOMATIC, "conv2d", table)
    other = "cuda" if table == "triton" else "triton"
    assert _backends.choose("conv2d", "auto") == (table, "")
    assert _backends.choose("conv2d", other) == (other, "")
    _backends.choose.cache_clear()
    problems[table] = "gone"
    assert _backends.choose("conv2d", "auto") == (other, "")


def test_float64_stays_on_the_cpu(monkeypatch, forgetful):
    monkeypatch.setattr(_backends, "triton_problem", lambda: "")
    _backends.require_kernels("conv2d", OnGpu())
    with pytest.raises(NotImplementedError, match="float64 runs on the CPU alone"):
        _backends.require_kernels("conv2d", OnGpu(torch.float64))


def test_importing_pyvit_imports_no_triton():
    code = "import sys, pyvit, pyvit.nn, pyvit.attacks; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
