"""conv2d with 1×1 kernels of few channels, of groups or on few pixels, which reads and writes
images where they lie or as channels last."""

from __future__ import annotations

import pytest
import torch
from conv2d_checks import (
    DTYPES,
    FORMATS,
    check_accuracy,
    check_repeatable_and_batch_invariant,
    check_slices,
    check_what_is_not_finite_reaches_only_its_readers,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "few-to-many": (3, 3, 13, 21, 43, 1, 1, 0, 1, 1),
    "one-to-many": (2, 1, 12, 16, 64, 1, 1, 0, 1, 1),
    "one-to-many-even": (2, 1, 16, 14, 33, 1, 1, 0, 1, 1),
    "most-to-many": (2, 16, 12, 13, 50, 1, 1, 0, 1, 1),
    "boxes": (1, 1, 90, 95, 6, 1, 1, 0, 1, 1),
    "last-box-of-five": (1, 1, 43, 143, 6, 1, 1, 0, 1, 1),
    "beyond-the-cache": (1, 2, 61, 63, 1003, 1, 1, 0, 1, 1),
    "strided": (2, 5, 15, 17, 50, 1, 2, 0, 1, 1),
    "strided-lines": (2, 5, 21, 24, 50, 1, 2, 0, 1, 1),
    "strided-boxes": (1, 2, 150, 170, 7, 1, 2, 0, 1, 1),
    "strided-narrow": (2, 3, 97, 5, 9, 1, (1, 2), 0, 1, 1),
    "padded": (2, 3, 10, 13, 40, 1, 1, 1, 1, 1),
    "strided-padded": (2, 24, 11, 13, 36, 1, (3, 2), (1, 0), 1, 1),
    "one-column": (2, 4, 40, 1, 35, 1, 2, 0, 1, 1),
    "one-pixel": (5, 200, 1, 1, 36, 1, 1, 0, 1, 1),
    "one-pixel-of-groups": (3, 96, 1, 1, 48, 1, 1, 0, 1, 4),
    "few-pixels": (3, 130, 3, 4, 70, 1, 1, 0, 1, 1),
    "groups-of-many": (2, 8, 9, 11, 80, 1, 1, 0, 1, 2),
    "groups-to-few": (2, 12, 9, 17, 8, 1, 1, 0, 1, 4),
    "groups-to-one": (2, 96, 12, 13, 16, 1, 1, 0, 1, 16),
    "groups-of-ten": (2, 6, 12, 12, 30, 1, 1, 0, 1, 3),
    "groups-to-eight": (2, 10, 9, 11, 80, 1, 1, 0, 1, 10),
    "groups-of-two-to-six": (2, 14, 9, 13, 42, 1, 1, 0, 1, 7),
    "groups-in-a-vector": (2, 4, 11, 13, 12, 1, 1, 0, 1, 2),
    "groups-strided": (2, 21, 11, 13, 21, 1, (2, 3), 0, 1, 7),
}


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    check_accuracy(SHAPES[shape], dtype, FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_other_direction(shape, memory_format):
    batch, channels, height, width, out, *geometry = SHAPES[shape]
    turned = (batch, out, height, width, channels, *geometry)
    check_accuracy(turned, torch.float32, FORMATS[memory_format], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    ["few-to-many", "strided-lines", "groups-of-many", "groups-to-few", "groups-of-two-to-six"],
)
def test_slices_of_larger_tensors(shape, memory_format):
    check_slices(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "beyond-the-cache"])
def test_repeatable_and_batch_invariant(shape, memory_format):
    check_repeatable_and_batch_invariant(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape", ["few-to-many", "strided-lines", "padded", "groups-of-many", "groups-to-few"]
)
def test_what_is_not_finite_reaches_only_its_readers(shape, memory_format):
    batch, channels, height, width, out, kernel, *geometry = SHAPES[shape]
    x = torch.randn(batch, channels, height, width)
    x[0, channels // 2, 3, 7] = float("inf")
    x[1, 0, 0, 0] = float("nan")
    weight = torch.randn(out, channels // geometry[-1], kernel, kernel)
    x = x.contiguous(memory_format=FORMATS[memory_format])
    check_what_is_not_finite_reaches_only_its_readers(x, weight, *geometry)
