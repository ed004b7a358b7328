"""How long a call takes: on the CPU by the wall clock, on a GPU by events around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU


class Clock(Protocol):
    shortest: float  # seconds: a sample of a shorter call is the mean of several

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds a call, the mean of ``repeats``."""


class HostClock:
    shortest = 2e-3

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats


class GpuClock:
    """Before each call the L2 is filled with something else, so that inputs come from memory.

    While it fills, some 70 microseconds, Python is already launching the call: what is measured
    is the GPU's time, and Python's where that is longer.
    """

    shortest = 5e-4

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        spans = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            begin.record()
            call()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) * 1e-3 / repeats


def clock(device: str) -> Clock:
    return GpuClock() if device == "cuda" else HostClock()
