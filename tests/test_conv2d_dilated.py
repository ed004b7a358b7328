"""conv2d with dilation: rows of one residue are a dense layer, and columns are cut where taps enter
and leave the image."""

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
    "residues": (2, 8, 64, 67, 20, 3, 1, 6, 6, 1),
    "residues-strided": (2, 40, 35, 33, 24, 3, (3, 2), (4, 6), (4, 5), 1),
    "residues-of-few-rows": (1, 10, 14, 240, 24, 3, 1, 12, 12, 1),
    "residues-few-outputs": (1, 12, 54, 54, 4, 3, 1, 9, 9, 1),
    "residues-groups": (2, 40, 30, 31, 48, 3, 1, 4, 4, 2),
    "residues-slices": (2, 300, 16, 21, 40, 3, 1, 3, 3, 1),
    "cut": (2, 24, 16, 15, 40, 7, 1, 12, 4, 1),
    "cut-unevenly": (2, 20, 9, 29, 33, (2, 5), 1, (1, 11), (2, 7), 1),
    "cut-strided": (2, 17, 21, 40, 36, 3, 2, 12, (5, 13), 1),
    "cut-and-boxed": (1, 8, 9, 230, 40, (3, 5), 1, (2, 60), (2, 30), 1),
    "windows-outside": (2, 12, 12, 13, 17, 3, 1, 10, 4, 1),
    "common-factor": (2, 18, 20, 21, 40, 5, 2, 1, 4, 1),
    "small-image": (2, 16, 7, 6, 33, 7, 1, 9, 3, 1),
}


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    check_accuracy(SHAPES[shape], dtype, FORMATS[memory_format])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", ["residues", "residues-strided", "cut", "common-factor"])
def test_slices_of_larger_tensors(shape, memory_format):
    check_slices(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_repeatable_and_batch_invariant(shape, memory_format):
    check_repeatable_and_batch_invariant(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", ["residues", "residues-strided", "cut", "windows-outside"])
def test_what_is_not_finite_reaches_only_what_reads_it(shape, memory_format):
    batch, channels, height, width, out, kernel, *geometry, _ = SHAPES[shape]
    x = torch.randn(batch, channels, height, width)
    x[0, 3, height // 2, width // 3] = float("nan")
    x[-1, -1, 0, -1] = float("inf")
    weight = torch.randn(out, channels, kernel, kernel)
    x = x.contiguous(memory_format=FORMATS[memory_format])
    check_what_is_not_finite_reaches_only_its_readers(x, weight, *geometry)
