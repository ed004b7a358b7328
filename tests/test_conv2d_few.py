"""conv2d with few output channels, and input gradients of few input channels: terms of a sum share
a vector with channels, in runs that seldom are whole vectors."""

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
    check_what_is_not_finite_reaches_only_its_readers,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "one-output": (2, 40, 9, 20, 1, 3, 1, 1, 1, 1),
    "two-outputs": (2, 5, 9, 37, 2, 5, 1, 2, 1, 1),
    "three-outputs": (2, 3, 11, 19, 3, 7, 1, 3, 1, 1),
    "five-outputs": (1, 33, 8, 15, 5, 3, 1, 0, 1, 1),
    "eight-outputs": (2, 17, 7, 17, 8, 3, 1, 1, 1, 1),
    "ten-outputs": (2, 24, 7, 16, 10, 3, 1, 1, 1, 1),
    "one-to-one": (2, 1, 10, 23, 1, 3, 1, 1, 1, 1),
    "one-to-six": (2, 1, 10, 23, 6, (5, 3), 1, (2, 1), 1, 1),
    "strided": (2, 9, 14, 21, 4, 3, 2, 1, 1, 1),
    "phases": (2, 7, 15, 16, 6, 5, (2, 3), 2, 1, 1),
    "dilated": (2, 6, 20, 24, 7, 3, 1, 4, (3, 5), 1),
    "dilated-strided": (2, 20, 33, 30, 7, 3, 2, 4, (6, 3), 1),
    "dilated-one": (1, 1, 20, 24, 2, 3, 1, 2, 2, 1),
    "slices": (2, 210, 9, 10, 4, 5, 1, 2, 1, 1),
    "pointwise": (3, 37, 7, 9, 3, 1, 1, 0, 1, 1),
    "pointwise-one": (3, 32, 7, 9, 1, 1, 1, 0, 1, 1),
    "pointwise-deep": (2, 700, 5, 7, 2, 1, 1, 0, 1, 1),
    "pointwise-strided": (2, 19, 9, 13, 2, 1, 2, 0, 1, 1),
    "pointwise-in-place": (2, 64, 13, 21, 3, 1, 1, 0, 1, 1),
    "pointwise-in-place-rows": (2, 48, 11, 17, 20, 1, 2, 0, 1, 2),
    "pointwise-in-place-slices": (2, 1280, 5, 7, 4, 1, 1, 0, 1, 1),
    "pointwise-one-column": (3, 16, 11, 1, 4, 1, (1, 2), 0, 1, 1),
    "pointwise-one-pixel": (3, 16, 1, 1, 4, 1, 2, 0, 1, 1),
    "pointwise-few-pixels": (3, 70, 2, 2, 1, 1, 1, 0, 1, 1),
    "pointwise-small-planes": (3, 130, 7, 7, 3, 1, 1, 0, 1, 1),
    "pointwise-one-to-three": (2, 1, 9, 13, 3, 1, 1, 0, 1, 1),
    "one-to-two": (2, 1, 9, 21, 2, 3, 1, 1, 1, 1),
    "one-to-four": (2, 1, 10, 23, 4, (5, 3), 1, (2, 1), 1, 1),
    "narrow": (2, 20, 9, 2, 3, 3, 1, 1, 1, 1),
    "groups": (2, 66, 6, 18, 12, 3, 1, 1, 1, 2),
    "many-to-few": (1, 64, 30, 61, 3, 3, 1, 1, 1, 1),
    "wide-kernel": (2, 2, 9, 12, 3, (3, 11), 1, (1, 5), 1, 1),
    "boxes": (2, 3, 60, 301, 4, 3, 1, 1, 1, 1),
    "pointwise-boxes": (1, 9, 90, 75, 4, 1, 1, 0, 1, 1),
    "image-groups": (2, 6, 12, 19, 4, 3, 1, 1, 1, 2),
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_few_inputs(shape, dtype, memory_format):
    batch, channels, height, width, out, *geometry = SHAPES[shape]
    turned = (batch, out, height, width, channels, *geometry)
    check_accuracy(turned, dtype, FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", ["one-output", "three-outputs", "phases", "slices", "pointwise"])
def test_slices_of_larger_tensors(shape, memory_format):
    check_slices(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        *("one-output", "eight-outputs", "ten-outputs", "phases", "slices", "pointwise", "boxes"),
        *("pointwise-few-pixels", "pointwise-small-planes", "one-to-four"),
    ],
)
def test_repeatable_and_batch_invariant(shape, memory_format):
    check_repeatable_and_batch_invariant(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("out", [1, 2, 3, 8])
@pytest.mark.parametrize("channels", [1, 3, 5, 20])
def test_pixels_beside_a_window_are_not_read(channels, out):
    for kernel, memory_format in [(k, f) for k in (1, 3) for f in FORMATS.values()]:
        x = torch.randn(2, channels, 6, 40).contiguous(memory_format=memory_format)
        x[0, channels // 2, 3, 17] = float("inf")
        x[1, 0, 0, 0] = float("nan")
        weight = torch.randn(out, channels, kernel, kernel)
        check_what_is_not_finite_reaches_only_its_readers(x, weight, 1, kernel // 2)


def test_nan_weights_stay_in_their_channel():
    weight = torch.randn(3, 5, 3, 3)
    weight[1, 4, 2, 2] = float("nan")
    check_nan_weights_stay_in_their_channel((1, 5, 8, 30), weight, padding=0)
