"""Which kernels run an op: those of the CPU, or for CUDA tensors Triton's or CUDA C++'s.

Both kinds for a GPU take the schema's arguments and save the same things for the backward pass, so
that an op may run with one and its gradient with the other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyvit import _native
from pyvit.ops import _library

CHOICES = ("auto", "triton", "cuda")
TRITON_MINIMUM = (3, 6)

# What "auto" takes for each op, where both can run. No op was timed on a GPU yet with both; until
# then it is Triton everywhere, whose kernels any installation has.
AUTOMATIC: dict[str, str] = {}

# The file of kernels/ that has an op's launcher, for each op that runs on CUDA tensors; and torch's
# switch for TF32 that its float32 products obey, where it has any.
triton_modules: dict[str, str] = {}
_tf32_switches: dict[str, str] = {}


def _checked(name: str, what: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, CHOICES))}; got {name!r}")
    return name


# Of the process, as torch.backends' switches are: the backward pass runs in other threads.
_asked = _checked(os.environ.get("PYVIT_BACKEND", "auto"), "pyvit: the variable PYVIT_BACKEND")


class backend:
    """Run ops on CUDA tensors with ``"triton"`` or ``"cuda"`` (CUDA C++) kernels, or ``"auto"``.

    A context manager; the variable ``PYVIT_BACKEND`` says the same for a whole process. It holds
    for every thread, as a switch of ``torch.backends`` does, and for the calls made while it
    lasts: a backward pass that comes later is run by what is asked for then. Inside a function
    for ``torch.compile`` it breaks the graph. ``"auto"``, the default, takes for each op what was
    measured to be faster, or the one that is installed. CPU tensors are not concerned.

    Raises:
        ValueError: ``name`` is none of the three.
        NotImplementedError: from an op, where the kernels that were asked for cannot run; the
            message says why.

    Example:
        >>> import pyvit, torch
        >>> x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> with pyvit.backend("triton"):  # on the CPU it changes nothing
        ...     y = pyvit.conv2d(x, weight)
    """

    def __init__(self, name: str):
        self.name = _checked(name, "pyvit.backend: `name`")
        self._before: list[str] = []

    def __enter__(self) -> None:
        global _asked
        if torch.compiler.is_compiling():  # a graph would be run before the switch is moved
            torch._dynamo.graph_break("pyvit.backend is for around a compiled function")
        self._before.append(_asked)
        _asked = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _asked
        _asked = self._before.pop()


# ---- Triton -------------------------------------------------------------------------------------


def gpu_kernels(module: str, *names: str, tf32: str = "") -> None:
    """Let ``kernels/<module>.py``, or CUDA C++, run ``pyvit::<name>`` for CUDA tensors.

    Triton's module is imported at the first call: importing pyvit needs neither Triton nor a GPU.
    ``tf32`` names torch's switch that their float32 products obey: "conv" or "matmul".
    """
    for name in names:
        triton_modules[name] = module
        if tf32:
            _tf32_switches[name] = tf32
        _library.LIBRARY.impl(name, functools.partial(_launch, name), "CUDA")


@functools.cache
def triton_problem() -> str:
    """Why Triton kernels cannot run here; "" where they can."""
    wanted = f"pip install 'triton>={TRITON_MINIMUM[0]}.{TRITON_MINIMUM[1]}'"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {wanted}"
    version = triton_version()
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON_MINIMUM:
        return f"Triton {version} is too old: {wanted}"
    return ""


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # torch's nightly builds name it otherwise
        return importlib.import_module("triton").__version__


# ---- CUDA C++ -----------------------------------------------------------------------------------

CUDA_LIBRARY = Path(__file__).parents[1] / "_cuda.so"
_loaded: list[torch.library.Library] = []
_loading = threading.Lock()


def load_cuda(path: Path) -> None:
    """Register the ops of a library built from ``csrc/cuda``, as ``pyvit_cuda::<name>``.

    The schemas are those of pyvit's ops, and say last whether TF32 is allowed, where it matters.
    """
    with _loading:  # first calls may come from several threads
        if not _loaded:
            library = torch.library.Library("pyvit_cuda", "FRAGMENT")
            for schema in _library.schemas:
                if schema.partition("(")[0] in _tf32_switches:
                    schema = schema.replace(") ->", ", bool allow_tf32) ->", 1)
                library.define(schema)
            _loaded.append(library)
        torch.ops.load_library(str(path))


@functools.cache
def cuda_problem() -> str:
    """Why CUDA C++ kernels cannot run here; "" where they can."""
    if not CUDA_LIBRARY.exists():
        return (
            "the CUDA C++ kernels are not built: FORCE_CUDA=1 pip install --no-build-isolation . "
            "(in pyvit's source folder, with nvcc on the path)"
        )
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        load_cuda(CUDA_LIBRARY)
    except OSError as error:
        return f"the CUDA C++ kernels cannot be loaded: {error.__cause__ or error}"
    return ""


# ---- the choice ---------------------------------------------------------------------------------


def problem(kind: str) -> str:
    """Why a backend cannot run here; "" where it can."""
    return triton_problem() if kind == "triton" else cuda_problem()


@functools.cache
def choose(name: str, asked: str) -> tuple[str, str]:
    """What runs an op: ("triton" or "cuda", ""), or ("", why nothing can)."""
    if asked != "auto":
        reason = problem(asked)
        return (asked, "") if not reason else ("", f"backend {asked!r} is asked for, but {reason}")
    first = AUTOMATIC.get(name, "triton")
    second = "cuda" if first == "triton" else "triton"
    for kind in (first, second):
        if not problem(kind):
            return kind, ""
    return "", f"{problem(first)}; or {problem(second)}"


@functools.cache
def launcher(name: str, kind: str) -> Callable:
    """What runs ``pyvit::<name>``: Triton's (``kernels/``) or CUDA C++'s."""
    if kind == "triton":
        return getattr(importlib.import_module(f"pyvit.kernels.{triton_modules[name]}"), name)
    op = getattr(torch.ops.pyvit_cuda, name).default
    if name not in _tf32_switches:
        return op
    is_conv = _tf32_switches[name] == "conv"
    switch: Any = torch.backends.cudnn.conv if is_conv else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    # Not allow_tf32: reading that raises where fp32_precision, which came in its place, was set.
    return lambda *arguments: op(*arguments, switch.fp32_precision == "tf32")


def _launch(name: str, value: Tensor, *arguments: Any) -> Any:
    """On the device of the first argument: Triton would take the current one."""
    kind, reason = choose(name, _asked)
    if reason:  # checked before a call; a backward pass may find that another backend is asked for
        raise NotImplementedError(f"pyvit.{name}: no kernel for CUDA tensors: {reason}")
    run = launcher(name, kind)
    if value.is_cuda and value.device.index != torch.cuda.current_device():
        with torch.cuda.device(value.device):
            return run(value, *arguments)
    return run(value, *arguments)


def runs_on_gpu(value: Tensor) -> bool:
    """Whether the kernels that take ``value`` are a GPU's."""
    return value.is_cuda


def require_kernels(op: str, value: Tensor) -> None:
    """Raise, naming the way out, where no kernel of ours can take ``value``'s device."""
    device = _library.device_type(value)
    if device == "cpu":
        if _native.loaded_isa is None:
            raise NotImplementedError(
                f"pyvit.{op}: the CPU kernels are not available ({_native.load_problem}); "
                "`python -m pyvit info` says more"
            )
    elif device == "cuda" and op in triton_modules:
        _, reason = choose(op, _asked)
        if reason:
            raise NotImplementedError(f"pyvit.{op}: no kernel for CUDA tensors: {reason}")
        if value.dtype is torch.float64:
            raise NotImplementedError(
                f"pyvit.{op}: float64 runs on the CPU alone; move the tensors there with .cpu()"
            )
    elif device != "meta":
        raise NotImplementedError(
            f"pyvit.{op}: no kernel for device '{device}' is built; move the tensors to the "
            "CPU with .cpu(); `python -m pyvit info` lists the kernels this installation has"
        )
