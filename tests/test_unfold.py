from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_within_rounding
from backends import EMULATED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from pyvit.ops import fold, unfold
from pyvit.reference import unfold as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# image size, kernel, dilation, padding, stride
CASES = {
    "3x3": ((2, 3, 9, 11), 3, 1, 1, 1),
    "patchify": ((2, 3, 32, 30), 4, 1, 0, 4),
    "stem": ((1, 3, 33, 30), 7, 1, 3, 2),
    "all-different": ((2, 9, 13, 10), (2, 3), (2, 1), (0, 2), (2, 3)),
    "one-pixel": ((3, 5, 1, 1), 1, 1, 0, 1),
    "all-padding": ((2, 3, 1, 1), 3, 1, 1, 1),
    "wide-padding": ((2, 9, 4, 5), 1, 1, 3, 2),
    "gaps": ((2, 3, 11, 12), 2, 1, 0, 5),
    "stride-beyond-image": ((2, 3, 5, 4), 2, 1, 0, 9),
    "dilated": ((1, 40, 15, 17), 3, 4, 4, 3),
    "many-channels": ((2, 70, 7, 7), 3, 1, 1, 1),
    "long-row": ((1, 1, 2, 5000), (1, 3), 1, (0, 1), 1),
    "long-row-strided": ((1, 1, 1, 5001), (1, 5), (1, 2), (0, 3), (1, 3)),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_unfold_copies_exactly(case, dtype, memory_format):
    size, *geometry = CASES[case]
    x = torch.randn(size).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    ours = unfold(x, *geometry)
    assert torch.equal(ours, F.unfold(x, *geometry))
    assert ours.is_contiguous()


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fold_is_as_accurate_as_torch(case, dtype):
    size, *geometry = CASES[case]
    cols = torch.randn(F.unfold(torch.zeros(size), *geometry).shape).to(dtype)
    truth = F.fold(cols.double(), size[2:], *geometry)
    ours = fold(cols, size[2:], *geometry)
    if dtype is torch.float64:
        absolute = F.fold(cols.abs(), size[2:], *geometry)
        assert_within_rounding(ours, truth, absolute, cols.shape[1], "fold")
    else:
        assert_as_accurate(ours, F.fold(cols, size[2:], *geometry), truth, 2, "fold")


@pytest.mark.parametrize("case", ["3x3", "all-different", "gaps", "dilated", "wide-padding"])
def test_reference(case):
    size, *geometry = CASES[case]
    x = torch.randn(size, dtype=torch.float64)
    pairs = [g if isinstance(g, tuple) else (g, g) for g in geometry]
    cols = F.unfold(x, *geometry)
    assert torch.equal(reference.unfold(x, *pairs), cols)
    torch.testing.assert_close(
        reference.fold(cols, size[2:], *pairs), F.fold(cols, size[2:], *geometry)
    )


@pytest.mark.usefixtures("backend")
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_geometry(data):
    small = st.integers(1, 4)
    pairs = [(data.draw(small), data.draw(small)) for _ in range(3)]
    kernel, dilation, stride = pairs
    padding = (data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4)))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + data.draw(st.integers(0, 9))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    x = torch.randn(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 20)), *size)
    x = x.contiguous(memory_format=data.draw(st.sampled_from(list(FORMATS.values()))))
    x.requires_grad_()
    geometry = (kernel, dilation, padding, stride)
    cols = unfold(x, *geometry)
    assert torch.equal(cols, F.unfold(x, *geometry))
    grad = torch.randint(-8, 8, cols.shape).float()  # sums of small integers are exact
    assert torch.equal(fold(grad, size, *geometry), F.fold(grad, size, *geometry))
    (ours,) = torch.autograd.grad(cols, x, grad)
    assert torch.equal(ours, F.fold(grad, size, *geometry))


