from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate, assert_within_rounding
from backends import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_extra_bytes
from torch.autograd import forward_ad

from pyvit.ops import patch_embed
from pyvit.reference.patch_embed import patch_embed as reference

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = [*FORMATS, "uint8"]

# batch, channels, height, width, embed dim, patch, stride
SHAPES = {
    "vit": (1, 3, 224, 224, 192, (16, 16), None),
    "wide": (1, 3, 48, 48, 300, (16, 16), None),
    "patch 14": (2, 3, 28, 42, 33, (14, 14), None),
    "grey digits": (3, 1, 8, 8, 64, (2, 2), None),
    "uncovered edge": (2, 3, 33, 30, 19, (4, 7), None),
    "one pixel": (3, 3, 1, 1, 5, (1, 1), None),
    "one patch": (2, 3, 9, 10, 17, (9, 10), None),
    "overlapping": (2, 3, 30, 31, 17, (7, 7), (5, 3)),
    "gaps": (2, 2, 40, 23, 9, (3, 2), (4, 6)),
    "wide gaps": (1, 3, 40, 90, 9, (2, 2), (9, 70)),
    "half overlapping": (2, 9, 20, 21, 40, (4, 4), (6, 2)),
    "large patch": (1, 2, 6, 600, 33, (2, 300), (2, 100)),
    # Sums longer than one packed slice, in the result's own memory: over elements, then features
    # and patches.
    "large patches": (1, 3, 144, 144, 32, (24, 24), None),
    "many of all": (1, 3, 264, 264, 1056, (8, 8), None),
}
# Those that Triton's interpreter is quick enough for.
INTERPRETED_SHAPES = [
    *("patch 14", "grey digits", "uncovered edge", "one pixel", "one patch", "overlapping", "gaps"),
    *("wide gaps",),
]
NAMES = ("image", "weight", "bias", "pos_embed", "cls_token", "mean", "std")


