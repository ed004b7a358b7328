"""conv2d and linear where a GPU's tiles of products end: their edges, sizes, copies and kinds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from backends import EMULATED
from conv2d_checks import FORMATS, result_and_image_gradient, tensors

from pyvit.ops import conv2d

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "one-tile": (1, 64, 8, 8, 64, 1, 1, 0, 1, 1),
    "one-more": (1, 72, 5, 13, 65, 1, 1, 0, 1, 1),
    "slab-ends-in-a-tap": (1, 24, 6, 5, 16, 3, 1, 1, 1, 1),
    "chunks-of-several-taps": (2, 3, 9, 8, 8, (3, 5), (2, 1), (1, 2), 1, 1),
    "phases-without-taps": (1, 8, 11, 9, 16, 2, (3, 5), 1, (3, 1), 1),
    "tall-tiles": (1, 536, 24, 16, 536, 1, 1, 0, 1, 67),
    "large-tiles": (2, 144, 13, 10, 4752, 1, 1, 0, 1, 72),
}
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def gradients(function, x, weight, bias, geometry, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves, *geometry)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(shape=["chunks-of-several-taps", "phases-without-taps"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_edges(shape, dtype, memory_format):
    geometry = SHAPES[shape][6:]
    arguments = tensors(SHAPES[shape], dtype, FORMATS[memory_format])
    exact = [a.double() for a in arguments]
    grad = torch.randn_like(F.conv2d(*exact, *geometry)).to(dtype)
    grad = grad.contiguous(memory_format=FORMATS[memory_format])
    truth = gradients(F.conv2d, *exact, geometry, grad.double())
    theirs = gradients(F.conv2d, *arguments, geometry, grad)
    ours = gradients(conv2d, *arguments, geometry, grad)
    assert_as_accurate(ours[0], theirs[0], truth[0], 2, "y")
    for name, *values in zip(
        ("dx", "dweight", "dbias"), ours[1:], theirs[1:], truth[1:], strict=True
    ):
        assert_as_accurate(*values, 3, name)


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(dtype=[])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_size_of_a_tile_changes_no_bit(dtype, memory_format):
    # One image has too few tiles for larger ones, seven have enough.
    shape = (7, 408, 8, 7, 3366, 1, 1, 0, 1, 51)
    x, weight, bias = tensors(shape, dtype, FORMATS[memory_format])
    grad = torch.randn(7, 3366, 8, 7).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    y, dx = result_and_image_gradient(conv2d, x, weight, bias, shape[6:], grad)
    for i in (0, 6):
        one = slice(i, i + 1)
        alone = result_and_image_gradient(conv2d, x[one], weight, bias, shape[6:], grad[one])
        assert torch.equal(alone[0], y[one])
        assert torch.equal(alone[1], dx[one])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 408, 8, 16, 3366, 1, 1, 0, 1, 51), (1, 72, 8, 8, 72, 1, 1, 0, 1, 1)]
)
def test_gpus_of_less_shared_memory(shape, dtype, backend):
    if backend != EMULATED:
        pytest.skip("the emulation has the memory of any GPU")
    from cuda_emulator import shared_memory

    arguments = tensors(shape, dtype)
    grad = torch.randn(shape[0], shape[4], *shape[2:4]).to(dtype)
    many = gradients(conv2d, *arguments, shape[6:], grad)
    with shared_memory(99 << 10):  # sm_86, sm_89
        few = gradients(conv2d, *arguments, shape[6:], grad)
    for one, other in zip(many, few, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(2, 12, 9, 8, 20, 3, 2, 1, 1, 1), (1, 7, 9, 8, 70, 3, 1, 1, 1, 1)]
)
def test_tf32_takes_ten_bits(shape, memory_format, backend):
    """Products of numbers that have no more bits are exact; those of others are not."""
    if backend not in (EMULATED, "cuda", "triton"):
        pytest.skip("the CPU and Triton's interpreter have no TF32")
    geometry = shape[6:]
    x, weight, bias = tensors(shape, torch.float32, FORMATS[memory_format])
    grad = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        for rounded in (False, True):
            if rounded:
                x, weight, grad = (
                    (t.view(torch.int32) & -0x2000).view(torch.float32) for t in (x, weight, grad)
                )
            exact = [a.double() for a in (x, weight, bias)]
            truth = gradients(F.conv2d, *exact, geometry, grad.double())
            switch.fp32_precision = "tf32"
            ours = gradients(conv2d, x, weight, bias, geometry, grad)
            for got, wanted in zip(ours[:3], truth[:3], strict=True):
                error = float((got - wanted).abs().max() / wanted.abs().max())
                assert error < 1e-5 if rounded else 1e-5 < error < 4e-3
    finally:
        switch.fp32_precision = before
