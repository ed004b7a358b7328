"""Fixtures that every test file shares."""

from __future__ import annotations

import os
import warnings

import hypothesis_shim
import pytest
import torch
from backends import BACKENDS, EMULATED, INTERPRETED
from recorded_ops import RecordedOps

import pyvit

hypothesis_shim.install()
if INTERPRETED in BACKENDS:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run in Python


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_allocations():
    """Every uninitialised tensor, ours from C++ included, is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch's own GPU ops may refuse
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def recorder(monkeypatch):
    """The CPU knows graphs, for this test."""
    from pyvit.attacks import graph

    stand_in = RecordedOps()
    monkeypatch.setattr(graph, "capture_for", lambda device, generator: stand_in)
    return stand_in


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run a test once for each backend: with its kernels, and its device for new tensors."""
    if request.param in ("triton", "cuda"):
        with torch.device("cuda"), pyvit.backend(request.param):
            yield request.param
    elif request.param == INTERPRETED:
        from triton_interpreter import interpreted

        with interpreted():
            yield request.param
    elif request.param == EMULATED:
        from cuda_emulator import any_schedule, emulated

        with emulated(), any_schedule(request.node.nodeid):
            yield request.param
    else:
        yield request.param


@pytest.fixture
def finest_dtype(backend):
    """The most exact dtype that the backend computes in."""
    return torch.float64 if backend == "cpu" else torch.float32


def pytest_collection_modifyitems(config, items):
    """Leave out what a backend has no kernel for, and what its marker finds too slow."""
    dropped = [item for item in items if not _has_kernel(item) or _is_too_slow(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _has_kernel(item):
    parameters = _parameters(item)
    backend = parameters.get("backend", "cpu")
    if backend == "cpu":
        return True
    refused = any(
        parameters.get(name) in values
        for marker in item.iter_markers("refused_on_gpu")
        for name, values in marker.kwargs.items()
    )
    return not refused and parameters.get("dtype") is not torch.float64


# The marker with the parameters that a backend without a GPU is quick enough for.
_QUICK_ENOUGH = {INTERPRETED: "interpreted", EMULATED: "emulated"}


def _is_too_slow(item):
    parameters = _parameters(item)
    marked = _QUICK_ENOUGH.get(parameters.get("backend"))
    return marked is not None and any(
        parameters[name] not in wanted
        for marker in item.iter_markers(marked)
        for name, wanted in marker.kwargs.items()
    )