def arguments_of(shape, dtype, image_kind="nchw", class_token=True):
    """Leaves for every gradient, in the order of NAMES; mean and std are float32 or float64."""
    batch, channels, height, width, dim, patch, stride = shape
    stride = stride or patch
    rows, columns = ((n - p) // s + 1 for n, p, s in zip((height, width), patch, stride))
    if image_kind == "uint8":
        image = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8)
    else:
        image = torch.rand(batch, channels, height, width).to(dtype)
        image = image.contiguous(memory_format=FORMATS[image_kind])
    weight = torch.randn(dim, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5
    of_pixels = torch.float64 if dtype is torch.float64 else torch.float32
    return [
        image,
        weight.to(dtype),
        torch.randn(dim).to(dtype),
        torch.randn(1, rows * columns + class_token, dim).to(dtype),
        torch.randn(1, 1, dim).to(dtype) if class_token else None,
        torch.rand(channels, dtype=of_pixels),
        torch.rand(channels, dtype=of_pixels) + 0.5,
    ]


def with_gradients(function, arguments, stride, grad=None, wanted=NAMES):
    """{"tokens": result, and the gradient of every floating argument in wanted}."""
    leaves = {}
    for name, value in zip(NAMES, arguments):
        if value is not None:
            value = value.detach().clone(memory_format=torch.preserve_format)
            value.requires_grad_(value.is_floating_point() and name in wanted)
        leaves[name] = value
    options = {name: value for name, value in leaves.items() if name not in NAMES[:3]}
    y = function(*[leaves[name] for name in NAMES[:3]], **options, stride=stride)
    results = {"tokens": y.detach()}
    with_grad = {n: v for n, v in leaves.items() if v is not None and v.requires_grad}
    if grad is not None and with_grad:
        gradients = torch.autograd.grad(y, list(with_grad.values()), grad)
        results |= dict(zip(with_grad, gradients))
    return results


def doubled(arguments):
    return [a.double() if a is not None and a.is_floating_point() else a for a in arguments]


def magnitudes(arguments):
    """Arguments whose every product is the absolute value of the one in `arguments`."""
    image, weight, bias, pos_embed, cls_token, mean, std = arguments
    image = image / 255 if image.dtype == torch.uint8 else image
    image = (image - mean.reshape(-1, 1, 1)).abs()
    others = [None if a is None else a.abs() for a in (weight, bias, pos_embed, cls_token)]
    return [image.double(), *others, torch.zeros_like(mean), std]


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


@pytest.mark.parametrize("stride", [None, 2, (3, 5)])
@pytest.mark.parametrize("class_token", [False, True])
def test_gradcheck(class_token, stride):
    shape = (2, 2, 7, 8, 3, (3, 4), (stride, stride) if stride == 2 else stride)
    arguments = [a for a in arguments_of(shape, torch.float64, class_token=class_token)]
    present = {n: a.requires_grad_() for n, a in zip(NAMES, arguments) if a is not None}

    def embed(*values):
        return patch_embed(**dict(zip(present, values)), stride=stride)

    assert torch.autograd.gradcheck(embed, tuple(present.values()))


def test_gradcheck_of_normalised_bytes():
    arguments = arguments_of((2, 2, 7, 8, 3, (3, 4), None), torch.float64, "uint8")
    present = {n: a.requires_grad_() for n, a in list(zip(NAMES, arguments))[1:]}

    def embed(*values):
        return patch_embed(arguments[0], **dict(zip(present, values)))

    assert torch.autograd.gradcheck(embed, tuple(present.values()))


def test_second_derivative_is_refused():
    image, weight, *_ = arguments_of(SHAPES["wide"], torch.float32)
    image.requires_grad_()
    for value in (torch.square, torch.clone):  # the second derivative of one is zero, all the same
        tokens = value(patch_embed(image, weight))
        (grad,) = torch.autograd.grad(tokens.sum(), image, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"pyvit\.patch_embed: second derivatives"):
            grad.sum().backward()


SAVED = {
    "image": {"weight", "std"},
    "weight": {"image", "mean", "std"},
    "bias": set(),
    "pos_embed": set(),
    "cls_token": set(),
    "mean": {"weight", "mean", "std"},
    "std": {"image", "weight", "mean", "std"},
}


@pytest.mark.parametrize("wanted", SAVED)
def test_only_wanted_gradients_cost(wanted):
    """Nothing is kept, and no kernel runs, for a gradient that nobody asked for."""
    arguments = dict(zip(NAMES, arguments_of(SHAPES["uncovered edge"], torch.float32)))
    arguments[wanted].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tokens = patch_embed(**arguments)
    names = {name for t in kept for name, a in arguments.items() if a.data_ptr() == t.data_ptr()}
    assert names == SAVED[wanted] and len(kept) == len(names)
    with torch.profiler.profile() as profile:
        tokens.sum().backward()
    kernels = {e.key for e in profile.key_averages() if e.key.startswith("pyvit::")}
    of_pixels, of_weight = "pyvit::patch_embed_image_grad", "pyvit::patch_embed_weight_grad"
    expected = {"image": {of_pixels}, "weight": {of_weight}, "std": {of_weight}}
    assert kernels == expected.get(wanted, set())
    assert [n for n, a in arguments.items() if a.grad is not None] == [wanted]


def test_no_function_without_gradients():
    image, weight, *_ = arguments_of(SHAPES["wide"], torch.float32)
    assert patch_embed(image, weight).grad_fn is None
    with torch.no_grad():
        assert patch_embed(image, weight.requires_grad_()).grad_fn is None


@pytest.mark.parametrize("image_kind", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, image_kind):
    arguments = arguments_of(SHAPES["uncovered edge"], dtype, image_kind)
    image, weight, bias, pos_embed, cls_token, mean, std = arguments
    operations = torch.ops.pyvit
    rows = (pos_embed[0], cls_token[0, 0])
    for optional in ((bias, *rows, mean, std), (None, None, None, None, None)):
        forward = (image, weight, *optional, [4, 7])
        torch.library.opcheck(operations.patch_embed.default, forward)
    grad = operations.patch_embed(image, weight, bias, *rows, mean, std, [4, 7])
    last = image_kind == "channels_last"
    torch.library.opcheck(
        operations.patch_embed_image_grad.default,
        (grad, weight, std, list(image.shape), [4, 7], last),
    )
    torch.library.opcheck(
        operations.patch_embed_weight_grad.default,
        (grad, image, mean, std, list(weight.shape), [4, 7], last),
    )


@pytest.mark.parametrize("shape", ["uncovered edge", "overlapping"])
def test_compile(shape):
    arguments = arguments_of(SHAPES[shape], torch.float32)

    def loss(*values):
        tokens = patch_embed(**dict(zip(NAMES, values)), stride=SHAPES[shape][-1])
        return tokens.relu().square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [a.clone().requires_grad_() for a in arguments]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager)