def strided_views():
    big = torch.randn(4, 20, 20, 22)
    return {
        "slice": big[1:3, 2:5, 3:12, 4:15],
        "step": big[:2, ::2, ::2, ::2],
        "transposed": big[:2, :3].transpose(2, 3),
        "batch and channel swapped": big.permute(1, 0, 2, 3)[:, :3],
        "expanded": big[:1, :3].expand(3, -1, -1, -1),
        "channels_last slice": big.contiguous(memory_format=torch.channels_last)[:, 1:14, 1:],
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", strided_views())
def test_strided_images(view, dtype):
    x = strided_views()[view].to(dtype)
    assert torch.equal(unfold(x, 3, 2, 2, 2), F.unfold(x, 3, 2, 2, 2))


@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_columns(dtype):
    cols = torch.randint(-8, 8, (2, 27, 81)).to(dtype)
    views = [
        cols.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([cols, cols], -1)[..., 1],
        cols[:1].expand(3, -1, -1),
        cols[:, :, :1].expand(-1, -1, 81),
    ]
    for view in views:
        ours = fold(view, (9, 9), 3, 1, 1, 1)
        assert torch.equal(ours, F.fold(view, (9, 9), 3, 1, 1, 1))


@pytest.mark.usefixtures("backend")
def test_one_image_without_batch():
    x = torch.randn(3, 8, 9)
    cols = unfold(x, 3, padding=1)
    assert torch.equal(cols, F.unfold(x, 3, padding=1))
    torch.testing.assert_close(fold(cols, (8, 9), 3, padding=1), F.fold(cols, (8, 9), 3, padding=1))


@pytest.mark.usefixtures("backend")
def test_empty_batch():
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    cols = unfold(x, 3)
    assert cols.shape == (0, 27, 36)
    assert fold(cols, 8, 3).shape == (0, 3, 8, 8)
    cols.sum().backward()
    assert x.grad.shape == x.shape


def test_steps_beyond_32_bits(backend):
    if backend not in ("cpu", EMULATED, "cuda"):
        pytest.skip("Triton's numbers are of 32 bits")
    far = 1 << 32
    x = torch.randn(2, 3, 4, 5)
    cols = unfold(x, (2, 1), (1, far), 0, far)
    assert torch.equal(cols, x[:, :, :2, :1].reshape(2, 6, 1))
    folded = torch.zeros_like(x)
    folded[:, :, :2, :1] = x[:, :, :2, :1]
    assert torch.equal(fold(cols, (4, 5), (2, 1), (1, far), 0, far), folded)
    if backend == "cpu":
        nine = unfold(x, 1, padding=far, stride=far)[0, 0].tolist()
        assert nine == [0, 0, 0, 0, x[0, 0, 0, 0], 0, 0, 0, 0]
    else:
        with pytest.raises(RuntimeError, match=r"pyvit\.unfold: .* pixels across an image"):
            unfold(x, 1, padding=far, stride=far)


@pytest.mark.usefixtures("backend")
def test_nan_stays_where_it_is_read():
    cols = torch.randn(2, 9, 49)
    cols[1, 4, 24] = float("nan")  # the centre of the patch around pixel (3, 3)
    image = fold(cols, 7, 3, padding=1)
    assert image.isnan().nonzero().tolist() == [[1, 0, 3, 3]]
    assert torch.equal(unfold(image, 3, padding=1).isnan().sum((1, 2)), torch.tensor([0, 9]))


@pytest.mark.interpreted(case=["3x3", "all-different"])
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("case", ["3x3", "stem", "all-different", "long-row-strided"])
def test_repeatable_and_batch_invariant(case):
    (_, *image), *geometry = CASES[case]
    cols = torch.randn(F.unfold(torch.zeros(7, *image), *geometry).shape)
    first = fold(cols, image[1:], *geometry)
    for _ in range(3):
        assert torch.equal(fold(cols, image[1:], *geometry), first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(fold(cols, image[1:], *geometry), first), "depends on threads"
    finally:
        torch.set_num_threads(threads)
    for i in range(7):
        assert torch.equal(fold(cols[i : i + 1], image[1:], *geometry), first[i : i + 1])


def test_gradcheck():
    geometry = ((2, 3), (2, 1), (1, 2), (1, 2))
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    cols = unfold(x, *geometry).detach().requires_grad_()

    # Linear maps have no second derivative of their own: a square gives the check something.
    def squared_unfold(x):
        return unfold(x, *geometry).square()

    def squared_fold(cols):
        return fold(cols, (5, 4), *geometry).square()

    for function, argument in ((squared_unfold, x), (squared_fold, cols)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    geometry = ([2, 3], [2, 1], [1, 2], [1, 2])
    x = torch.randn(2, 9, 6, 5).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    for image in (x, last, x[1:, ::2]):
        torch.library.opcheck(torch.ops.pyvit.unfold.default, (image, *geometry))
    cols = torch.ops.pyvit.unfold(x, *geometry)
    for columns in (cols, cols.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(torch.ops.pyvit.fold.default, (columns, [6, 5], *geometry))


def test_compile():
    def loss(x):
        cols = unfold(x, 3, padding=1, stride=2)
        return fold(cols.relu(), x.shape[2:], 3, padding=1, stride=2).square().sum()

    x = torch.randn(2, 3, 9, 8)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_forward_mode_is_refused():
    """The bare op would let tangents pass as zeros."""
    x = torch.randn(1, 9, 36)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        fold(forward_ad.make_dual(x, x), 8, 3)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda t: unfold(t, 3), (x.reshape(1, 9, 6, 6),), (x.reshape(1, 9, 6, 6),))


def test_meta_tensors():
    cols = unfold(torch.empty(2, 3, 8, 8, device="meta"), 3)
    assert cols.shape == (2, 27, 36) and cols.device.type == "meta"
    assert fold(cols, 8, 3).shape == (2, 3, 8, 8)


BAD_UNFOLDS = {
    "x is a list": (TypeError, "x", dict(x=[1.0])),
    "x of integers": (TypeError, "x", dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.int64))),
    "x complex": (TypeError, "x", dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.complex64))),
    "x of 2 dimensions": (ValueError, "x", dict(x=torch.zeros(8, 8))),
    "x of 5 dimensions": (ValueError, "x", dict(x=torch.zeros(1, 1, 3, 8, 8))),
    "x sparse": (NotImplementedError, "x", dict(x=torch.zeros(1, 3, 8, 8).to_sparse())),
    "x without channels": (ValueError, "x", dict(x=torch.zeros(1, 0, 8, 8))),
    "x too low": (ValueError, "x", dict(x=torch.zeros(1, 3, 2, 8))),
    "x too narrow": (ValueError, "x", dict(x=torch.zeros(1, 3, 8, 2))),
    "x without pixels": (ValueError, "x", dict(x=torch.zeros(1, 3, 0, 8))),
    "kernel_size 0": (ValueError, "kernel_size", dict(kernel_size=0)),
    "kernel_size of three": (ValueError, "kernel_size", dict(kernel_size=(1, 1, 1))),
    "kernel_size is None": (TypeError, "kernel_size", dict(kernel_size=None)),
    "dilation 0": (ValueError, "dilation", dict(dilation=(1, 0))),
    "dilation too wide": (ValueError, "x", dict(dilation=4)),
    "padding negative": (ValueError, "padding", dict(padding=-1)),
    "padding by name": (TypeError, "padding", dict(padding="same")),
    "stride 0": (ValueError, "stride", dict(stride=0)),
    "stride of one half": (TypeError, "stride", dict(stride=0.5)),
    "stride is True": (TypeError, "stride", dict(stride=True)),
}


