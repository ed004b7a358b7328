from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_within_rounding
from backends import EMULATED, INTERPRETED
from conv2d_checks import DTYPES, FORMATS, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_extra_bytes
from torch.autograd import forward_ad

from pyvit.ops import conv2d
from pyvit.reference.conv2d import conv2d as reference_conv2d

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

# batch, in channels, height, width, out channels, kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": (2, 3, 9, 11, 5, 3, 1, 1, 1, 1),
    "stem": (2, 3, 32, 33, 64, 7, 2, 3, 1, 1),
    "pointwise": (1, 8, 16, 16, 40, 1, 1, 0, 1, 1),
    "pointwise-strided": (2, 5, 8, 9, 6, 1, 2, 0, 1, 1),
    "strided-groups": (2, 4, 9, 7, 6, 3, 2, 1, 1, 2),
    "all-different": (3, 6, 13, 10, 12, (3, 5), (2, 3), (1, 2), (2, 1), 3),
    "depthwise": (2, 8, 9, 9, 8, 3, 1, 1, 1, 8),
    "depthwise-doubled": (2, 8, 9, 9, 16, 3, 2, 1, 1, 8),
    "stride-beyond-kernel": (2, 5, 8, 8, 6, 2, 3, 0, 1, 1),
    "patchify": (2, 3, 16, 16, 300, 4, 4, 0, 1, 1),
    "small-image": (5, 17, 7, 7, 70, 3, 1, 1, 1, 1),
    "one-pixel": (3, 4, 1, 1, 9, 1, 1, 0, 1, 1),
    "all-padding": (2, 3, 1, 1, 9, 3, 1, 1, 1, 1),
    "wide-padding": (1, 2, 4, 4, 3, 3, 1, 5, 1, 1),
    "deep": (1, 70, 6, 6, 8, 3, 1, 1, 1, 1),
    "blocks": (1, 4, 24, 24, 300, 3, 1, 1, 1, 1),
    "one-row": (2, 3, 1, 40, 4, (1, 5), 1, (0, 2), 1, 1),
    "dilated": (2, 4, 15, 15, 4, 3, 2, 4, 4, 1),
    # Channels on the vector side, windows of a band: whole and partial strips, slices of channels,
    # rows of the kernel outside the image, columns and channels cut into boxes, phases of a stride.
    "strips": (2, 20, 13, 15, 36, 3, 1, 1, 1, 1),
    "channel-slices": (2, 200, 9, 10, 40, 3, 1, 1, 1, 1),
    "phases": (2, 24, 15, 16, 33, 5, (2, 3), 2, 1, 1),
    "band-dilated": (1, 24, 20, 37, 50, 3, 2, 6, (3, 5), 1),
    "band-groups": (2, 32, 9, 9, 48, 3, 1, 1, 1, 2),
    "band-wide": (1, 40, 3, 700, 33, 3, 1, 1, 1, 1),
    "pointwise-deep": (3, 800, 5, 1, 20, 1, 1, 0, 1, 1),
    # The image's gradient in several bands, the weight's in several partial sums.
    "large-image": (2, 3, 260, 230, 8, 7, 2, 3, 1, 1),
}


# Those that Triton's interpreter is quick enough for.
QUICK_TO_EMULATE = [shape for shape in SHAPES if shape != "large-image"]
INTERPRETED_SHAPES = [
    *("3x3", "pointwise-strided", "strided-groups", "all-different", "depthwise-doubled", "deep"),
    *("stride-beyond-kernel", "one-pixel", "all-padding", "wide-padding", "one-row", "dilated"),
]


def with_gradients(function, arguments, geometry, grad):
    leaves = [a.detach().clone(memory_format=torch.preserve_format) for a in arguments]
    for leaf in leaves:
        leaf.requires_grad_()
    y = function(*leaves, *geometry)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(shape=INTERPRETED_SHAPES, dtype=[torch.float32, torch.bfloat16])
