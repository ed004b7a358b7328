"""A stand-in for CUDA's graph capture on the CPU: what was recorded is replayed op by op.

As on a GPU, a capture leaves memory as it was, a replay runs the same ops on the same memory, and
no Python of the captured function runs again: whatever it decided is frozen.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvit.attacks.capture import Uncapturable

LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def tensors_of(*values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def waits(func, args) -> bool:
    """Whether the op would wait for a GPU: its result, or its shape, depends on values."""
    if func is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return not LOOKS.isdisjoint(func.tags)


class Watch(TorchDispatchMode):
    """Notes ops that wait; a tensor made from Python numbers is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args) or func is torch.ops.aten.lift_fresh.default:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Record(TorchDispatchMode):
    """Notes every op with its tensors, and what memory held before it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        inputs = tensors_of(args, kwargs)
        for tensor in inputs:
            memory = memory_of(tensor)
            if func._schema.is_mutable and memory not in self.made | self.before.keys():
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.before[memory] = (whole, whole.clone())
        result = func(*args, **kwargs)
        of_inputs = {memory_of(tensor) for tensor in inputs}
        made = [t for t in tensors_of(result) if memory_of(t) not in of_inputs]
        self.made |= {memory_of(tensor) for tensor in made}
        self.ops.append((func, args, kwargs, made, of_inputs))
        return result


class RecordedOps:
    """`pyvit.attacks.capture.Capture` for the CPU. ``fails``: captures that go wrong."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails = fails
        self.captures = self.replays = self.closed = 0
        self.inside = False
        self.handed_over: list[Tensor] = []

    @contextlib.contextmanager
    def stream(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def watched(self, work):
        assert self.inside
        with Watch() as watch:
            work()
        return f"a step waits for the GPU in {watch.seen[0]}" if watch.seen else None

    def capture(self, work):
        assert self.inside
        self.captures += 1
        if self.fails is not None:
            raise Uncapturable(self.fails)
        random_state = torch.get_rng_state()
        with Record() as record:
            work()
        torch.set_rng_state(random_state)
        for tensor, value in record.before.values():
            tensor.copy_(value)

        def replay():
            assert self.inside
            self.replays += 1
            for func, args, kwargs, made, of_inputs in record.ops:
                with torch.no_grad():
                    again = func(*args, **kwargs)
                fresh = [t for t in tensors_of(again) if memory_of(t) not in of_inputs]
                for tensor, value in zip(made, fresh, strict=True):
                    tensor.copy_(value)

        return replay

    def hand_over(self, result):
        assert not self.inside
        self.handed_over.append(result)

    def close(self):
        assert not self.inside
        self.closed += 1