@pytest.mark.parametrize("case", BAD_UNFOLDS)
def test_bad_unfolds_name_the_argument(case):
    error, argument, changed = BAD_UNFOLDS[case]
    arguments = dict(x=torch.zeros(1, 3, 8, 8), kernel_size=3) | changed
    with pytest.raises(error, match=rf"pyvit\.unfold: `{argument}` must be .*; got "):
        unfold(**arguments)


BAD_FOLDS = {
    "cols is a list": (TypeError, "cols", dict(cols=[1.0])),
    "cols of integers": (TypeError, "cols", dict(cols=torch.zeros(1, 27, 36).int())),
    "cols of 1 dimension": (ValueError, "cols", dict(cols=torch.zeros(27))),
    "cols of 4 dimensions": (ValueError, "cols", dict(cols=torch.zeros(1, 27, 6, 6))),
    "cols sparse": (NotImplementedError, "cols", dict(cols=torch.zeros(1, 27, 36).to_sparse())),
    "cols of half a channel": (ValueError, "cols", dict(cols=torch.zeros(1, 26, 36))),
    "cols without elements": (ValueError, "cols", dict(cols=torch.zeros(1, 0, 36))),
    "cols of too few patches": (ValueError, "cols", dict(cols=torch.zeros(1, 27, 35))),
    "cols of too many patches": (ValueError, "cols", dict(cols=torch.zeros(1, 27, 37))),
    "output_size 0": (ValueError, "output_size", dict(output_size=(8, 0))),
    "output_size too small": (ValueError, "output_size", dict(output_size=2)),
    "output_size of a half": (TypeError, "output_size", dict(output_size=7.5)),
    "output_size is None": (TypeError, "output_size", dict(output_size=None)),
    "kernel_size 0": (ValueError, "kernel_size", dict(kernel_size=0)),
    "kernel_size too large": (ValueError, "output_size", dict(kernel_size=9)),
    "dilation 0": (ValueError, "dilation", dict(dilation=0)),
    "padding negative": (ValueError, "padding", dict(padding=(0, -1))),
    "stride 0": (ValueError, "stride", dict(stride=(0, 1))),
}


@pytest.mark.parametrize("case", BAD_FOLDS)
def test_bad_folds_name_the_argument(case):
    error, argument, changed = BAD_FOLDS[case]
    arguments = dict(cols=torch.zeros(1, 27, 36), output_size=8, kernel_size=3) | changed
    with pytest.raises(error, match=rf"pyvit\.fold: `{argument}` must be .*; got "):
        fold(**arguments)
