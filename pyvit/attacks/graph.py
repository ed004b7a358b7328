"""The attack loop as CUDA graphs: a step is recorded once for each batch size, then replayed.

A replay costs one launch where a step costs hundreds, and runs no Python. What is recorded reads
and writes memory that stays where it is (``Slots``). A capture needs steps that warm up kernels
and allocators; they are steps of the attack itself, so none is wasted, and an attack whose step
cannot be captured goes on from where it stands.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyvit.attacks.batch import Batch, Counts, Run
from pyvit.attacks.capture import Capture, Uncapturable, Work, capture_for
from pyvit.attacks.model_state import fingerprint, hooked
from pyvit.attacks.slots import Slots
from pyvit.attacks.targets import check_classes
from pyvit.ops import _checks

if TYPE_CHECKING:
    from pyvit.attacks.attack import Attack

WARM_UP = 3  # steps before a capture, as torch.cuda.make_graphed_callables takes
PAYS = 6  # replays that pay for a capture: an estimate, until a GPU has measured it
SMALLEST = 8  # slots; halving fewer would save a GPU little
PLAIN = (bool, int, float, str, type(None))


@dataclass
class Recording:
    """Steps for one batch size and layout: their memory and, once they are warm, the graph."""

    slots: Slots
    warm_ups: int = 0
    replay: Work | None = None


class Graphs:
    """The recorded steps of one attack, one for each batch size and layout."""

    def __init__(self, attack: Attack, capture: Capture, state: Hashable) -> None:
        self.attack = attack
        self.capture = capture
        self.state = state
        self.recordings: dict[tuple[int, Hashable], Recording] = {}
        self.largest = 0

    def advance(self, run: Run, counts: Counts, bar: Any) -> bool:
        """Take steps, by graphs; False, and none taken, where graphs are not for the next one."""
        attack, layout = self.attack, _layout(run.batch)
        size = self._size(len(run.rows), attack.steps - run.step, layout)
        if size is None:
            return False
        recording = self.recordings.get((size, layout))
        if recording is None:
            recording = Recording(Slots(run.batch, size, attack.early_stop))
            self.recordings[size, layout] = recording
        else:
            recording.slots.load(run.batch)
        try:
            while run.step < attack.steps:
                self._step(recording, run, counts, bar)
                if attack.early_stop:
                    live = recording.slots.live()
                    better = self._size(live, attack.steps - run.step, layout)
                    if live == 0 or (better is not None and better < size):
                        break
        except Uncapturable as reason:
            _give_up(attack, str(reason), stacklevel=6)
        recording.slots.unload(run)
        return True

    def _step(self, recording: Recording, run: Run, counts: Counts, bar: Any) -> None:
        """By a replay; before that, to warm up."""
        attack, slots = self.attack, recording.slots
        problem = None
        if run.step == 0 and slots.classes > 0:
            check_classes(attack.op, "labels", slots.batch.labels, slots.classes)
        if recording.replay is None and recording.warm_ups == WARM_UP:
            recording.replay = self.capture.capture(partial(slots.step, attack, Counts()))
        if recording.replay is not None:
            recording.replay()
            counts.forwards += len(slots.batch.x)
            counts.gradients += len(slots.batch.x)
        else:
            step = partial(slots.step, attack, counts)
            if recording.warm_ups == WARM_UP - 1:
                problem = self._last_look(step, run.batch.x.device)
            else:
                step()
            recording.warm_ups += 1
        run.step += 1
        bar.update(1)
        if problem is not None:
            raise Uncapturable(problem)

    def _size(self, live: int, left: int, layout: Hashable) -> int | None:
        """The fewest slots that hold the live images and are recorded, or pay for a recording."""
        attack = self.attack
        if attack._no_graphs is not None:
            return None
        self.largest = max(self.largest, live)
        sizes = [self.largest if attack.early_stop else live]
        while attack.early_stop and (half := -(-sizes[-1] // 2)) >= max(live, SMALLEST):
            sizes.append(half)
        recorded = {key for key, recording in self.recordings.items() if recording.replay}
        insists = attack._keeps_graphs or (attack.graph is True and not recorded)
        if left >= WARM_UP + (1 if insists else PAYS):
            return sizes[-1]
        return next((size for size in reversed(sizes) if (size, layout) in recorded), None)

    def _last_look(self, step: Work, device: torch.device) -> str | None:
        """The last step before the capture, and what in it forbids one."""
        before = _host_state(self.attack, device)
        problem = self.capture.watched(step)
        after = _host_state(self.attack, device)
        for what, value in after.items():
            old = before.get(what)
            if old is not value and (isinstance(value, Tensor) or old != value):
                return f"a step changes {what[0]} on the host, which a replay would not"
        return problem

    def close(self) -> None:
        self.capture.close()
        self.recordings.clear()


@contextlib.contextmanager
def opened(attack: Attack, images: Tensor) -> Iterator[Graphs | None]:
    """The graphs of one call, or of all calls in ``keep_graphs``; None: take every step eagerly."""
    graphs = _graphs_for(attack, images)
    if graphs is None:
        yield None
        return
    try:
        with graphs.capture.stream():
            yield graphs
    finally:
        if not attack._keeps_graphs:
            graphs.close()


def _graphs_for(attack: Attack, images: Tensor) -> Graphs | None:
    few = attack.steps < WARM_UP + PAYS and not attack._keeps_graphs
    if attack.graph is False or len(images) == 0 or (attack.graph is None and few):
        return None
    capture = capture_for(images.device, attack.generator)
    if capture is None:
        if attack.graph:
            _refuse(attack, f"the images are on {images.device}")
        return None
    obstacle = _obstacle(attack, images.device)
    if obstacle is not None:
        _give_up(attack, obstacle, stacklevel=6)
    if attack._no_graphs is not None:
        return None
    if not attack._keeps_graphs:
        return Graphs(attack, capture, None)
    state = _state(attack, images.device)
    if attack._kept is not None and attack._kept.state != state:
        attack._kept.close()
        attack._kept = None
    if attack._kept is None:
        attack._kept = Graphs(attack, capture, state)
    return attack._kept


def _obstacle(attack: Attack, device: torch.device) -> str | None:
    """What forbids graphs, as far as it shows before a step is taken."""
    model = attack.model
    if not _replayable(type(attack)):
        return f"{type(attack).__name__} does not declare its `move` as `replayable`"
    if isinstance(model, nn.Module):
        if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules()):
            return "the model is spread over several devices (nn.DataParallel)"
        if any(t.device != device for t in (*model.parameters(), *model.buffers())):
            return f"the model has parameters or buffers that are not on {device}"
        if attack.graph is None and hooked(model):
            return (
                "the model has hooks, which a replay would skip (graph=True replays all the same)"
            )
    elif attack.graph is None:
        return (
            "the model is a function and no module: what else its Python code does, a replay would "
            "skip (graph=True does so)"
        )
    return None


def _replayable(kind: type) -> bool:
    """Whether the class that wrote ``move``, or a later one, says so."""
    for base in kind.__mro__:
        if "replayable" in vars(base):
            return bool(vars(base)["replayable"])
        if "move" in vars(base):
            return False
    return False


def _give_up(attack: Attack, reason: str, *, stacklevel: int) -> None:
    """Once for an attack: a failed capture is not tried again."""
    if attack.graph:
        _refuse(attack, reason)
    if attack._no_graphs is None:
        warnings.warn(
            f"pyvit.{attack.op}: steps run without CUDA graphs, because {reason}; graph=False "
            "does the same and says nothing",
            stacklevel=stacklevel,
        )
    attack._no_graphs = reason


def _refuse(attack: Attack, reason: str) -> None:
    got = f"True, but {reason}"
    _checks.fail(NotImplementedError, attack.op, "graph", "None or False here", got)


def _layout(batch: Batch) -> Hashable:
    """All that a recorded step takes for granted, but for the number of images."""
    tensors = tuple(
        (name, t.dtype, t.shape[1:], t.stride()[1:]) for name, t in batch.tensors().items()
    )
    numbers = tuple((k, v) for k, v in batch.rule.items() if not isinstance(v, Tensor))
    return tensors, numbers


def _state(attack: Attack, device: torch.device) -> Hashable:
    """What must be the same in a later call for its steps to be those that were recorded."""
    settings = tuple(
        (name, value if isinstance(value, PLAIN) else id(value))
        for name, value in vars(attack).items()
        if not name.startswith("_")
    )
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return device, settings, autocast, fingerprint(attack.model)


def _host_state(attack: Attack, device: torch.device) -> dict[tuple[str, int], object]:
    """What a step might change on the host: random generators, and what modules and rule keep."""
    state: dict[tuple[str, int], object] = {("Python's random numbers", 0): random.getstate()}
    if device.type != "cpu":
        state["the CPU's random numbers", 0] = torch.get_rng_state().tolist()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy's random numbers", 0] = (name, keys.tolist(), rest)
    modules = attack.model.modules() if isinstance(attack.model, nn.Module) else ()
    for owner in (attack, *modules):
        for attribute, value in vars(owner).items():
            if isinstance(value, (*PLAIN, Tensor)):
                state[f"`{type(owner).__name__}.{attribute}`", id(owner)] = value
    return state