def test_compile_with_numbers_for_mean():
    image, weight, *_ = arguments_of(SHAPES["wide"], torch.float32)

    def embed(image, weight):
        return patch_embed(image, weight, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 1.0))

    compiled = torch.compile(embed, fullgraph=True)
    torch.testing.assert_close(compiled(image, weight), embed(image, weight))


@pytest.mark.parametrize("image_kind", ["nchw", "uint8"])
def test_autocast_casts_as_conv2d(image_kind):
    arguments = arguments_of(SHAPES["wide"], torch.float32, image_kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = with_gradients(patch_embed, arguments, None, torch.ones(1, 10, 300).bfloat16())
    assert results["tokens"].dtype == torch.bfloat16
    lowered = [a.bfloat16() if a.is_floating_point() else a for a in arguments[:5]]
    expected = with_gradients(patch_embed, [*lowered, *arguments[5:]], None)["tokens"]
    assert torch.equal(results["tokens"], expected)
    for name, value in zip(NAMES, arguments):
        if value.is_floating_point():
            assert results[name].dtype == torch.float32


def test_forward_mode_is_refused():
    """The bare op would let tangents pass as zeros."""
    image, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        patch_embed(forward_ad.make_dual(image, image), weight)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda t: patch_embed(t, weight), (image,), (image,))


def test_meta_tensors():
    image = torch.empty(2, 3, 32, 32, device="meta", dtype=torch.uint8)
    tokens = patch_embed(
        image,
        torch.empty(64, 3, 8, 8, device="meta"),
        cls_token=torch.empty(64, device="meta"),
        mean=[0.5] * 3,
    )
    assert tokens.shape == (2, 17, 64) and tokens.device.type == "meta"


@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_intermediate_tensor_in_memory(memory_format):
    """Peak memory of forward and image gradient: results, and at most 2 MB a thread."""
    threads = 2
    setup = f"""
        from pyvit.ops import patch_embed
        image = torch.rand(16, 3, 224, 224).contiguous(memory_format={FORMATS[memory_format]})
        weight, token = torch.randn(256, 3, 16, 16), torch.randn(256)
        position, grad = torch.randn(197, 256), torch.randn(16, 197, 256)
        def embed(image, position):
            return patch_embed(image, weight, token, pos_embed=position, cls_token=token,
                               mean=[0.5] * 3, std=[0.5] * 3)
        # The same code on a small input: threads started, libraries paged in.
        small = image[:1, :, :64, :64].clone().requires_grad_()
        torch.autograd.grad(embed(small, position[:17]), small, grad[:1, :17])
        image.requires_grad_()
    """
    work = """
        tokens = embed(image, position)
        results = torch.autograd.grad(tokens, image, grad)
    """
    results = (16 * 197 * 256 + 16 * 3 * 224 * 224) * 4
    extra = peak_extra_bytes(setup, work, threads) - results
    assert extra <= threads * 2**21, f"{extra / 2**20:.1f} MB"  # the image normalised: 9.2 MB


def zeros(*size, **options):
    return torch.zeros(size, **options)


