"""The weight gradient of conv2d over the ways in which its kernel cuts and packs the operands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_within_rounding
from conv2d_checks import FORMATS
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvit.ops import conv2d

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "clipped taps": (3, 19, 13, 17, 45, 3, 1, 1, 1, 1),
    "several bands of rows": (2, 9, 40, 33, 33, 3, 1, 1, 1, 1),
    "bands of columns": (1, 9, 3, 600, 20, 3, 1, 1, 1, 1),
    "bands of images": (40, 9, 5, 4, 20, 3, 1, 1, 1, 1),
    "many one-pixel images": (300, 33, 1, 1, 35, 1, 1, 0, 1, 1),
    "strided, dilated": (2, 11, 23, 29, 21, 3, 2, 3, 3, 1),
    "stride and dilation share a factor": (2, 11, 24, 22, 21, 3, 2, 2, 2, 1),
    "stride and dilation share more": (2, 3, 40, 41, 21, 3, 4, 5, 6, 1),
    "taps apart": (2, 10, 21, 25, 17, (2, 3), (5, 4), 0, 1, 1),
    "taps apart, padded": (2, 10, 21, 25, 17, (2, 3), (5, 4), (1, 2), 1, 1),
    "pointwise, one output": (2, 32, 30, 31, 1, 1, 1, 0, 1, 1),
    "pointwise, ten outputs": (3, 48, 13, 7, 10, 1, 1, 0, 1, 1),
    "pointwise, strided": (2, 9, 15, 14, 40, 1, 2, 0, 1, 1),
    "pointwise, padded": (2, 9, 6, 7, 12, 1, 1, 1, 1, 1),
    "pointwise, few channels": (2, 3, 15, 14, 40, 1, 3, 0, 1, 1),
    "patchify": (3, 3, 32, 48, 40, 8, 8, 0, 1, 1),
    "padding beyond the kernel": (2, 12, 5, 6, 9, 3, 1, 4, 1, 1),
    "even kernel": (2, 12, 9, 8, 9, (4, 2), 1, (2, 1), 1, 1),
    "large kernel": (1, 8, 40, 40, 8, 31, 1, 15, 1, 1),
    "kernel of one row": (2, 10, 9, 50, 14, (1, 37), 1, (0, 18), 1, 1),
    # One channel's patch alone exceeds a task's share of the cache: taps are divided.
    "kernel as large as the image": (1, 2, 130, 130, 3, 128, 1, 0, 1, 1),
    "far dilation": (1, 9, 70, 65, 10, 3, 1, 30, 30, 1),
    "wide channels": (2, 300, 6, 7, 150, 3, 1, 1, 1, 1),
    "pixels far apart": (2, 16, 31, 32, 24, 5, 3, 0, 1, 1),
    "pixels far apart, few taps": (2, 48, 16, 17, 40, 2, 3, 0, 1, 1),
    "depthwise": (2, 45, 14, 15, 45, 3, 1, 1, 1, 45),
    "depthwise, large kernel": (1, 20, 17, 40, 20, 7, 1, 3, 1, 20),
    "depthwise, strided and dilated": (2, 20, 17, 19, 20, 3, 2, 2, 2, 20),
    "depthwise, tripled": (2, 7, 9, 11, 21, 3, 1, 1, 1, 7),
    # Whole vectors of channels: channels-last operands are read where they lie.
    "depthwise, whole vectors": (2, 48, 14, 15, 48, 3, 1, 1, 1, 48),
    "depthwise, whole vectors, several bands": (2, 32, 40, 33, 32, 7, 1, 3, 1, 32),
    "depthwise, whole vectors, strided": (2, 32, 17, 19, 32, (3, 5), (2, 3), (2, 7), (3, 2), 32),
    "depthwise, whole vectors, small images": (70, 16, 3, 2, 16, 5, 1, 2, 1, 16),
    "depthwise, whole vectors, wide padding": (1, 16, 3, 2, 16, 2, 1, 5, 1, 16),
    # The last strip is one vector, whose tiles are lower than those of two, so there are more.
    "depthwise, half a strip more": (3, 48, 20, 20, 48, 5, 1, 2, 1, 48),
    "groups of two to one": (2, 40, 9, 11, 20, 3, 1, 1, 1, 20),
    "groups of four": (2, 40, 9, 11, 40, 3, 1, 1, 1, 10),
    "groups of three to two": (2, 36, 9, 11, 24, 3, 1, 1, 1, 12),
    "groups of many to one": (2, 66, 9, 11, 2, 3, 1, 1, 1, 2),
    "groups of nine": (2, 27, 9, 11, 36, 3, 1, 1, 1, 3),
    # Not whole vectors of channels: the last overlaps the one before.
    "depthwise, a vector and a half": (2, 24, 14, 15, 24, 3, 1, 1, 1, 24),
    "depthwise, a strip and some": (2, 41, 30, 33, 41, 3, 1, 1, 1, 41),
    "depthwise, a strip, a vector and some": (2, 53, 14, 15, 53, 3, 2, 1, 1, 53),
    # Few channels meet, so that pixels lie in the lanes.
    "few outputs": (3, 20, 19, 23, 3, 3, 1, 1, 1, 1),
    "one output, pointwise": (5, 17, 21, 24, 1, 1, 1, 0, 1, 1),
    "few outputs, images in one run": (40, 9, 7, 5, 2, 1, 1, 0, 1, 1),
    "few outputs, images apart": (40, 9, 7, 8, 2, 3, 1, 1, 1, 1),
    "few outputs, strided and dilated": (2, 11, 40, 45, 5, (3, 5), (2, 3), (2, 4), (3, 2), 1),
    "few outputs, strides that skip": (2, 11, 41, 46, 5, (2, 3), (4, 5), 1, 1, 1),
    "few outputs, columns in bands": (1, 3, 4, 2100, 5, 3, 1, 1, 1, 1),
    "few outputs, padding beyond the kernel": (3, 9, 15, 16, 4, 3, 1, 5, 1, 1),
    "few outputs, too many sums for one block": (1, 150, 24, 25, 3, 7, 1, 3, 1, 1),
    "few outputs, very many taps": (1, 2, 100, 101, 2, 61, 1, 10, 1, 1),
    "groups of six to four": (2, 48, 29, 31, 32, 3, 2, 1, 1, 8),
    "groups of five": (2, 30, 29, 31, 30, 3, 1, 1, 1, 6),
}


def weight_grad(function, x, weight, geometry, grad):
    leaf = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return torch.autograd.grad(function(x, leaf, None, *geometry), leaf, grad)[0]


def inputs(shape, dtype, memory_format):
    batch, channels, height, width, out, kernel, *geometry = shape
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype)
    weight = torch.randn(out, channels // geometry[-1], *kernel, dtype=torch.float64).to(dtype)
    grad = torch.randn_like(F.conv2d(x.double(), weight.double(), None, *geometry)).to(dtype)
    x, weight, grad = (a.contiguous(memory_format=memory_format) for a in (x, weight, grad))
    return x, weight, geometry, grad


def check(x, weight, geometry, grad):
    truth = weight_grad(F.conv2d, x.double(), weight.double(), geometry, grad.double())
    ours = weight_grad(conv2d, x, weight, geometry, grad)
    if x.dtype is torch.float64:
        size = weight_grad(F.conv2d, x.abs(), weight, geometry, grad.abs())
        assert_within_rounding(ours, truth, size, grad[:, 0].numel(), "dweight")
    else:
        theirs = weight_grad(F.conv2d, x, weight, geometry, grad)
        assert_as_accurate(ours, theirs, truth, 3, "dweight")


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    check(*inputs(SHAPES[shape], dtype, FORMATS[memory_format]))


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [3, 10])
def test_every_width(channels, memory_format):
    for width in range(1, 41):
        for stride in (1, 2):
            shape = (2, channels, 3, width, 18, 3, stride, 1, 1, 1)
            check(*inputs(shape, torch.float32, FORMATS[memory_format]))


@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_channel_count(memory_format):
    for out in range(1, 67):
        shape = (1, 67 - out, 4, 5, out, 3, 1, 1, 1, 1)
        check(*inputs(shape, torch.float32, FORMATS[memory_format]))


@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 12),
    out=st.integers(1, 20),
    groups=st.integers(1, 9),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    memory_format=st.sampled_from(list(FORMATS.values())),
)
@settings(max_examples=150, deadline=None)
def test_any_geometry(
    batch, channels, out, groups, size, kernel, stride, padding, dilation, memory_format
):
    for axis in (0, 1):
        if size[axis] + 2 * padding[axis] < dilation[axis] * (kernel[axis] - 1) + 1:
            return
    shape = (batch, channels * groups, *size, out * groups, kernel)
    check(*inputs((*shape, stride, padding, dilation, groups), torch.float64, memory_format))


def views(x):
    """The same values, strided in ways that no layout has."""
    yield "rows and columns exchanged", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every other column", torch.stack([x, -x], dim=4).flatten(3)[..., ::2]
    yield "some channels of more", torch.cat([-x, x], dim=1)[:, x.shape[1] :]
    last = x.contiguous(memory_format=torch.channels_last)
    yield "some channels of more, channels last", torch.cat([-last, last], 1)[:, x.shape[1] :]
    yield "images innermost", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.parametrize("channels, groups", [(3, 1), (10, 1), (12, 12), (24, 24), (12, 6)])
def test_strided_inputs(channels, groups):
    shape = (3, channels, 9, 11, 24, 3, 1, 1, 1, groups)
    x, weight, geometry, grad = inputs(shape, torch.float32, torch.contiguous_format)
    for name, view in views(x):
        assert torch.equal(view, x), name
        check(view, weight, geometry, grad)
    for name, view in views(grad):
        assert torch.equal(view, grad), name
        check(x, weight, geometry, view)
    one = torch.ones(())
    check(x, weight, geometry, one.expand(grad.shape))
    check(one.expand(x.shape), weight, geometry, grad)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        (9, 40, 14, 14, 70, 3, 1, 1, 1, 1),
        (3, 3, 64, 64, 40, 7, 2, 3, 1, 1),
        (4, 64, 20, 20, 64, 3, 1, 1, 1, 64),
        (2, 24, 30, 20, 24, 3, 1, 1, 1, 12),
        (1, 256, 7, 7, 300, 3, 1, 1, 1, 1),
        (2, 3, 64, 64, 100, 16, 16, 0, 1, 1),
        (9, 12, 30, 20, 3, 3, 1, 1, 1, 1),
        (3, 60, 30, 20, 60, 3, 1, 1, 1, 12),
    ],
)
def test_independent_of_threads(shape, memory_format):
    arguments = inputs(shape, torch.float32, FORMATS[memory_format])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 2, 1):
            torch.set_num_threads(count)
            results.append(weight_grad(conv2d, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("out, size", [(20, 9), (9, 25)])
def test_nan_reaches_only_what_reads_it(out, size, memory_format):
    """An image's NaN enters the gradients of its own channel, a gradient's those of its own."""
    x, weight, geometry, grad = inputs(
        (2, 10, size, size, out, 3, 1, 1, 1, 1), torch.float32, FORMATS[memory_format]
    )
    others = [c for c in range(10) if c != 4]
    for row, column in ((0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1)):
        x[1, 4, row, column] = float("nan")
        ours = weight_grad(conv2d, x, weight, geometry, grad)
        assert ours[:, others].isfinite().all()
        # Only the taps that reach the corner from some output pixel read it.
        reads = torch.ones(3, 3, dtype=torch.bool)
        reads[2 if row == 0 else 0] = False
        reads[:, 2 if column == 0 else 0] = False
        assert ours[:, 4, reads].isnan().all() and ours[:, 4, ~reads].isfinite().all()
        x[1, 4, row, column] = 0.0
    grad[0, 7, 3, 3] = float("nan")
    ours = weight_grad(conv2d, x, weight, geometry, grad)
    assert ours[7].isnan().all() and ours[[o for o in range(out) if o != 7]].isfinite().all()
