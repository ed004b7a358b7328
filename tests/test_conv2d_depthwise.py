"""conv2d of groups with few channels: depth-wise layers, multipliers, small groups."""

from __future__ import annotations

import pytest
import torch
from conv2d_checks import (
    DTYPES,
    FORMATS,
    check_accuracy,
    check_repeatable_and_batch_invariant,
    check_slices,
    tensors,
)

from pyvit.ops import conv2d

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": (2, 40, 9, 17, 40, 3, 1, 1, 1, 40),
    "7x7": (3, 33, 14, 14, 33, 7, 1, 3, 1, 33),
    "patches": (2, 33, 21, 22, 33, 3, 1, 1, 1, 33),
    "planes": (2, 20, 10, 50, 20, 3, 1, 1, 1, 20),
    "planes-one-vector": (2, 20, 9, 16, 20, 3, 1, 2, 1, 20),
    "planes-unpadded": (1, 20, 7, 35, 20, 3, 1, 0, 1, 20),
    "three-side-by-side": (2, 3, 10, 41, 3, 3, 1, 1, 1, 3),
    "five-side-by-side-one-vector": (2, 5, 7, 4, 5, 3, 1, 2, 1, 5),
    "side-by-side-unpadded": (1, 15, 9, 11, 15, 3, 1, 0, 1, 15),
    "patches-of-five": (1, 20, 14, 35, 20, 5, 1, 2, 1, 20),
    "patches-of-phases": (2, 20, 14, 40, 20, 5, 2, 2, 1, 20),
    "columns-apart": (2, 20, 14, 60, 20, (2, 7), 1, (0, 3), 1, 20),
    "small-image": (5, 96, 3, 3, 96, 7, 1, 3, 1, 96),
    "one-pixel": (3, 21, 1, 1, 21, 3, 1, 1, 1, 21),
    "unused-taps": (2, 40, 1, 2, 40, 11, 3, 5, 1, 40),
    "1x1": (2, 24, 8, 5, 24, 1, 1, 0, 1, 24),
    "1x1-strided": (2, 24, 8, 5, 24, 1, 3, 0, 1, 24),
    "strided": (2, 48, 15, 16, 48, 3, 2, 1, 1, 48),
    "strided-long-runs": (2, 136, 14, 31, 136, 3, 3, 1, 1, 136),
    "strided-beyond-the-cache": (2, 40, 230, 231, 40, 3, 2, 1, 1, 40),
    "strided-apart-beyond-the-cache": (1, 72, 230, 231, 72, 3, 3, 1, 1, 72),
    "strided-in-few-sets": (1, 256, 11, 34, 256, 3, 3, 1, 1, 256),
    "idle-tap-between-others": (2, 20, 2, 16, 20, 5, 3, (3, 1), 1, 20),
    "idle-tap-of-three": (2, 3, 8, 2, 3, (3, 5), 3, 3, (2, 1), 3),
    "stride-beyond-kernel": (2, 20, 11, 12, 20, 2, 3, 0, 1, 20),
    "dilated-strided": (2, 20, 31, 34, 20, (5, 3), (2, 3), (6, 3), (3, 2), 20),
    "common-factor": (1, 20, 23, 21, 20, 3, 2, 4, 4, 20),
    "taps-beside-the-image": (2, 20, 10, 11, 20, 7, 1, 36, 12, 20),
    "large-kernel": (1, 18, 20, 21, 18, 31, 1, 15, 1, 18),
    "boxes": (1, 20, 190, 150, 20, 3, 1, 1, 1, 20),
    "boxes-of-columns": (1, 64, 20, 310, 4, 3, 1, 1, 1, 4),
    "blocks": (2, 272, 30, 10, 272, 3, 1, 1, 1, 272),
    "doubled": (2, 20, 9, 9, 40, 3, 2, 1, 1, 20),
    "tripled": (2, 13, 9, 9, 39, 5, 1, 2, 2, 13),
    "doubled-several-vectors": (2, 36, 13, 17, 72, 3, 3, 1, 1, 36),
    "three-strided": (2, 3, 22, 25, 3, 3, 2, 1, 1, 3),
    "three-doubled-strided": (3, 3, 22, 28, 6, 3, 3, 1, 1, 3),
    "eight-strided": (2, 8, 23, 25, 8, 5, 3, 2, 1, 8),
    "pairs-in-a-vector": (2, 8, 13, 27, 8, (3, 2), 1, 1, 1, 4),
    "threes-in-a-vector": (2, 12, 13, 17, 16, 3, 2, 1, 1, 4),
    "quadrupled-in-a-vector": (2, 4, 13, 17, 16, 3, 2, 1, 1, 4),
    "halved": (2, 40, 9, 9, 20, 3, 1, 1, 1, 20),
    "groups-of-four": (2, 64, 14, 15, 64, 3, 1, 1, 1, 16),
    "groups-of-three": (2, 63, 14, 15, 63, 3, 2, 1, 1, 21),
    "many-to-one": (2, 96, 10, 9, 12, (3, 2), 1, 1, 1, 12),
    "groups-of-eight": (2, 64, 9, 10, 24, 3, 2, 1, 1, 8),
    "groups-of-twelve-to-eight": (2, 48, 9, 10, 32, 3, 1, 1, 1, 4),
    "sources-in-two-vectors": (2, 48, 9, 20, 24, 3, 1, 1, 1, 8),
    "vectors-of-whole-groups": (2, 35, 9, 20, 14, 3, 2, 1, 1, 7),
    "few-lanes-of-many-sources": (2, 90, 8, 9, 6, 1, 1, 0, 1, 3),
    "vector-of-one-group": (2, 24, 9, 20, 64, 3, 2, 1, 1, 4),
    "vectors-of-one-group": (2, 10, 9, 31, 100, 3, 1, 1, 1, 5),
    "half-vectors-of-one-group": (2, 15, 7, 20, 60, (1, 3), 3, 1, 1, 5),
    "1x1-of-one-group": (3, 16, 5, 5, 80, 1, 1, 0, 1, 4),
    "1x1-of-several-groups": (3, 40, 5, 7, 48, 1, 1, 0, 1, 8),
    "1x1-of-several-groups-strided": (2, 36, 15, 31, 18, 1, 2, 0, 1, 6),
    "long-sums": (1, 160, 9, 10, 16, 7, 1, 3, 1, 16),
}


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    check_accuracy(SHAPES[shape], dtype, FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        "3x3",
        "planes",
        "three-side-by-side",
        "dilated-strided",
        "doubled-several-vectors",
        "tripled",
        "three-doubled-strided",
        "pairs-in-a-vector",
        "groups-of-four",
        "sources-in-two-vectors",
        "vectors-of-one-group",
        "1x1-of-several-groups",
    ],
)
def test_slices_of_larger_tensors(shape, memory_format):
    check_slices(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        "3x3",
        "patches",
        "three-side-by-side",
        "small-image",
        "dilated-strided",
        "boxes",
        "blocks",
        "doubled-several-vectors",
        "three-doubled-strided",
        "pairs-in-a-vector",
        "groups-of-four",
        "sources-in-two-vectors",
        "vectors-of-one-group",
        "1x1-of-several-groups",
        "long-sums",
    ],
)
def test_repeatable_and_batch_invariant(shape, memory_format):
    check_repeatable_and_batch_invariant(SHAPES[shape], FORMATS[memory_format])


