"""conv2d's image gradient under strides: phases of pixels, and patches that do not overlap."""

from __future__ import annotations

import pytest
import torch
from conv2d_checks import (
    DTYPES,
    FORMATS,
    check_accuracy,
    check_repeatable_and_batch_invariant,
    check_slices,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "backend")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "phases": (2, 5, 13, 10, 9, 3, 2, 1, 1, 1),
    "phases-without-taps": (2, 4, 11, 14, 6, (1, 2), (3, 4), 0, 1, 1),
    "phases-dilated": (1, 6, 17, 15, 8, 3, (2, 4), (3, 2), (2, 6), 2),
    "phases-beyond-the-image": (2, 3, 3, 2, 4, 2, 5, 1, 1, 1),
    "patches": (2, 3, 12, 20, 40, 4, 4, 0, 1, 1),
    "a-column-of-patches": (2, 8, 12, 3, 16, (4, 3), (4, 3), 0, 1, 1),
    "a-row-of-patches": (2, 5, 4, 18, 7, (4, 6), (4, 6), 0, 1, 1),
    "patches-apart": (2, 3, 14, 17, 10, (2, 3), (5, 4), 0, 1, 1),
    "patches-of-groups": (2, 6, 8, 8, 4, 2, 2, 0, 1, 2),
    "one-patch": (3, 2, 7, 5, 6, (7, 5), 7, 0, 1, 1),
    "patches-dilated": (2, 3, 12, 10, 7, 2, 4, 0, 3, 1),
}


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    check_accuracy(SHAPES[shape], dtype, FORMATS[memory_format])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_of_larger_tensors(shape, memory_format):
    check_slices(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.parametrize("shape", ["phases", "phases-dilated", "patches", "patches-apart"])
def test_repeatable_and_batch_invariant(shape):
    check_repeatable_and_batch_invariant(SHAPES[shape], torch.contiguous_format)