@pytest.mark.emulated(shape=QUICK_TO_EMULATE)
@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, memory_format):
    geometry = SHAPES[shape][6:]
    arguments = tensors(SHAPES[shape], dtype, FORMATS[memory_format])
    exact = [a.double() for a in arguments]
    grad = torch.randn_like(F.conv2d(*exact, *geometry)).to(dtype)
    truth = with_gradients(F.conv2d, exact, geometry, grad.double())
    theirs = with_gradients(F.conv2d, arguments, geometry, grad)
    ours = with_gradients(conv2d, arguments, geometry, grad)
    if dtype is torch.float64:
        absolute = with_gradients(F.conv2d, [a.abs() for a in exact], geometry, grad.abs())
        terms = max(exact[1][0].numel(), exact[1][:, 0].numel(), grad[:, 0].numel())
        for name, *values in zip(("y", "dx", "dweight", "dbias"), ours, truth, absolute):
            assert_within_rounding(*values, terms, name)
        return
    assert_as_accurate(ours[0], theirs[0], truth[0], 2, "y")
    for name, *values in zip(("dx", "dweight", "dbias"), ours[1:], theirs[1:], truth[1:]):
        assert_as_accurate(*values, 3, name)


def test_reference_is_convolution():
    for shape in ("3x3", "strided-groups", "all-different"):
        arguments = tensors(SHAPES[shape], torch.float64)
        geometry = SHAPES[shape][6:]
        torch.testing.assert_close(
            reference_conv2d(*arguments, *geometry), F.conv2d(*arguments, *geometry)
        )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry(data):
    small = st.integers(1, 3)
    groups = data.draw(small)
    batch = data.draw(st.integers(0, 3))
    channels, out = groups * data.draw(small), groups * data.draw(st.integers(1, 12))
    kernel, stride, dilation = ((data.draw(small), data.draw(small)) for _ in range(3))
    padding = (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + data.draw(st.integers(0, 9))
        for k, d, p in zip(kernel, dilation, padding)
    ]
    shape = (batch, channels, *size, out, kernel, stride, padding, dilation, groups)
    arguments = tensors(shape, torch.float64, data.draw(st.sampled_from(list(FORMATS.values()))))
    geometry = shape[6:]
    grad = torch.randn_like(F.conv2d(*arguments, *geometry))
    ours = with_gradients(conv2d, arguments, geometry, grad)
    theirs = with_gradients(F.conv2d, arguments, geometry, grad)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(2, 3), (4, 1), (5, 2)])
def test_padding_by_name(padding, kernel, finest_dtype):
    x = torch.randn(2, 3, 11, 12, dtype=finest_dtype)
    weight = torch.randn(4, 3, *kernel, dtype=finest_dtype)
    for dilation in (1, 2):
        torch.testing.assert_close(
            conv2d(x, weight, padding=padding, dilation=dilation),
            F.conv2d(x, weight, padding=padding, dilation=dilation),
        )


@pytest.mark.usefixtures("backend")
def test_one_image_without_batch():
    x, weight = torch.randn(3, 8, 8), torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(conv2d(x, weight), F.conv2d(x, weight))


@pytest.mark.usefixtures("backend")
def test_empty_batch():
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    weight, bias = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    y = conv2d(x, weight, bias)
    assert y.shape == (0, 4, 6, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (8, 1), (4, 4)])
