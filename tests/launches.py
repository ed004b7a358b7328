"""Launches that a launcher of ``kernels/`` would make, recorded instead of made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """Of ``call``, which may use meta tensors: they have sizes, and no numbers are looked at."""
    found = []

    def record(kernel, *args, grid, warmup, **options):
        arguments = dict(zip(kernel.arg_names, args)) | options
        found.append(Launch(kernel.fn.__name__, tuple(grid), arguments))

    with pytest.MonkeyPatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", record)
        call()
    return found
