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
        """The batch of the images where ``alive`` (``[B]``, bool) alone."""
        return replace(
            self,
            index=self.index[alive],
            x0=_rows(self.x0, alive),
            x=_rows(self.x, alive),
            labels=self.labels[alive],
            rule={
                name: _rows(value, alive) if isinstance(value, Tensor) else value
                for name, value in self.rule.items()
            },
        )


def _rows(value: Tensor, alive: Tensor) -> Tensor:
    """``value[alive]`` with the strides of an image kept: another layout, another order of sums."""
    rows = value[alive]
    if rows.stride()[1:] == value.stride()[1:]:
        return rows
    kept = value.new_empty_strided(rows.shape, (value.stride(0), *value.stride()[1:]))
    return kept.copy_(rows)