@pytest.mark.parametrize(
    "shape",
    [
        "dilated-strided",
        "planes",
        "three-side-by-side",
        "doubled-several-vectors",
        "eight-strided",
    ],
)
def test_layouts_agree_bit_for_bit(shape):
    x, weight, bias = tensors(SHAPES[shape], torch.float32)
    geometry = SHAPES[shape][6:]
    planar = conv2d(x, weight, bias, *geometry)
    last = conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, *geometry)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(planar, last)


def test_nan_stays_in_its_group():
    x = torch.randn(2, 48, 9, 12)
    x[1, 20, 4, 4] = float("nan")  # of the fourth group of six
    for outputs in (3, 20):
        image = x.contiguous(memory_format=torch.channels_last)
        y = conv2d(image, torch.randn(8 * outputs, 6, 3, 3), padding=1, groups=8)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[1, 3 * outputs : 4 * outputs, 3:6, 3:6] = True
        assert torch.equal(y.isnan(), expected)


def test_nan_stays_in_its_channel():
    x = torch.randn(2, 37, 9, 9)
    x[1, 20, 4, 4] = float("nan")
    for memory_format in FORMATS.values():
        image = x.contiguous(memory_format=memory_format)
        y = conv2d(image, torch.randn(37, 1, 3, 3), padding=1, groups=37)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[1, 20, 3:6, 3:6] = True
        assert torch.equal(y.isnan(), expected)
