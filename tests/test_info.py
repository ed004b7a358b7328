from __future__ import annotations

import pytest
import torch

from pyvit import _native, conv2d
from pyvit.__main__ import main


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