BAD_CALLS = {
    "image is a list": (TypeError, "image", dict(image=[1.0])),
    "image of int64": (TypeError, "image", dict(image=zeros(1, 3, 8, 8, dtype=torch.int64))),
    "image complex": (TypeError, "image", dict(image=zeros(1, 3, 8, 8, dtype=torch.complex64))),
    "image of 3 dimensions": (ValueError, "image", dict(image=zeros(3, 8, 8))),
    "image sparse": (NotImplementedError, "image", dict(image=zeros(1, 3, 8, 8).to_sparse())),
    "image of other channels": (ValueError, "image", dict(image=zeros(1, 4, 8, 8))),
    "image of another dtype": (TypeError, "image", dict(image=zeros(1, 3, 8, 8).double())),
    "image too low": (ValueError, "image", dict(image=zeros(1, 3, 3, 8))),
    "image too narrow": (ValueError, "image", dict(image=zeros(1, 3, 8, 3))),
    "image on another device": (
        ValueError,
        "image",
        dict(image=zeros(1, 3, 8, 8, dtype=torch.uint8, device="meta")),
    ),
    "weight missing": (TypeError, "weight", dict(weight=None)),
    "weight of bytes": (TypeError, "weight", dict(weight=zeros(5, 3, 4, 4).byte())),
    "weight of 2 dimensions": (ValueError, "weight", dict(weight=zeros(5, 48))),
    "weight without rows": (ValueError, "weight", dict(weight=zeros(5, 3, 0, 4))),
    "weight without features": (ValueError, "weight", dict(weight=zeros(0, 3, 4, 4))),
    "bias of another length": (ValueError, "bias", dict(bias=zeros(6))),
    "bias of 2 dimensions": (ValueError, "bias", dict(bias=zeros(1, 5))),
    "bias of another dtype": (TypeError, "bias", dict(bias=zeros(5).half())),
    "pos_embed of too few rows": (ValueError, "pos_embed", dict(pos_embed=zeros(3, 5))),
    "pos_embed with a row too many": (ValueError, "pos_embed", dict(pos_embed=zeros(5, 5))),
    "pos_embed without the class token's row": (
        ValueError,
        "pos_embed",
        dict(pos_embed=zeros(4, 5), cls_token=zeros(5)),
    ),
    "pos_embed of a batch": (ValueError, "pos_embed", dict(pos_embed=zeros(2, 4, 5))),
    "pos_embed of 1 dimension": (ValueError, "pos_embed", dict(pos_embed=zeros(20))),
    "pos_embed of another dtype": (TypeError, "pos_embed", dict(pos_embed=zeros(4, 5).double())),
    "cls_token of 2 dimensions": (ValueError, "cls_token", dict(cls_token=zeros(1, 5))),
    "cls_token of a batch": (ValueError, "cls_token", dict(cls_token=zeros(2, 1, 5))),
    "cls_token of another length": (ValueError, "cls_token", dict(cls_token=zeros(4))),
    "cls_token is True": (TypeError, "cls_token", dict(cls_token=True)),
    "mean of another length": (ValueError, "mean", dict(mean=[0.5])),
    "mean is a number": (TypeError, "mean", dict(mean=0.5)),
    "mean of strings": (TypeError, "mean", dict(mean=["0.5"] * 3)),
    "mean is a string": (TypeError, "mean", dict(mean="abc")),
    "mean infinite": (ValueError, "mean", dict(mean=[0.5, float("inf"), 0.5])),
    "mean of 3 dimensions": (ValueError, "mean", dict(mean=zeros(3, 1, 1))),
    "mean on another device": (ValueError, "mean", dict(mean=zeros(3, device="meta"))),
    "std zero": (ValueError, "std", dict(std=[1.0, 0.0, 1.0])),
    "std negative": (ValueError, "std", dict(std=[1.0, 1.0, -1.0])),
    "std of integers": (TypeError, "std", dict(std=torch.ones(3, dtype=torch.int64))),
    "std tensor of another length": (ValueError, "std", dict(std=torch.ones(4))),
    "stride 0": (ValueError, "stride", dict(stride=0)),
    "stride of one half": (TypeError, "stride", dict(stride=0.5)),
    "stride of three": (ValueError, "stride", dict(stride=(1, 1, 1))),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    error, argument, changed = BAD_CALLS[case]
    arguments = dict(image=zeros(1, 3, 8, 8), weight=zeros(5, 3, 4, 4)) | changed
    with pytest.raises(error, match=rf"pyvit\.patch_embed: `{argument}` must be .*; got "):
        patch_embed(**arguments)
