"""The fast gradient sign method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyvit.attacks.attack import Attack, Loss
from pyvit.attacks.batch import Batch
from pyvit.attacks.targets import Targeted
from pyvit.ops.projected_step import projected_step


class FGSM(Attack):
    """One step of length eps along the sign of the gradient: x + eps·sign(∇), then the bounds.

    Goodfellow, Shlens & Szegedy (2015). Equals torchattacks' FGSM bit for bit where the batch
    size is a power of two (theirs averages the loss over the batch, ours sums it).

    Args:
        model: images to logits; see ``Attack`` for this and for the arguments not listed here.
        eps: in image units; a number, or one an image (``[B]``).

    Cost: one gradient an image.

    Example:
        >>> import torch, pyvit.attacks
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> adversarial = pyvit.attacks.FGSM(model, eps=8 / 255)(images, labels)
    """

    steps = 1

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        eps: float | Tensor = 8 / 255,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: Targeted = False,
        loss: str | Loss = "cross_entropy",
        model_mode: str = "eval",
        generator: torch.Generator | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            bounds=bounds,
            targeted=targeted,
            loss=loss,
            model_mode=model_mode,
            generator=generator,
            autocast=autocast,
        )
        self.add_lengths(eps=eps)

    def move(self, batch: Batch, grad: Tensor) -> Tensor:
        # Without a ball: one step of eps cannot leave it, and projecting would round twice more.
        return projected_step(
            batch.x,
            grad,
            batch.x0,
            norm="linf",
            step_size=batch.rule["eps"],
            eps=math.inf,
            bounds=self.bounds,
            targeted=self.targeted is not False,
        )
