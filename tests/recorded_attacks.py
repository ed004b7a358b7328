"""Attacks that take graphs where they can, and models that cannot be recorded."""

from __future__ import annotations

import random

import numpy as np
import torch
from attack_models import CLASSES, batch, batch_invariant_cnn
from torch import nn

from pyvit import attacks

STEPS = 14


class PGD(attacks.PGD):
    """Takes graphs where it can."""

    def __init__(self, *arguments, graph=None, **options):
        super().__init__(*arguments, graph=graph, **options)


def attacked(count=40, spread=3.0, memory_format=torch.contiguous_format):
    """A model, its images and labels, and one eps an image, such that images fall one by one."""
    model = batch_invariant_cnn()
    images, _ = batch(count, 8)
    images = images.contiguous(memory_format=memory_format)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % CLASSES  # two are wrong from the start
    return model, images, labels, torch.linspace(0.1, spread, count) * 0.02


def both(model, images, labels, **options):
    """Without graphs and with them, from the same seed."""
    results = []
    for use in (False, None):
        torch.manual_seed(5)
        attack = PGD(model, graph=use, **options)
        results.append(attack(images, labels, return_counts=True))
    return results


def from_the_same_seed(attack, images, labels):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    return attack(images, labels)


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(self.change(x))


class ReadsValues(Wrapped):
    def change(self, x):
        return x * (2 if bool(x.mean() > 0.5) else 1)


class MakesTensors(Wrapped):
    def change(self, x):
        return x * torch.tensor(2.0)


class DrawsWithPython(Wrapped):
    def change(self, x):
        return x.roll(random.randrange(4), 3)


class DrawsWithNumpy(Wrapped):
    def change(self, x):
        return x.roll(np.random.randint(4), 3)


class CountsCalls(Wrapped):
    number = 0

    def change(self, x):
        self.number += 1
        return x / self.number


class KeepsWhatItSaw(Wrapped):
    def change(self, x):
        self.seen = x.detach()
        return x


class Hooked(Wrapped):
    def __init__(self, model):
        super().__init__(model)
        self.register_forward_hook(lambda module, arguments, result: result * 2)

    def change(self, x):
        return x
