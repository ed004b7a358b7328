"""Peak memory of one call: resident memory on the CPU (Linux), allocated memory on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes that a warm ``call`` adds at its peak, its outputs included."""
    return _peak_allocated(call) if device == "cuda" else _peak_resident(call)


def _peak_allocated(call: Callable[[], Any]) -> int:
    """By torch's caching allocator, which cuDNN's workspaces come from too."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak_resident(call: Callable[[], Any]) -> int | None:
    """By the kernel's own high-water mark; None where the system has none that can be reset.

    Scratch that a library kept from an earlier call is not seen.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed blocks back, or reuse of them hides a peak
        _CLEAR.write_text("5")  # 5: reset the high-water mark
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None
