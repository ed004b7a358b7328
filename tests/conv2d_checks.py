"""Checks of conv2d's result and image gradient on a list of shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_within_rounding

from pyvit.ops import conv2d

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def tensors(shape, dtype, memory_format=torch.contiguous_format, weight_format=None):
    """Image, weight and bias; the weight in the image's format where none is given."""
    batch, channels, height, width, out, kernel, *_, groups = shape
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x = torch.randn(batch, channels, height, width).to(dtype)
    weight = torch.randn(out, channels // groups, *kernel).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    weight = weight.contiguous(memory_format=weight_format or memory_format)
    return x, weight, torch.randn(out).to(dtype)


def result_and_image_gradient(function, x, weight, bias, geometry, grad):
    x = x.detach().requires_grad_()
    y = function(x, weight, bias, *geometry)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check_accuracy(shape, dtype, memory_format, weight_format=torch.contiguous_format):
    geometry = shape[6:]
    arguments = tensors(shape, dtype, memory_format, weight_format)
    weight = arguments[1]
    exact = [a.double() for a in arguments]
    grad = torch.randn_like(F.conv2d(*exact, *geometry)).to(dtype)
    truth = result_and_image_gradient(F.conv2d, *exact, geometry, grad.double())
    theirs = result_and_image_gradient(F.conv2d, *arguments, geometry, grad)
    ours = result_and_image_gradient(conv2d, *arguments, geometry, grad)
    if dtype is torch.float64:
        sizes = result_and_image_gradient(F.conv2d, *(a.abs() for a in exact), geometry, grad.abs())
        terms = max(weight[0].numel(), weight[:, 0].numel())
        for name, *values in zip(("y", "dx"), ours, truth, sizes, strict=True):
            assert_within_rounding(*values, terms, name)
        return
    assert_as_accurate(ours[0], theirs[0], truth[0], 2, "y")
    assert_as_accurate(ours[1], theirs[1], truth[1], 3, "dx")


def check_slices(shape, memory_format):
    """Strides that no whole tensor has, in the image, the weight and the gradient."""
    geometry = shape[6:]
    x, weight, bias = tensors(shape, torch.float32)
    batch, channels, height, width = x.shape
    big = torch.full((batch, channels + 3, height + 2, 2 * width), float("nan"))
    part = big.contiguous(memory_format=memory_format)[:, 2:-1, 1:-1, ::2]
    part.copy_(x)
    turned = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    wide = torch.full((*grad.shape[:3], grad.shape[3] + 5), float("nan"))[..., 3:-2].copy_(grad)
    exact = [a.double() for a in (x, weight, bias)]
    truth = result_and_image_gradient(F.conv2d, *exact, geometry, grad.double())
    theirs = result_and_image_gradient(F.conv2d, x, weight, bias, geometry, grad)
    ours = result_and_image_gradient(conv2d, part, turned, bias, geometry, wide)
    assert_as_accurate(ours[0], theirs[0], truth[0], 2, "y")
    assert_as_accurate(ours[1], theirs[1], truth[1], 3, "dx")


def check_repeatable_and_batch_invariant(shape, memory_format):
    geometry = shape[6:]
    x, weight, bias = tensors((5, *shape[1:]), torch.float32, memory_format)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    grad = grad.contiguous(memory_format=memory_format)
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


def check_what_is_not_finite_reaches_only_its_readers(x, weight, *geometry):
    """``x`` has NaN or infinities: a packed zero times an infinite neighbour would be a NaN."""
    y = conv2d(x, weight, None, *geometry)
    reached = F.conv2d((~x.isfinite()).double(), torch.ones_like(weight).double(), None, *geometry)
    assert torch.equal(~y.isfinite(), reached > 0)


def check_nan_weights_stay_in_their_channel(size, weight, padding):
    """``weight`` has a NaN in some output channels; pixels beside the image do not hide it."""
    expected_channels = weight.isnan().flatten(1).any(1)
    for memory_format in FORMATS.values():
        x = torch.randn(size).contiguous(memory_format=memory_format)
        y = conv2d(x, weight.contiguous(memory_format=memory_format), padding=padding)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[:, expected_channels] = True
        assert torch.equal(y.isnan(), expected)
