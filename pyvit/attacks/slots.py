"""The memory that a recorded step of an attack works on, and the step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyvit.attacks.batch import Batch, Counts, Run
from pyvit.attacks.capture import Uncapturable
from pyvit.attacks.targets import check_classes

if TYPE_CHECKING:
    from pyvit.attacks.attack import Attack


class Slots:
    """A batch of a fixed size in memory of its own, which a recorded step reads and writes.

    With ``stops``, images that fool the model stay where they are (``done``). Slots beyond the
    batch's images repeat its first one, and are done from the start.
    """

    def __init__(self, batch: Batch, size: int, stops: bool) -> None:
        count, device = len(batch.x), batch.x.device
        places = torch.arange(size, device=device)
        places = places.where(places < count, 0)
        self.batch = batch.map(Tensor.clone if size == count else lambda tensor: tensor[places])
        self.done = torch.empty(size, dtype=torch.bool, device=device) if stops else None
        self.classes = 0  # not known before the first step
        self.load(batch)

    def load(self, batch: Batch) -> None:
        count = len(batch.x)
        new = batch.tensors()
        for name, own in self.batch.tensors().items():
            own[:count].copy_(new[name])
            own[count:].copy_(new[name][:1].expand_as(own[count:]))
        if self.done is not None:
            self.done[:count].fill_(False)
            self.done[count:].fill_(True)

    def step(self, attack: Attack, counts: Counts) -> None:
        """One step for every slot. The first one checks the labels, later ones wait for nothing."""
        batch = replace(self.batch, rule=dict(self.batch.rule))
        x = batch.x.detach().requires_grad_()
        logits = attack._logits(x, counts)
        if self.classes == 0:
            check_classes(attack.op, "labels", batch.labels, logits.shape[1])
            self.classes = logits.shape[1]
        grad = attack._gradient(x, logits, batch.labels, None, counts)
        moved = attack.move(batch, grad)
        if self.done is not None:
            self.done.logical_or_(attack._fools(logits, batch.labels))
            stays = self.done.reshape(-1, *[1] * (moved.dim() - 1))
            moved = torch.where(stays, self.batch.x, moved)
        batch.x = moved
        self._store(batch)

    def _store(self, batch: Batch) -> None:
        """Copy what a step has changed into the slots' own memory."""
        own, new = self.batch.tensors(), batch.tensors()
        constant = {k: v for k, v in self.batch.rule.items() if not isinstance(v, Tensor)}
        if constant != {k: v for k, v in batch.rule.items() if not isinstance(v, Tensor)} or {
            name: (t.shape, t.dtype) for name, t in own.items()
        } != {name: (t.shape, t.dtype) for name, t in new.items()}:
            raise Uncapturable(
                "the rule changes a number, a shape or a dtype of its `batch.rule` within a step"
            )
        memory = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
        changed = [name for name in own if new[name] is not own[name]]
        # A new value may be the old one of another tensor: copied before anything is overwritten.
        values = [
            new[name].clone() if new[name].untyped_storage().data_ptr() in memory else new[name]
            for name in changed
        ]
        for name, value in zip(changed, values):
            own[name].copy_(value)

    def live(self) -> int:
        """How many images have not fooled the model. Waits for the GPU."""
        return len(self.batch.x) if self.done is None else int((~self.done).sum())

    def unload(self, run: Run) -> None:
        """Give the images back, in memory that later replays do not write to."""
        if self.done is None or run.finished is None:
            run.batch = self.batch.map(Tensor.clone)
            return
        count = len(run.rows)
        alive = ~self.done[:count]
        run.finished[run.rows] = self.batch.x[:count]
        run.batch = self.batch.map(lambda tensor: tensor[:count][alive])
        run.rows = run.rows[alive]
