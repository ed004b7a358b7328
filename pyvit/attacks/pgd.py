"""Projected gradient descent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyvit.attacks.attack import Attack, Loss
from pyvit.attacks.batch import Batch
from pyvit.attacks.starts import random_start
from pyvit.attacks.targets import Targeted
from pyvit.ops import _checks
from pyvit.ops.projected_step import NORMS, STEPS, projected_step

# Radius and step where none is given, in image units.
DEFAULTS = {"linf": (8 / 255, 2 / 255), "l2": (1.0, 0.2), "l1": (12.0, 1.0)}


class PGD(Attack):
    """Projected gradient descent: steps along the gradient, each projected back on the ball.

    Madry et al. (2018). From a random point of the ball (``random_start``), at each step
    ``x ← Π(x + step_size·direction)``, then the bounds; the direction is the gradient's sign
    (linf), the gradient over its length (l2) or a few of its largest pixels (l1); see
    ``pyvit.projected_step``. Madry's CIFAR-10 settings: eps 8/255; 20 steps of 1/255 to attack,
    7 of 2/255 to train.

    Without a random start, norm "linf" equals torchattacks' PGD bit for bit on the same model
    where the batch size is a power of two (theirs averages the loss over the batch, which scales
    the gradient by 1/B; ours sums it, so that an image's gradient does not depend on the batch
    where the model's layers keep images apart).

    Args:
        model: images to logits; see ``Attack`` for this and for the arguments not listed here.
        eps: radius of the ball in image units; a number, or one an image (``[B]``). None: 8/255
            for linf, 1 for l2, 12 for l1.
        step_size: likewise. None: 2/255 for linf, 0.2 for l2, 1 for l1.
        steps: number of steps; each costs one gradient an image.
        norm: "linf", "l2" or "l1".
        random_start: start at a uniformly random point of the ball instead of at the image.
        step: "sign" as above, for all norms; "raw" steps along the gradient itself, as some
            lectures write it: far weaker, as gradients of images are tiny.
        quantile: of norm "l1" alone: a step moves the (1 - quantile) part of the pixels.

    Example:
        >>> import torch, pyvit.attacks
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> attack = pyvit.attacks.PGD(model, eps=8 / 255, step_size=2 / 255, steps=10)
        >>> adversarial = attack(images, labels)
        >>> bool((adversarial - images).abs().max() <= 8.001 / 255)
        True
    """

    replayable = True

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        eps: float | Tensor | None = None,
        step_size: float | Tensor | None = None,
        steps: int = 10,
        *,
        norm: str = "linf",
        random_start: bool = True,
        step: str = "sign",
        quantile: float = 0.99,
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: Targeted = False,
        loss: str | Loss = "cross_entropy",
        restarts: int = 1,
        early_stop: bool = False,
        model_mode: str = "eval",
        generator: torch.Generator | None = None,
        progress: bool = False,
        graph: bool | None = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            bounds=bounds,
            targeted=targeted,
            loss=loss,
            restarts=restarts,
            early_stop=early_stop,
            model_mode=model_mode,
            generator=generator,
            progress=progress,
            graph=graph,
            autocast=autocast,
        )
        _checks.choice(self.op, "norm", norm, NORMS)
        _checks.choice(self.op, "step", step, STEPS)
        default_eps, default_step = DEFAULTS[norm]
        self.add_lengths(
            eps=default_eps if eps is None else eps,
            step_size=default_step if step_size is None else step_size,
        )
        self.steps = _checks.integer(self.op, "steps", steps, minimum=0)
        self.norm = norm
        self.random_start = _checks.flag(self.op, "random_start", random_start)
        if restarts > 1 and not random_start:
            _checks.fail(ValueError, self.op, "restarts", "1 without a random start", restarts)
        self.step = step
        self.quantile = _checks.number(self.op, "quantile", quantile, minimum=0.0)
        if self.quantile >= 1:
            _checks.fail(ValueError, self.op, "quantile", "below 1", quantile)

    def begin(self, batch: Batch) -> None:
        if self.random_start:
            eps = batch.rule["eps"]
            batch.x = random_start(batch.x0, self.norm, eps, self.bounds, self.generator)

    def move(self, batch: Batch, grad: Tensor) -> Tensor:
        return projected_step(
            batch.x,
            grad,
            batch.x0,
            norm=self.norm,
            step_size=batch.rule["step_size"],
            eps=batch.rule["eps"],
            bounds=self.bounds,
            targeted=self.targeted is not False,
            step=self.step,
            quantile=self.quantile,
        )
