"""Whose class an image shall be taken for, in targeted attacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor

from pyvit.ops import _checks

TargetFunction = Callable[[Tensor, Tensor], Tensor]
Targeted = Union[bool, str, TargetFunction]  # noqa: UP007 - evaluated by Python 3.10 too
WAYS = ("random", "least_likely")


def check_targeted(op: str, targeted: object) -> None:
    if isinstance(targeted, bool) or callable(targeted):
        return
    if targeted not in WAYS:
        wanted = "True, False, 'random', 'least_likely' or a function (images, labels) -> targets"
        _checks.fail(ValueError, op, "targeted", wanted, repr(targeted))


def choose_targets(
    op: str,
    how: str | TargetFunction,
    images: Tensor,
    labels: Tensor,
    logits: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """``[B]`` classes other than ``labels``: by chance, the least likely, or by a function."""
    classes = logits.shape[1]
    if callable(how):
        targets = how(images, labels)
        check_labels(op, "targeted", targets, len(images), images.device)
        check_classes(op, "targeted", targets, classes)
        return targets.long()
    if classes < 2:
        _checks.fail(ValueError, op, "model", "of at least 2 classes for a target", classes)
    if how == "random":
        shift = torch.randint(1, classes, labels.shape, generator=generator, device=labels.device)
        return (labels + shift) % classes
    return logits.scatter(1, labels[:, None], torch.inf).argmin(1)


def check_labels(op: str, argument: str, labels: object, batch: int, device: torch.device) -> None:
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    _checks.tensor(op, argument, labels, ndim=1, dtypes=integers)
    assert isinstance(labels, Tensor)
    _checks.shape(op, argument, labels, (batch,), " (one class an image)")
    if labels.device != device:
        _checks.fail(ValueError, op, argument, f"on `images`' device {device}", labels.device)


def check_classes(op: str, argument: str, labels: Tensor, classes: int) -> None:
    """On a GPU a label out of range would otherwise end the process's use of the device."""
    if labels.numel() == 0:
        return
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= classes:
        got = f"{low} to {high}"
        _checks.fail(ValueError, op, argument, f"classes from 0 to {classes - 1}", got)
