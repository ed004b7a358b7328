"""Peak resident memory of one call, from the kernel's own high-water mark (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(call: Callable[[], Any]) -> int | None:
    """Bytes that a warm ``call`` adds to the resident memory at its peak, its outputs included.

    Scratch that a library kept from an earlier call is not seen. None where the system has no
    resettable high-water mark.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed blocks back, or reuse of them hides a peak
        _CLEAR.write_text("5")  # 5: reset the high-water mark
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None
