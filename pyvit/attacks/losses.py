"""What an attack climbs: one number an image, from logits and labels.

A rule climbs the loss of the true label, or goes down that of the target.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], ``[B]``; in float32 at least, whatever the model's dtype."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's, ``[B]`` (Carlini & Wagner, 2017).

    Above 0 exactly where the image is misclassified; unlike the cross entropy its gradient does
    not vanish for a model that is sure. The label itself is masked with -inf, so that negative
    logits are compared rightly.
    """
    logits = at_least_float32(logits)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, labels[:, None]).squeeze(1)


LOSSES = {"cross_entropy": cross_entropy, "margin": margin}


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
