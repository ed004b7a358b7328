"""conv2d of groups with few channels: depth-wise layers, multipliers, groups of four."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_within_rounding

from pyvit.ops import conv2d

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": (2, 40, 9, 17, 40, 3, 1, 1, 1, 40),
    "7x7": (3, 33, 14, 14, 33, 7, 1, 3, 1, 33),
    "small-image": (5, 96, 3, 3, 96, 7, 1, 3, 1, 96),
    "one-pixel": (3, 21, 1, 1, 21, 3, 1, 1, 1, 21),
    "unused-taps": (2, 40, 1, 2, 40, 11, 3, 5, 1, 40),
    "1x1": (2, 24, 8, 5, 24, 1, 1, 0, 1, 24),
    "1x1-strided": (2, 24, 8, 5, 24, 1, 3, 0, 1, 24),
    "strided": (2, 48, 15, 16, 48, 3, 2, 1, 1, 48),
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
    "halved": (2, 40, 9, 9, 20, 3, 1, 1, 1, 20),
    "groups-of-four": (2, 64, 14, 15, 64, 3, 1, 1, 1, 16),
    "groups-of-three": (2, 63, 14, 15, 63, 3, 2, 1, 1, 21),
    "many-to-one": (2, 96, 10, 9, 12, (3, 2), 1, 1, 1, 12),
    "long-sums": (1, 160, 9, 10, 16, 7, 1, 3, 1, 16),
}


def tensors(shape, dtype, memory_format=torch.contiguous_format):
    batch, channels, height, width, out, kernel, *_, groups = shape
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x = torch.randn(batch, channels, height, width).to(dtype)
    weight = torch.randn(out, channels // groups, *kernel).to(dtype)
    return x.contiguous(memory_format=memory_format), weight, torch.randn(out).to(dtype)


def result_and_image_gradient(function, x, weight, bias, geometry, grad):
    x = x.detach().requires_grad_()
    y = function(x, weight, bias, *geometry)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    geometry = SHAPES[shape][6:]
    arguments = tensors(SHAPES[shape], dtype, FORMATS[memory_format])
    exact = [a.double() for a in arguments]
    grad = torch.randn_like(F.conv2d(*exact, *geometry)).to(dtype)
    truth = result_and_image_gradient(F.conv2d, *exact, geometry, grad.double())
    theirs = result_and_image_gradient(F.conv2d, *arguments, geometry, grad)
    ours = result_and_image_gradient(conv2d, *arguments, geometry, grad)
    if dtype is torch.float64:
        sizes = result_and_image_gradient(F.conv2d, *(a.abs() for a in exact), geometry, grad.abs())
        terms = max(exact[1][0].numel(), exact[1][:, 0].numel())
        for name, *values in zip(("y", "dx"), ours, truth, sizes, strict=True):
            assert_within_rounding(*values, terms, name)
        return
    assert_as_accurate(ours[0], theirs[0], truth[0], 2, "y")
    assert_as_accurate(ours[1], theirs[1], truth[1], 3, "dx")


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", ["3x3", "dilated-strided", "tripled", "groups-of-four"])
def test_slices_of_larger_tensors(shape, memory_format):
    """Strides that no whole tensor has, in the image, the weight and the gradient."""
    geometry = SHAPES[shape][6:]
    x, weight, bias = tensors(SHAPES[shape], torch.float32)
    batch, channels, height, width = x.shape
    big = torch.full((batch, channels + 3, height + 2, 2 * width), float("nan"))
    part = big.contiguous(memory_format=FORMATS[memory_format])[:, 2:-1, 1:-1, ::2]
    part.copy_(x)
    turned = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    wide = torch.full((*grad.shape[:3], grad.shape[3] + 5), float("nan"))[..., 3:-2].copy_(grad)
    ours = result_and_image_gradient(conv2d, part, turned, bias, geometry, wide)
    plain = result_and_image_gradient(conv2d, x, weight, bias, geometry, grad)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    ["3x3", "small-image", "dilated-strided", "boxes", "blocks", "groups-of-four", "long-sums"],
)
def test_repeatable_and_batch_invariant(shape, memory_format):
    geometry = SHAPES[shape][6:]
    sizes = (5, *SHAPES[shape][1:])
    x, weight, bias = tensors(sizes, torch.float32, FORMATS[memory_format])
    grad = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    grad = grad.contiguous(memory_format=FORMATS[memory_format])
    first = result_and_image_gradient(conv2d, x, weight, bias, geometry, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            again = result_and_image_gradient(conv2d, x, weight, bias, geometry, grad)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    finally:
        torch.set_num_threads(threads)
    for i in (0, 4):
        one = slice(i, i + 1)
        y, dx = result_and_image_gradient(conv2d, x[one], weight, bias, geometry, grad[one])
        assert torch.equal(y, first[0][one])
        assert torch.equal(dx, first[1][one])


def test_layouts_agree_bit_for_bit():
    x, weight, bias = tensors(SHAPES["dilated-strided"], torch.float32)
    geometry = SHAPES["dilated-strided"][6:]
    planar = conv2d(x, weight, bias, *geometry)
    last = conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, *geometry)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(planar, last)


def test_nan_stays_in_its_channel():
    x = torch.randn(2, 37, 9, 9)
    x[1, 20, 4, 4] = float("nan")
    for memory_format in FORMATS.values():
        image = x.contiguous(memory_format=memory_format)
        y = conv2d(image, torch.randn(37, 1, 3, 3), padding=1, groups=37)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[1, 20, 3:6, 3:6] = True
        assert torch.equal(y.isnan(), expected)
