"""Recording work on a GPU and replaying it: the part of CUDA graphs that only a GPU can run."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

Work = Callable[[], object]


class Uncapturable(Exception):
    """Why a step cannot be a graph, as the end of a sentence that starts with "because"."""


class Capture(Protocol):
    """Turns work on fixed memory into a replay of the same work on the same memory."""

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Everything of an attack runs in here: its steps, captures and replays."""

    def watched(self, work: Work) -> str | None:
        """Do the work; say why it cannot be captured, if that shows."""

    def capture(self, work: Work) -> Work:
        """The replay of ``work``, which is recorded, not done; raises ``Uncapturable``."""

    def hand_over(self, result: Tensor) -> None:
        """Make a tensor that was computed in ``stream`` safe to use outside."""

    def close(self) -> None:
        """Called before replays are dropped."""


def capture_for(device: torch.device, generator: torch.Generator | None) -> Capture | None:
    """None for devices that know no graphs."""
    return CudaCapture(device, generator) if device.type == "cuda" else None


# torch (2.11, 2.12) leaves its allocators with pointers to a graph whose capture went wrong.
_FAILED: list[torch.cuda.CUDAGraph] = []
_ONE_AT_A_TIME = threading.RLock()  # torch records one graph at a time in a process


class CudaCapture:
    """CUDA graphs that share one pool of memory and are captured and replayed on one stream.

    They may share it because nothing in the pool outlives a replay (results are copied into
    memory outside), and because no two replays run at the same time.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.generator = generator
        self.side = _side_stream(index, threading.get_ident())
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        # A capture cannot be on the default stream, and what warms up must be where the capture
        # is: cuBLAS keeps a workspace for each stream.
        caller = torch.cuda.current_stream(self.device)
        self.side.wait_stream(caller)
        with torch.cuda.stream(self.side):
            try:
                yield
            finally:
                caller.wait_stream(self.side)

    def watched(self, work: Work) -> str | None:
        """Finds what waits for the GPU before a capture does, which it would invalidate."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # for all threads: "error" would raise in others
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [w for w in seen if "called a synchronizing CUDA operation" in str(w.message)]
        if not waits:
            return None
        return (
            "a step waits for the GPU (as .item(), a boolean mask, or a tensor made from numbers "
            f"does), near {waits[0].filename}:{waits[0].lineno}"
        )

    def capture(self, work: Work) -> Work:
        try:
            return self._record(work, self.pool)
        except Exception as error:
            self._mend()
            if isinstance(error, Uncapturable):
                raise
            lines = str(error).splitlines() or [""]
            what = f"{type(error).__name__}: {lines[0]}"
            raise Uncapturable(f"capturing a step failed ({what})") from error

    def _mend(self) -> None:
        """After a failed capture random generators are in capture mode until one succeeds."""
        torch.cuda.synchronize(self.device)
        with contextlib.suppress(Exception):
            token = torch.zeros(1, device=self.device)
            self._record(functools.partial(token.add_, 1), None)

    def _record(self, work: Work, pool: _POOL_HANDLE | None) -> Work:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # later versions of torch register by themselves
                graph.register_generator_state(self.generator)
        failure: Exception | None = None
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast that is kept would lie in the pool
        try:
            # Other threads may go on using the GPU: "thread_local".
            with (
                _ONE_AT_A_TIME,
                torch.cuda.graph(
                    graph, pool=pool, stream=self.side, capture_error_mode="thread_local"
                ),
            ):
                try:
                    work()
                except Exception as error:
                    failure = error  # the reason; ending the capture raises another
                    raise
        except Exception as error:
            failure = failure or error
        finally:
            torch.set_autocast_cache_enabled(cached)
        if failure is None:
            return graph.replay
        with contextlib.suppress(Exception):
            graph.reset()
        _FAILED.append(graph)
        if pool is not None:
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
        try:
            raise failure
        finally:
            del failure  # it holds this frame and, through it, the model

    def hand_over(self, result: Tensor) -> None:
        result.record_stream(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        # The memory of a graph may be used again from the moment when the graph is dropped.
        self.side.synchronize()


@functools.cache
def _side_stream(index: int, thread: int) -> torch.cuda.Stream:
    """One for all attacks of a thread: every further stream would cost a workspace of cuBLAS.

    Two threads cannot share it: the work of one would be recorded with that of the other.
    """
    return torch.cuda.Stream(torch.device("cuda", index))
