"""Small models and batches that the tests of attacks share."""

from __future__ import annotations

import torch
from torch import nn

from pyvit.nn import Conv2d

CLASSES = 4


def small_cnn(channels: int = 3, size: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * (size // 2) ** 2, CLASSES),
    )


def batch_invariant_cnn() -> nn.Module:
    """Made of layers whose results for one image do not depend on the others, bit for bit."""
    torch.manual_seed(1)
    return nn.Sequential(Conv2d(3, 8, 3, padding=1), nn.ReLU(), Conv2d(8, CLASSES, 8), nn.Flatten())


def batch(count: int = 8, size: int = 16, channels: int = 3):
    return torch.rand(count, channels, size, size), torch.randint(0, CLASSES, (count,))
