"""patch_embed as a PyTorch op: autograd, tracing, autocast, memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from memory import peak_extra_bytes
from patch_embed_checks import FORMATS, IMAGES, NAMES, SHAPES, arguments_of, with_gradients
from torch.autograd import forward_ad

from pyvit.ops import patch_embed

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


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


def test_more_patches_than_a_gpu_kernel_counts(backend):
    if "cuda" not in backend:
        pytest.skip("the other kernels count further")
    with torch.device("cuda" if backend == "cuda" else "cpu"):
        grad, image = (torch.zeros(1).expand(1 << 31, *[1] * n) for n in (2, 3))
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31 patches"):
        torch.ops.pyvit.patch_embed_weight_grad(grad, image, None, None, [1] * 4, [1, 1], False)