def test_an_image_that_is_all_padding(channels, groups):
    x = torch.randn(2, channels, 0, 4, requires_grad=True)
    weight = torch.randn(8, channels // groups, 1, 1, requires_grad=True)
    bias = torch.randn(8)
    y = conv2d(x, weight, bias, padding=1, groups=groups)
    assert torch.equal(y, bias[:, None, None].expand(2, 8, 2, 6))
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_beyond_32_bits(axis, backend):
    if backend not in ("cpu", EMULATED, "cuda"):
        pytest.skip("Triton's numbers are of 32 bits")
    x, weight = torch.randn(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    far = [0, 0]
    far[axis] = 1 << 32
    if backend != "cpu":
        with pytest.raises(RuntimeError, match=r"pyvit\.conv2d: .* across a padded image"):
            conv2d(x, weight, padding=tuple(far), stride=1 << 32)
        return
    y = conv2d(x, weight, padding=tuple(far), stride=1 << 32).flatten()
    assert y.tolist() == [0, x[0, 0, 0, 0], 0]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_format_follows_torch(memory_format):
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=FORMATS[memory_format])
    weight = torch.randn(4, 3, 3, 3)
    x.requires_grad_()
    assert conv2d(x, weight).stride() == F.conv2d(x, weight).stride()
    (grad,) = torch.autograd.grad(conv2d(x, weight).sum(), x)
    assert grad.stride() == x.stride()


@pytest.mark.accuracy
def test_strided_inputs(backend):
    big = torch.randn(4, 8, 20, 22)
    views = {
        "slice": big[1:3, 2:5, 3:12, 4:15],
        "step": big[:2, ::2, ::2, ::2],
        "transposed": big[:2, :3].transpose(2, 3),
        "flipped batch": big.permute(1, 0, 2, 3)[:, :3],
        "expanded": big[:1, :3].expand(3, -1, -1, -1),
        "channels_last slice": big.contiguous(memory_format=torch.channels_last)[:, 1:4, 1:],
    }
    weights = {
        "slice": torch.randn(10, 6, 5, 5)[2:7, 1:4, 1:4, :3],
        "transposed": torch.randn(3, 5, 3, 3).transpose(0, 1),
        "channels_last": torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        "many outputs": torch.randn(40, 3, 3, 3).contiguous(memory_format=torch.channels_last),
    }
    if backend == INTERPRETED:
        weights = {"transposed": weights["transposed"]}
    for x in views.values():
        for weight in weights.values():
            channels = x.shape[1]
            w = weight[:, :1].expand(-1, channels, -1, -1) if channels != 3 else weight
            bias = torch.randn(2 * len(w))[::2]
            exact = (x.double(), w.double(), bias.double())
            grad = torch.randn_like(F.conv2d(*exact, 1, 1))
            truth = with_gradients(F.conv2d, exact, (1, 1), grad)
            theirs = with_gradients(F.conv2d, (x, w, bias), (1, 1), grad.float())
            ours = with_gradients(conv2d, (x, w, bias), (1, 1), grad.float())
            for name, *values in zip(("y", "dx", "dweight", "dbias"), ours, theirs, truth):
                assert_as_accurate(*values, 3, name)


def test_strided_gradient(finest_dtype):
    """A gradient that arrives expanded or transposed is read through its strides."""
    x = torch.randn(2, 3, 8, 8, dtype=finest_dtype, requires_grad=True)
    weight = torch.randn(9, 3, 3, 3, dtype=finest_dtype, requires_grad=True)
    for grad in (
        torch.randn(1, 1, 1, 1, dtype=finest_dtype).expand(2, 9, 8, 8),
        torch.randn(8, 8, 9, 2, dtype=finest_dtype).permute(3, 2, 1, 0),
    ):
        ours = torch.autograd.grad(conv2d(x, weight, padding=1), (x, weight), grad)
        theirs = torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), grad)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_huge_and_tiny_values(value):
    x = torch.randn(1, 3, 8, 8) * value
    weight = torch.randn(4, 3, 3, 3)
    truth = F.conv2d(x.double(), weight.double())
    assert_as_accurate(conv2d(x, weight), F.conv2d(x, weight), truth, 2)


@pytest.mark.usefixtures("backend")
def test_nan_stays_where_it_is_read():
    x = torch.randn(3, 4, 9, 9)
    x[1, 2, 4, 4] = float("nan")
    for memory_format in FORMATS.values():
        for out in (5, 40):
            weight = torch.randn(out, 4, 3, 3)
            y = conv2d(x.contiguous(memory_format=memory_format), weight, padding=1)
            expected = torch.zeros(3, out, 9, 9, dtype=torch.bool)
            expected[1, :, 3:6, 3:6] = True
            assert torch.equal(y.isnan(), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(shape=["strided-groups"])
@pytest.mark.accuracy
@pytest.mark.emulated(shape=QUICK_TO_EMULATE)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        *("stem", "small-image", "strided-groups", "depthwise", "deep", "large-image"),
        *("strips", "channel-slices", "phases", "pointwise-deep"),
    ],
)
def test_repeatable_and_batch_invariant(shape, memory_format):
    geometry = SHAPES[shape][6:]
    x, weight, bias = tensors((7, *SHAPES[shape][1:]), torch.float32, FORMATS[memory_format])
    grad = torch.randn_like(F.conv2d(x, weight, bias, *geometry))
    grad = grad.contiguous(memory_format=FORMATS[memory_format])
    first = with_gradients(conv2d, (x, weight, bias), geometry, grad)
    for _ in range(3):
        again = with_gradients(conv2d, (x, weight, bias), geometry, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = with_gradients(conv2d, (x, weight, bias), geometry, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], alone[:3])), "depends on threads"
    for i in range(7):
        one = slice(i, i + 1)
        y, dx, *_ = with_gradients(conv2d, (x[one], weight, bias), geometry, grad[one])
        assert torch.equal(y, first[0][one])
        assert torch.equal(dx, first[1][one])


