"""Offsets beyond 32 bits that strides make, not sizes: a few numbers far apart, on any machine."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from backends import ON_PROCESSOR

from pyvit.ops import conv2d, linear, patch_embed, topk_attention, unfold

pytestmark = pytest.mark.usefixtures("backend")

NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap has no name for it before 3.13
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
FAR = (1 << 30) + 16  # elements from one index to the next: a 32-bit number, twice it is not
LONGEST = 4  # indices along the axis that is far


@pytest.fixture
def apart(backend):
    """Copies of small tensors in memory of which only the pages in use are real."""
    if backend not in ("cpu", *ON_PROCESSOR):
        pytest.skip("the memory is the host's")
    maps = []

    def spread(values: torch.Tensor, axis: int) -> torch.Tensor:
        """The same values, those of each index of ``axis`` far from the next one's. Before them
        lies as much again: what an offset that wrapped around would read, as zeros."""
        assert values.shape[axis] <= LONGEST
        length = 2 * LONGEST * FAR * values.element_size()
        try:
            maps.append(mmap.mmap(-1, length, flags=FLAGS))
        except OSError:
            pytest.skip("this machine grants no address space beyond its memory")
        memory = torch.frombuffer(maps[-1], dtype=values.dtype)
        strides = list(values.contiguous().stride())
        strides[axis] = FAR
        far = memory.as_strided(values.shape, strides, LONGEST * FAR)
        return far.copy_(values)

    return spread


@pytest.mark.parametrize("axis", range(4))
def test_conv2d(apart, axis):
    x, weight = torch.randn(3, 4, 3, 4), torch.randn(4, 4, 3, 2)
    geometry = (None, 1, 1)
    near = x.clone().requires_grad_(), weight.clone().requires_grad_()
    far = apart(x, axis).requires_grad_(), apart(weight, axis).requires_grad_()
    results = [conv2d(*pair, *geometry) for pair in (near, far)]
    torch.testing.assert_close(*results)
    grad = torch.randn(3, 4, 3, 4)
    image = torch.randn(3, 4, 3, 3).requires_grad_()
    (wanted,) = torch.autograd.grad(conv2d(image, weight, padding=(1, 1)), image, grad)
    (got,) = torch.autograd.grad(conv2d(image, weight, padding=(1, 1)), image, apart(grad, axis))
    torch.testing.assert_close(got, wanted)
    grad = torch.randn_like(results[0])
    for one, other in zip(*(torch.autograd.grad(r, p, grad) for r, p in zip(results, (near, far)))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("axis", range(2))
def test_linear(apart, axis):
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    wanted = linear(x, weight)
    torch.testing.assert_close(linear(apart(x, 0), apart(weight, axis)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("axis", range(4))
def test_patch_embed(apart, axis, dtype):
    image = (255 * torch.rand(3, 3, 4, 4)).to(dtype)
    weight = torch.randn(4, 3, 2, 2)
    near, far = weight.clone().requires_grad_(), apart(weight, axis).requires_grad_()
    tokens = patch_embed(image, near), patch_embed(apart(image, axis), far)
    torch.testing.assert_close(*tokens)
    grad = torch.randn_like(tokens[0])
    spread = apart(grad, axis) if axis < 3 else grad
    (one,), (other,) = (
        torch.autograd.grad(t, w, g) for t, w, g in zip(tokens, (near, far), (grad, spread))
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("axis", range(4))
def test_unfold(apart, axis):
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(unfold(apart(x, axis), 2), unfold(x, 2))


@pytest.mark.parametrize("axis", range(3))
def test_topk_attention(apart, axis):
    near = [torch.randn(3, 3, 3, 8).requires_grad_() for _ in range(3)]
    far = [apart(t.detach(), axis).requires_grad_() for t in near]
    grad = torch.randn(3, 3, 3, 8)
    for topk in (2, 3):
        outs = topk_attention(*near, topk), topk_attention(*far, topk)
        torch.testing.assert_close(*outs)
        ones = torch.autograd.grad(outs[0], near, grad)
        others = torch.autograd.grad(outs[1], far, apart(grad, axis))
        torch.testing.assert_close(others, ones)
