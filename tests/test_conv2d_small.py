"""conv2d of images with few pixels and taps that meet no pixel."""

from __future__ import annotations

import pytest
import torch
from conv2d_checks import (
    DTYPES,
    FORMATS,
    check_accuracy,
    check_nan_weights_stay_in_their_channel,
    check_repeatable_and_batch_invariant,
    check_slices,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "one-pixel": (3, 40, 1, 1, 37, 3, 1, 1, 1, 1),
    "two-pixels": (2, 33, 2, 1, 70, 3, 1, 1, 1, 1),
    "nine-pixels": (7, 64, 3, 3, 66, 3, 1, 1, 1, 1),
    "whole-image-kernel": (3, 40, 7, 7, 50, 7, 1, 0, 1, 1),
    "whole-image-few-channels": (5, 3, 4, 6, 37, (4, 6), 1, 0, 1, 1),
    "whole-image-strided": (2, 18, 5, 1, 20, (5, 1), 3, 0, 1, 1),
    "narrow": (2, 40, 9, 3, 40, 3, 1, 1, 1, 1),
    "strided": (3, 48, 7, 7, 33, 3, 2, 0, 2, 1),
    "strided-far": (2, 70, 4, 4, 64, 3, 3, 0, 1, 1),
    "groups": (2, 72, 3, 3, 96, 3, 2, 1, 1, 2),
    "windows": (8, 40, 6, 5, 10, 5, 1, 2, 1, 1),
    "windows-groups": (7, 72, 10, 9, 20, (3, 5), (3, 2), (2, 2), (2, 1), 2),
    "windows-beside-the-image": (2, 33, 2, 1, 12, 3, 1, 3, 1, 1),
    "windows-two-blocks": (2, 300, 5, 5, 16, 9, 1, 4, 1, 1),
    "long-rows": (1, 300, 2, 2, 30, 3, 1, 1, 1, 1),
    "many-outputs": (2, 32, 2, 2, 1100, 2, 1, 1, 1, 1),
    "pointwise": (2, 130, 3, 2, 33, 1, 1, 0, 1, 1),
    "idle-taps": (2, 40, 7, 8, 40, 3, 1, 12, 12, 1),
    "idle-taps-strided": (3, 40, 5, 4, 40, 5, 2, 8, 4, 1),
    "idle-taps-groups": (2, 72, 7, 8, 96, (3, 5), 1, (9, 20), (9, 10), 2),
    "few-channels": (3, 8, 2, 2, 40, 3, 1, 1, 1, 1),
    "idle-taps-to-many": (3, 1, 1, 1, 40, 5, 3, 12, 6, 1),
    "no-tap": (1, 24, 1, 1, 24, 2, 1, 2, 4, 1),
    "pointwise-strided": (2, 40, 9, 10, 40, 1, 3, 0, 1, 1),
    "column-strided": (2, 40, 9, 10, 40, (3, 1), 2, (1, 0), 1, 1),
}


@pytest.mark.accuracy
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format, weight_format):
    check_accuracy(SHAPES[shape], dtype, FORMATS[memory_format], FORMATS[weight_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape", ["nine-pixels", "whole-image-few-channels", "strided", "idle-taps", "windows"]
)
def test_slices_of_larger_tensors(shape, memory_format):
    check_slices(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        *("one-pixel", "nine-pixels", "strided", "groups", "long-rows", "whole-image-kernel"),
        *("windows", "windows-groups"),
    ],
)
def test_repeatable_and_batch_invariant(shape, memory_format):
    check_repeatable_and_batch_invariant(SHAPES[shape], FORMATS[memory_format])


def test_nan_weights_stay_in_their_channel():
    weight = torch.randn(40, 24, 3, 3)
    weight[7, 3, 1, 1] = float("nan")
    check_nan_weights_stay_in_their_channel((2, 24, 3, 3), weight, padding=1)