def test_gradcheck():
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def convolve(x, weight, bias):
        return conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2), 2)

    assert torch.autograd.gradcheck(convolve, (x, weight, bias))
    assert torch.autograd.gradgradcheck(convolve, (x, weight, bias))


def test_only_wanted_gradients_cost():
    """For the image's gradient alone the image is not kept, nor is the weight's gradient taken."""
    kept = []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = conv2d(x, weight)
    assert [t.shape for t in kept] == [weight.shape]
    with torch.profiler.profile() as profile:
        y.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "pyvit::conv2d_input_grad" in names
    assert "pyvit::conv2d_weight_grad" not in names


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    x, weight, bias = tensors(SHAPES["strided-groups"], torch.float32)
    geometry = ([2, 2], [1, 1, 1, 1], [1, 1], 2, channels_last)
    operations = torch.ops.pyvit
    torch.library.opcheck(operations.conv2d.default, (x, weight, bias, *geometry))
    y = operations.conv2d(x, weight, bias, *geometry)
    arguments = (y, weight, list(x.shape), *geometry)
    torch.library.opcheck(operations.conv2d_input_grad.default, arguments)
    arguments = (y, x, list(weight.shape), *geometry)
    torch.library.opcheck(operations.conv2d_weight_grad.default, arguments)


def test_compile():
    x, weight, bias = tensors(SHAPES["3x3"], torch.float32)

    def loss(x, weight, bias):
        return conv2d(x, weight, bias, padding="same").relu().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager)


def test_autocast_casts_as_torch_does():
    x, weight, bias = tensors(SHAPES["3x3"], torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = conv2d(x, weight, bias), F.conv2d(x, weight, bias)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    ours.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_forward_mode_is_refused():
    """The bare op would let tangents pass as zeros."""
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        conv2d(forward_ad.make_dual(x, x), weight)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda t: conv2d(t, weight), (x,), (x,))


