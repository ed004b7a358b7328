"""linear() and nn.Linear: torch's layer, a row's bits independent of the other rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_within_rounding
from memory import peak_extra_bytes
from torch import nn

import pyvit
from pyvit.nn import Linear
from pyvit.ops import linear

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# rows (any leading shape), inputs, outputs
SIZES = [
    ((2, 197), 192, 576),
    ((50,), 768, 192),
    ((3, 5, 7), 20, 33),
    ((), 9, 7),
    ((1,), 300, 300),
    ((3,), 1030, 16),
    ((40,), 16, 1),
    ((40,), 1, 16),
]


def arguments(rows, inputs, outputs, dtype, bias=True):
    x, weight = torch.randn(*rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
    return [t.to(dtype) for t in (x, weight, *([torch.randn(outputs)] if bias else []))]


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(bias=[True], size=SIZES[2:], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.accuracy
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients_are_as_accurate_as_torchs(size, dtype, bias):
    given = [t.requires_grad_() for t in arguments(*size, dtype, bias)]
    exact = [t.detach().double().requires_grad_() for t in given]
    truth = F.linear(*exact)
    ours, theirs = linear(*given), F.linear(*given)
    assert ours.dtype is dtype
    assert ours.is_contiguous()
    grad = torch.randn(truth.shape).to(dtype)
    wanted = torch.autograd.grad(truth, exact, grad.double())
    our_grads = torch.autograd.grad(ours, given, grad)
    their_grads = torch.autograd.grad(theirs, given, grad)
    if dtype is torch.float64:
        absolute = F.linear(*(t.abs() for t in exact))
        assert_within_rounding(ours, truth, absolute, size[1] + 1)
        for a, b in zip(our_grads, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        return
    assert_as_accurate(ours, theirs, truth, 2)
    names = ("x", "weight", "bias")
    for name, a, b, c in zip(names, our_grads, their_grads, wanted, strict=False):
        assert_as_accurate(a, b, c, 3, f"gradient of {name}")


@pytest.mark.usefixtures("backend")
@pytest.mark.interpreted(size=[(100, 10), (7, 1000)], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(192, 576), (768, 192), (3072, 64), (100, 10), (7, 1000)])
def test_a_row_is_the_same_bits_among_any_others(size, dtype):
    """Also 1, 2 and 3 rows, and in the gradient of x; and with any number of threads."""
    x, weight, bias = arguments((41,), *size, dtype)
    grad = torch.randn(41, size[1]).to(dtype)

    def results(rows):
        given = x[rows].clone().requires_grad_()
        y = linear(given, weight, bias)
        return y.detach(), torch.autograd.grad(y, given, grad[rows])[0]

    everything = results(slice(None))
    for rows in (slice(0, 1), slice(5, 7), slice(38, 41), slice(3, 7), slice(2, 31)):
        for part, whole in zip(results(rows), everything, strict=True):
            assert torch.equal(part, whole[rows]), rows
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        for a, b in zip(results(slice(None)), everything, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("backend")
def test_any_strides_and_shapes():
    weight, bias = torch.randn(6, 5), torch.randn(6)
    base = torch.randn(4, 7, 5)
    for x in (
        base.transpose(0, 1),
        base[:, 0],
        base[:, ::2],
        torch.randn(5, 9).t(),
        torch.randn(3, 5).expand(4, 3, 5),
        torch.randn(4, 10)[:, ::2],
    ):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    x = torch.randn(8, 5)
    wide = torch.randn(5, 6).t()
    torch.testing.assert_close(linear(x, wide, bias), F.linear(x, wide, bias))
    for empty in ((0, 5), (3, 0, 5)):
        x = torch.randn(empty, requires_grad=True)
        y = linear(x, weight.requires_grad_(), bias)
        assert y.shape == (*empty[:-1], 6)
        grads = torch.autograd.grad(y.sum(), (x, weight))
        assert grads[0].shape == empty
        assert torch.equal(grads[1], torch.zeros_like(weight))


def test_second_derivatives():
    given = [t.double().requires_grad_() for t in arguments((3, 4), 5, 6, torch.float64)]
    assert torch.autograd.gradcheck(linear, given)
    assert torch.autograd.gradgradcheck(linear, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight, bias = arguments((2, 5), 6, 7, dtype)
    torch.library.opcheck(torch.ops.pyvit.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.pyvit.linear.default, (x[:, 0], weight, None))
    grad = torch.randn(2, 5, 7).to(dtype)
    torch.library.opcheck(torch.ops.pyvit.linear_weight_grad.default, (grad, x))


def test_only_wanted_gradients_are_kept_for():
    x, weight, bias = arguments((8,), 5, 6, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x.requires_grad_(), weight, bias)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_autocast_and_compile():
    x, weight, bias = (t.requires_grad_() for t in arguments((2, 9), 12, 10, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    assert y.dtype is torch.bfloat16
    assert torch.autograd.grad(y.sum(), x)[0].dtype is torch.float32

    def loss(x, weight, bias):
        return linear(x, weight, bias).sin().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias)),
        torch.autograd.grad(loss(x, weight, bias), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(x=[1.0]), TypeError, r"pyvit\.linear: `x` must be a torch\.Tensor; got list"),
        (dict(x=torch.zeros(3, 4)), ValueError, r"`x` must be of width 5 .*\(3, 4\)"),
        (dict(x=torch.tensor(1.0)), ValueError, r"`x` must be of width 5"),
        (dict(x=torch.zeros(3, 5, dtype=torch.int64)), TypeError, "`x` must be of dtype"),
        (dict(weight=torch.zeros(5)), ValueError, "`weight` must be a tensor of 2 dimensions"),
        (dict(weight=torch.zeros(6, 0)), ValueError, "at least one input feature"),
        (dict(weight=torch.zeros(6, 5).double()), TypeError, "`weight` must be of `x`'s dtype"),
        (dict(bias=torch.zeros(5)), ValueError, r"`bias` must be of shape \(6,\)"),
        (dict(bias=torch.zeros(6, 1)), ValueError, "`bias` must be a tensor of 1 dimensions"),
    ],
)
def test_bad_calls_say_what_is_wrong(change, kind, message):
    given = dict(x=torch.zeros(3, 5), weight=torch.zeros(6, 5), bias=torch.zeros(6)) | change
    with pytest.raises(kind, match=message):
        linear(**given)


def test_memory_is_the_result_and_a_panel():
    setup = """
        import pyvit
        x, weight = torch.randn(4000, 512), torch.randn(512, 512)
        pyvit.linear(x[:64], weight)
    """
    extra = peak_extra_bytes(setup, "y = pyvit.linear(x, weight)", threads=1)
    result = 4000 * 512 * 4
    assert result * 0.9 < extra < result + (5 << 20)  # scratch, and slack of the allocator


def test_the_layer_is_torchs():
    torch.manual_seed(0)
    ours = Linear(12, 7)
    torch.manual_seed(0)
    theirs = nn.Linear(12, 7)
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, 12)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    torch.testing.assert_close(ours(x), theirs(x))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x), ours(x))
    assert Linear(3, 4, bias=False, dtype=torch.float64)(torch.zeros(3).double()).shape == (4,)
    for bad in ((0, 3), (3, 0), (3, 2.5)):
        with pytest.raises((TypeError, ValueError), match=r"pyvit\.nn\.Linear"):
            Linear(*bad)


@pytest.mark.parametrize("topk", [None, 5])
def test_a_whole_vit_treats_an_image_alike_in_every_batch(topk):
    model = pyvit.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10, topk=topk
    )
    nn.init.normal_(model.head.weight, std=0.1)
    model.requires_grad_(False).eval()
    images = torch.rand(5, 3, 32, 32)

    def logits_and_gradient(x):
        x = x.clone().requires_grad_()
        logits = model(x)
        return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]

    everything = logits_and_gradient(images)
    for part in (slice(0, 1), slice(1, 3), slice(2, 5)):
        for alone, together in zip(logits_and_gradient(images[part]), everything, strict=True):
            assert torch.equal(alone, together[part])
