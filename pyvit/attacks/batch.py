"""The images that an attack still works on, and everything that belongs to each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass
class Counts:
    """Work done in one call, in images: a batch of 8 passed once counts 8.

    With CUDA graphs the images of a batch that have already fooled the model count as well.
    """

    forwards: int = 0
    gradients: int = 0


@dataclass
class Batch:
    """One row an image in every tensor, so that finished images can leave.

    Attributes:
        index: ``[B]``, each image's place in what the attack was called with.
        x0: the clean images.
        x: the present adversarial images.
        labels: ``[B]``: true classes, or the targets of a targeted attack.
        rule: what the rule keeps for each image (``[B, ...]`` tensors: step sizes, momentum) or
            for all of them (numbers).
    """

    index: Tensor
    x0: Tensor
    x: Tensor
    labels: Tensor
    rule: dict[str, float | Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own."""
        own = {"index": self.index, "x0": self.x0, "x": self.x, "labels": self.labels}
        of_rule = {f"rule.{k}": v for k, v in self.rule.items() if isinstance(v, Tensor)}
        return own | of_rule

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of ``change(tensor)`` for every tensor."""
        return replace(
            self,
            index=change(self.index),
            x0=change(self.x0),
            x=change(self.x),
            labels=change(self.labels),
            rule={
                name: change(value) if isinstance(value, Tensor) else value
                for name, value in self.rule.items()
            },
        )

    def keep(self, alive: Tensor) -> Batch:
        """The batch of the images where ``alive`` (``[B]``, bool) alone.

        Indexing keeps the layout of an image, and with it the order of every sum over it.
        """
        return self.map(lambda tensor: tensor[alive])


@dataclass
class Run:
    """One run of an attack from one start, as it stands between two steps.

    Attributes:
        batch: the images that it still works on.
        rows: ``[B]``, the place of each in ``finished``.
        finished: with early stop, all images: those that have left the batch, as they left.
        step: steps taken.
    """

    batch: Batch
    rows: Tensor
    finished: Tensor | None
    step: int = 0

    def result(self) -> Tensor:
        if self.finished is None:
            return self.batch.x
        if len(self.rows) > 0:
            self.finished[self.rows] = self.batch.x
        return self.finished
