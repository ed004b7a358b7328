"""What `CudaCapture` asks of torch.cuda, on a pretended GPU: order of calls, and what it mends."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref

import pytest
import torch

from pyvit.attacks import capture
from pyvit.attacks.capture import CudaCapture, Uncapturable

CPU = torch.device("cpu")


class PretendedStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.log.append(f"synchronize {self.name}")


class PretendedGraph:
    generator = None

    def register_generator_state(self, generator):
        warnings.warn("registers by itself", FutureWarning, stacklevel=2)
        self.generator = generator

    def replay(self):
        pass

    def reset(self):
        self.was_reset = True


@pytest.fixture
def log(monkeypatch):
    """torch.cuda, as a list of what was asked of it. Ending a capture that failed raises."""
    log = []

    class Recording:
        def __init__(self, graph, pool, stream, capture_error_mode):
            self.said = graph, pool, stream.name, capture_error_mode

        def __enter__(self):
            log.append(self.said)

        def __exit__(self, kind, error, traceback):
            log.append("end")
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    @contextlib.contextmanager
    def on(stream):
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    caller = PretendedStream(log, "caller")
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(cuda, "graph", Recording)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(cuda, "stream", on)
    monkeypatch.setattr(cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: 2)
    monkeypatch.setattr(cuda, "set_sync_debug_mode", lambda mode: log.append(f"mode {mode}"))
    monkeypatch.setattr(capture, "_side_stream", lambda *_: PretendedStream(log, "side"))
    monkeypatch.setattr(capture, "_FAILED", [])
    monkeypatch.setattr(
        torch._C,
        "_cuda_endAllocateToPool",
        lambda index, pool: log.append(f"pool {pool} of {index} ends"),
        raising=False,
    )
    return log


def gpu(generator=None):
    captures = CudaCapture(torch.device("cuda", 1), generator)
    captures.device = torch.device("cpu", 1)  # where the pretended GPU has its memory
    return captures


def test_a_capture(log):
    generator = torch.Generator()
    seen = []
    with torch.autocast("cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replay = gpu(generator).capture(lambda: seen.append(torch.is_autocast_cache_enabled()))
        assert torch.is_autocast_cache_enabled()
    assert seen == [False]
    (graph, *said), end = log
    assert (said, end) == ([(0, 7), "side", "thread_local"], "end")
    assert graph.generator is generator
    assert replay.__self__ is graph and replay.__name__ == "replay"
    assert not capture._FAILED


def test_a_failed_capture_names_its_cause_and_is_mended(log):
    def fails():
        raise ArithmeticError("line one\nline two")

    before = torch.is_autocast_cache_enabled()
    with pytest.raises(Uncapturable, match=r"failed \(ArithmeticError: line one\)$") as raised:
        gpu().capture(fails)
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert torch.is_autocast_cache_enabled() == before
    (failed, *_), end, pool_ends, synchronize, (mended, *said), end_of_mended = log
    assert pool_ends == "pool (0, 7) of 1 ends"
    assert (end, synchronize, end_of_mended) == ("end", "synchronize", "end")
    assert said == [None, "side", "thread_local"]  # a pool of its own
    assert failed.was_reset and [failed] == capture._FAILED and mended is not failed


def test_a_failed_capture_holds_nothing(log):
    class Work:
        def __call__(self):
            raise ArithmeticError

    work = Work()
    alive = weakref.ref(work)
    gc.disable()
    try:
        with contextlib.suppress(Uncapturable):
            gpu().capture(work)
        del work
        assert alive() is None
    finally:
        gc.enable()


def test_a_reason_stays_a_reason(log):
    def refuses():
        raise Uncapturable("it may not")

    with pytest.raises(Uncapturable, match=r"^it may not$"):
        gpu().capture(refuses)
    assert "synchronize" in log


def test_what_waits_is_found(log):
    def waits():
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation (Triggered …)", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = gpu().watched(waits)
        assert gpu().watched(lambda: warnings.warn("something else", stacklevel=1)) is None
    line = waits.__code__.co_firstlineno + 2
    assert reason.startswith("a step waits for the GPU") and reason.endswith(f"{__file__}:{line}")
    assert log == ["mode warn", "mode 2"] * 2
    with pytest.raises(ZeroDivisionError):
        gpu().watched(lambda: 1 / 0)
    assert log == ["mode warn", "mode 2"] * 3


def test_streams_wait_for_each_other(log):
    captures = gpu()
    with captures.stream():
        log.append("inside")
    order = ["side waits for caller", "enter side", "inside", "caller waits for side"]
    assert log == [*order, "leave side"]
    log.clear()
    with pytest.raises(ZeroDivisionError), captures.stream():
        raise ZeroDivisionError
    assert log == ["side waits for caller", "enter side", "caller waits for side"]
    log.clear()
    captures.close()
    assert log == ["synchronize side"]


def test_threads_have_streams_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    capture._side_stream.cache_clear()
    first = capture._side_stream(0, 1)
    assert first is capture._side_stream(0, 1)
    assert first is not capture._side_stream(0, 2)
    assert first is not capture._side_stream(1, 1)
    capture._side_stream.cache_clear()


def test_only_cuda_knows_graphs():
    assert capture.capture_for(CPU, None) is None
    assert capture.capture_for(torch.device("meta"), None) is None
