"""The images that an attack still works on, and everything that belongs to each of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor


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

    def keep(self, alive: Tensor) -> Batch:
        """The batch of the images where ``alive`` (``[B]``, bool) alone.

        Indexing keeps the layout of an image, and with it the order of every sum over it.
        """
        return replace(
            self,
            index=self.index[alive],
            x0=self.x0[alive],
            x=self.x[alive],
            labels=self.labels[alive],
            rule={
                name: value[alive] if isinstance(value, Tensor) else value
                for name, value in self.rule.items()
            },
        )
