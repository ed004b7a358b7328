"""patch_embed: results and gradients, in any layout and geometry."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate, assert_within_rounding
from backends import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_embed_checks import (
    DTYPES,
    FORMATS,
    IMAGES,
    INTERPRETED_SHAPES,
    NAMES,
    SHAPES,
    arguments_of,
    doubled,
    magnitudes,
    with_gradients,
)

from pyvit.ops import patch_embed
from pyvit.reference.patch_embed import patch_embed as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@pytest.mark.interpreted(shape=INTERPRETED_SHAPES, dtype=[torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("image_kind", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype, image_kind):
    stride = SHAPES[shape][-1]
    arguments = arguments_of(SHAPES[shape], dtype, image_kind)
    exact = doubled(arguments)
    grad = torch.randn_like(reference(*exact[:3], cls_token=exact[4], stride=stride)).to(dtype)
    truth = with_gradients(reference, exact, stride, grad.double())
    ours = with_gradients(patch_embed, arguments, stride, grad)
    assert ours.keys() == truth.keys()
    absolute = with_gradients(reference, magnitudes(exact), stride, grad.double().abs())
    if dtype is torch.float64:
        # The longest sum is of a pixel's patches and features, then over all pixels (mean, std).
        terms = arguments[1].numel() + arguments[0].numel()
        for name in truth:
            assert_within_rounding(ours[name], truth[name], absolute[name], terms, name)
        return
    theirs = with_gradients(reference, arguments, stride, grad)
    for name in truth:
        factor = 2 if name == "tokens" else 3
        if name == "std" and dtype is torch.float32:
            # Three numbers: PyTorch's error is a matter of luck. Ours has one long float32 sum,
            # over the patches; the factors before it and the sum after it add a few roundings.
            terms = grad[..., 0].numel() + 8
            assert_within_rounding(ours[name], truth[name], absolute[name], terms, name)
            continue
        assert_as_accurate(ours[name], theirs[name], truth[name], factor, name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry(data):
    small = st.integers(1, 9)
    patch = (data.draw(small), data.draw(small))
    stride = data.draw(st.none() | st.tuples(small, small))
    size = [p + data.draw(st.integers(0, 20)) for p in patch]
    batch, channels, dim = (data.draw(st.integers(low, 5)) for low in (0, 1, 1))
    shape = (batch, channels, *size, dim * data.draw(st.integers(1, 9)), patch, stride)
    arguments = arguments_of(
        shape, torch.float64, data.draw(st.sampled_from(IMAGES)), data.draw(st.booleans())
    )
    for i in range(2, 7):  # any of the optional arguments may be absent
        if i != 4 and data.draw(st.booleans()):
            arguments[i] = None
    tokens = reference(*arguments[:3], cls_token=arguments[4], stride=stride)
    grad = torch.randn_like(tokens)
    ours = with_gradients(patch_embed, arguments, stride, grad)
    theirs = with_gradients(reference, arguments, stride, grad)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("with_batch_axis", [False, True])
def test_shapes_of_position_and_class_token(with_batch_axis, finest_dtype):
    image, weight, bias, pos_embed, cls_token, *_ = arguments_of(SHAPES["wide"], finest_dtype)
    expected = reference(image, weight, bias, pos_embed=pos_embed, cls_token=cls_token)
    if not with_batch_axis:
        pos_embed, cls_token = pos_embed[0], cls_token[0, 0]
    tokens = patch_embed(image, weight, bias, pos_embed=pos_embed, cls_token=cls_token)
    torch.testing.assert_close(tokens, expected)


@pytest.mark.usefixtures("backend")
def test_mean_and_std_as_numbers():
    image, weight, *_ = arguments_of(SHAPES["uncovered edge"], torch.float32)
    mean, std = (0.485, 0.456, 0.406), [0.229, 0.224, 1]
    tokens = patch_embed(image, weight, mean=mean, std=std)
    as_tensors = patch_embed(image, weight, mean=torch.tensor(mean), std=torch.tensor(std))
    assert torch.equal(tokens, as_tensors)
    only_mean = patch_embed(image, weight, mean=mean)
    torch.testing.assert_close(only_mean, reference(image, weight, mean=torch.tensor(mean)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_mean_and_std_of_another_dtype(dtype):
    """A module moved to bfloat16 moves its buffers too; they are still computed in float32."""
    image, weight, *_, mean, std = arguments_of(SHAPES["wide"], torch.float32)
    mean, std = (t.to(dtype).requires_grad_() for t in (mean, std))
    tokens = patch_embed(image, weight, mean=mean, std=std)
    torch.testing.assert_close(tokens, reference(image, weight, mean=mean, std=std))
    tokens.sum().backward()
    assert mean.grad.dtype == std.grad.dtype == dtype


@pytest.mark.usefixtures("backend")
def test_empty_batch():
    arguments = arguments_of((0, *SHAPES["wide"][1:]), torch.float32)
    results = with_gradients(patch_embed, arguments, None, torch.zeros(0, 10, 300))
    assert results["tokens"].shape == (0, 10, 300)
    for name, value in zip(NAMES, arguments):
        assert results[name].shape == value.shape
        assert not results[name].any()


@pytest.mark.interpreted(shape=["overlapping"])
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", ["wide", "overlapping"])
def test_gradients_keep_their_format(shape, memory_format):
    arguments = arguments_of(SHAPES[shape], torch.float32, memory_format)
    arguments[1] = arguments[1].contiguous(memory_format=FORMATS[memory_format])
    grad = torch.randn_like(reference(*arguments[:2], stride=SHAPES[shape][-1]))
    arguments[2:5] = [None] * 3
    results = with_gradients(patch_embed, arguments, SHAPES[shape][-1], grad)
    assert results["tokens"].is_contiguous()
    assert results["image"].stride() == arguments[0].stride()
    assert results["weight"].stride() == arguments[1].stride()


@pytest.mark.accuracy
def test_strided_inputs(backend):
    big = torch.rand(4, 8, 40, 44)
    views = {
        "slice": big[1:3, 2:5, 3:33, 4:37],
        "step": big[:2, :6:2, ::2, ::2],
        "transposed": big[:2, :3].transpose(2, 3),
        "batch and channel swapped": big.permute(1, 0, 2, 3)[:, :3],
        "expanded": big[:1, :3].expand(3, -1, -1, -1),
        "channels_last slice": big.contiguous(memory_format=torch.channels_last)[:, 1:4, 1:],
        "bytes": (big * 255).to(torch.uint8)[:, 1:4, 1::2, ::2],
    }
    weights = {
        "slice": torch.randn(80, 6, 9, 9)[2:72:2, 1:4, 1:8, :8],
        "transposed": torch.randn(3, 35, 8, 7).transpose(0, 1).transpose(2, 3),
        "channels_last": torch.randn(35, 3, 7, 8).contiguous(memory_format=torch.channels_last),
    }
    if backend == INTERPRETED:
        weights = {"slice": weights["slice"]}
    terms = torch.randn(35, 500)
    for name, image in views.items():
        for weight in weights.values():
            rows, columns = ((n - p) // p + 1 for n, p in zip(image.shape[2:], (7, 8)))
            position = terms[:, : rows * columns + 1].T
            arguments = [image, weight, terms[:, 0], position, terms[:, 1], *torch.rand(3, 2).T + 1]
            exact = doubled(arguments)
            grad = torch.randn(35, rows * columns + 1, len(image)).permute(2, 1, 0)
            wanted = NAMES[:5]
            truth = with_gradients(reference, exact, None, grad.double(), wanted)
            theirs = with_gradients(reference, arguments, None, grad, wanted)
            ours = with_gradients(patch_embed, arguments, None, grad, wanted)
            for key in truth:
                assert_as_accurate(ours[key], theirs[key], truth[key], 3, f"{key} of {name}")


def test_expanded_gradient(finest_dtype):
    """The gradient of a plain sum has strides of 0."""
    arguments = arguments_of(SHAPES["patch 14"], finest_dtype)
    grad = torch.ones(1, 1, 1, dtype=finest_dtype).expand(2, 7, 33)
    ours = with_gradients(patch_embed, arguments, None, grad)
    theirs = with_gradients(reference, arguments, None, grad)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_huge_and_tiny_values(value):
    image, weight, *_ = arguments_of(SHAPES["wide"], torch.float32)
    image = image * value
    truth = reference(image.double(), weight.double())
    assert_as_accurate(patch_embed(image, weight), reference(image, weight), truth, 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_stays_in_its_token(memory_format):
    arguments = arguments_of(SHAPES["patch 14"], torch.float32, memory_format)
    arguments[0][1, 2, 15, 3] = float("nan")
    tokens = with_gradients(patch_embed, arguments, None)["tokens"]
    expected = torch.zeros(2, 7, 33, dtype=torch.bool)
    expected[1, 1 + 3] = True
    assert torch.equal(tokens.isnan(), expected)


@pytest.mark.interpreted(shape=["grey digits"])
@pytest.mark.usefixtures("backend")
@pytest.mark.accuracy
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", ["wide", "grey digits", "uncovered edge", "overlapping", "gaps"])
def test_repeatable_and_batch_invariant(shape, memory_format):
    stride = SHAPES[shape][-1]
    arguments = arguments_of((7, *SHAPES[shape][1:]), torch.float32, memory_format)
    grad = torch.randn_like(reference(*arguments[:3], cls_token=arguments[4], stride=stride))
    first = with_gradients(patch_embed, arguments, stride, grad)
    for _ in range(3):
        again = with_gradients(patch_embed, arguments, stride, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = with_gradients(patch_embed, arguments, stride, grad)
    finally:
        torch.set_num_threads(threads)
    for name in ("tokens", "image", "weight"):
        assert torch.equal(first[name], alone[name]), f"{name} depends on threads"
    for i in range(7):
        one = slice(i, i + 1)
        results = with_gradients(
            patch_embed, [arguments[0][one], *arguments[1:]], stride, grad[one]
        )
        assert torch.equal(results["tokens"], first["tokens"][one])
        assert torch.equal(results["image"], first["image"][one])


def test_weight_gradient_of_a_large_batch_is_repeatable():
    """The sum over many pixels is cut into parts, whose order must not depend on threads."""
    arguments = arguments_of((64, 1, 32, 32, 16, (2, 2), None), torch.float32)
    grad = torch.randn(64, 257, 16)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(with_gradients(patch_embed, arguments, None, grad)["weight"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    truth = with_gradients(reference, doubled(arguments), None, grad.double())["weight"]
    theirs = with_gradients(reference, arguments, None, grad)["weight"]
    assert_as_accurate(results[0], theirs, truth, 3, "weight")