def test_meta_tensors():
    y = conv2d(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta"))
    assert y.shape == (2, 4, 6, 6) and y.device.type == "meta"


# batch, in channels, size, out channels, kernel, stride, padding, groups; dtype; threads
MEMORY_SHAPES = {
    "3x3": ((8, 64, 56, 64, 3, 1, 1, 1), "float32", 2),
    "3x3 on one thread": ((8, 64, 28, 64, 3, 1, 1, 1), "float64", 1),
    "stem": ((8, 3, 224, 64, 7, 2, 3, 1), "float32", 2),
    "deep": ((16, 512, 14, 512, 3, 1, 1, 1), "float32", 2),
    "half": ((8, 64, 56, 64, 3, 2, 1, 1), "bfloat16", 2),
    "depthwise": ((8, 192, 56, 192, 3, 1, 1, 192), "float32", 2),
    "depthwise, strided": ((1, 384, 112, 384, 7, 2, 3, 384), "float32", 2),
    "groups": ((8, 128, 56, 128, 3, 1, 1, 16), "float32", 2),
    "few pixels": ((2, 1024, 7, 1024, 3, 1, 1, 1), "float32", 2),
    "few outputs": ((8, 64, 112, 2, 3, 1, 1, 1), "float32", 2),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", MEMORY_SHAPES)
def test_no_column_matrix_in_memory(shape, memory_format):
    """Peak memory of forward and backward: results, and at most 2 MB a thread."""
    sizes, dtype, threads = MEMORY_SHAPES[shape]
    batch, channels, size, out, kernel, stride, padding, groups = sizes
    out_size = (size + 2 * padding - kernel) // stride + 1
    weight_size = (out, channels // groups, kernel, kernel)
    setup = f"""
        from pyvit.ops import conv2d
        dtype, layout = torch.{dtype}, {FORMATS[memory_format]}
        geometry = dict(stride={stride}, padding={padding}, groups={groups})
        x = torch.randn({batch}, {channels}, {size}, {size}).to(dtype, memory_format=layout)
        weight = torch.randn({weight_size}).to(dtype).requires_grad_()
        # The same code on a small input: threads started, libraries paged in.
        part = x[:1, :, :8, :8].clone().requires_grad_()
        small = conv2d(part, weight, **geometry)
        torch.autograd.grad(small, (part, weight), torch.ones_like(small))
        grad = torch.randn({batch}, {out}, {out_size}, {out_size}).to(dtype, memory_format=layout)
        x.requires_grad_()
    """
    work = """
        y = conv2d(x, weight, **geometry)
        results = torch.autograd.grad(y, (x, weight), grad)
    """
    values = batch * channels * size**2 + batch * out * out_size**2 + math.prod(weight_size)
    results = values * torch.finfo(getattr(torch, dtype)).bits // 8
    # Column matrices would take 14 to 236 MB; packed weights of the few pixels 38 MB.
    extra = peak_extra_bytes(setup, work, threads) - results
    assert extra <= threads * 2**21, f"{extra / 2**20:.1f} MB"


BAD_CALLS = {
    "x is a list": (TypeError, "x", dict(x=[1.0])),
    "x of integers": (TypeError, "x", dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.int64))),
    "x complex": (TypeError, "x", dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.complex64))),
    "x of 2 dimensions": (ValueError, "x", dict(x=torch.zeros(8, 8))),
    "x of 5 dimensions": (ValueError, "x", dict(x=torch.zeros(1, 1, 3, 8, 8))),
    "x sparse": (NotImplementedError, "x", dict(x=torch.zeros(1, 3, 8, 8).to_sparse())),
    "x of other channels": (ValueError, "x", dict(x=torch.zeros(1, 4, 8, 8))),
    "x too small": (ValueError, "x", dict(x=torch.zeros(1, 3, 2, 8))),
    "x too narrow": (ValueError, "x", dict(x=torch.zeros(1, 3, 8, 2))),
    "weight missing": (TypeError, "weight", dict(weight=None)),
    "weight of 3 dimensions": (ValueError, "weight", dict(weight=torch.zeros(4, 3, 3))),
    "weight of another dtype": (TypeError, "weight", dict(weight=torch.zeros(4, 3, 3, 3).double())),
    "weight on another device": (
        ValueError,
        "weight",
        dict(weight=torch.zeros(4, 3, 3, 3, device="meta")),
    ),
    "weight without rows": (ValueError, "weight", dict(weight=torch.zeros(4, 3, 0, 3))),
    "bias of another length": (ValueError, "bias", dict(bias=torch.zeros(5))),
    "bias of 2 dimensions": (ValueError, "bias", dict(bias=torch.zeros(1, 4))),
    "bias of another dtype": (TypeError, "bias", dict(bias=torch.zeros(4).half())),
    "bias is a number": (TypeError, "bias", dict(bias=0.5)),
    "stride 0": (ValueError, "stride", dict(stride=0)),
    "stride of one half": (TypeError, "stride", dict(stride=0.5)),
    "stride of three": (ValueError, "stride", dict(stride=(1, 1, 1))),
    "stride is True": (TypeError, "stride", dict(stride=True)),
    "padding negative": (ValueError, "padding", dict(padding=-1)),
    "padding by a wrong name": (ValueError, "padding", dict(padding="full")),
    "padding is None": (TypeError, "padding", dict(padding=None)),
    "same with a stride": (ValueError, "stride", dict(padding="same", stride=2)),
    "dilation 0": (ValueError, "dilation", dict(dilation=(1, 0))),
    "dilation too wide": (ValueError, "x", dict(dilation=4)),
    "groups 0": (ValueError, "groups", dict(groups=0)),
    "groups not a divisor": (ValueError, "groups", dict(groups=3, x=torch.zeros(1, 9, 8, 8))),
    "groups of one half": (TypeError, "groups", dict(groups=0.5)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    error, argument, changed = BAD_CALLS[case]
    arguments = dict(x=torch.zeros(1, 3, 8, 8), weight=torch.zeros(4, 3, 3, 3)) | changed
    with pytest.raises(error, match=rf"pyvit\.conv2d: `{argument}` must be .*; got "):
        conv2d(**arguments)
