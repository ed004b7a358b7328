"""The layers: torch's and timm's meaning, keys and manners, pyvit's kernels."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import nn
from torch.func import functional_call
from torchvision_shim import importorskip

import pyvit.nn._attend as attend_module
from pyvit.nn import (
    Conv2d,
    DropPath,
    PatchConv2d,
    PatchEmbed,
    TopKAttention,
    TopKMultiheadAttention,
)

# (in, out, kernel), keywords, image size
CONVS = [
    ((3, 5, 3), {}, (9, 8)),
    ((4, 6, 3), {"stride": 2, "padding": 1, "bias": False}, (9, 8)),
    ((4, 6, (3, 2)), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}, (11, 7)),
    ((4, 8, 3), {"groups": 4, "padding": 1}, (6, 6)),
    ((4, 4, 1), {}, (5, 5)),
    ((3, 4, 4), {"padding": "same"}, (7, 6)),
    ((3, 4, 3), {"padding": "same", "dilation": 2}, (7, 6)),
    ((3, 4, 3), {"padding": "valid"}, (7, 6)),
    ((3, 4, 3), {"padding": 2, "padding_mode": "reflect"}, (7, 6)),
    ((3, 4, 3), {"padding": (1, 2), "padding_mode": "replicate", "stride": 2}, (7, 6)),
    ((3, 4, 4), {"padding": "same", "padding_mode": "circular"}, (7, 6)),
]


def twins(args: tuple, keywords: dict, dtype: torch.dtype) -> tuple[Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    ours = Conv2d(*args, **keywords, dtype=dtype)
    torch.manual_seed(0)
    return ours, nn.Conv2d(*args, **keywords, dtype=dtype)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize(("args", "keywords", "size"), CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv2d_is_torchs(args, keywords, size, dtype):
    ours, theirs = twins(args, keywords, dtype)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.Conv2d)
    for (key, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(a, b), "another initialisation"

    x = torch.randn(2, args[0], *size, dtype=dtype)
    truth_layer = copy.deepcopy(theirs).double()
    results = []
    for layer in (ours, theirs, truth_layer):
        image = x.detach().to(layer.weight.dtype).requires_grad_()
        out = layer(image)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=dtype).to(out.dtype))
        results.append((out.detach(), image.grad, layer.weight.grad))
    for name, factor, a, b, truth in zip(
        ("output", "grad x", "grad weight"), (2, 3, 3), *results, strict=True
    ):
        assert_as_accurate(a, b, truth, factor, name)


def test_conv2d_takes_one_image_and_channels_last():
    ours, theirs = twins((3, 4, 3), {"padding": 1}, torch.float32)
    x = torch.randn(3, 6, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    batch = torch.randn(2, 3, 6, 7).to(memory_format=torch.channels_last)
    out = ours(batch)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, theirs(batch), rtol=1e-5, atol=1e-6)


LAYERS = [
    (lambda: Conv2d(3, 4, 3), (2, 3, 8, 8)),
    (lambda: PatchConv2d(3, 8, 4), (2, 3, 8, 8)),
    (lambda: PatchEmbed(8, 4, 3, 16, mean=[0.5] * 3, std=[0.2] * 3), (2, 3, 8, 8)),
    (lambda: TopKAttention(16, 2, qkv_bias=True, topk=3), (2, 7, 16)),
]


@pytest.mark.parametrize(("make", "size"), LAYERS)
def test_manners(make, size):
    """Pickling, deepcopy, functional_call, state dict, half precision: as any torch layer."""
    layer, x = make(), torch.rand(size)
    out = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), out)
        assert repr(twin) == repr(layer)
    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    other = make()
    other.load_state_dict(doubled)
    assert torch.equal(functional_call(layer, doubled, (x,)), other(x))
    assert torch.equal(layer(x), out)
    assert layer.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("patch", [4, (2, 4), 1])
def test_patch_conv2d_is_the_convolution_and_a_view_of_tokens(patch):
    layer = PatchConv2d(3, 8, patch).double()
    x = torch.randn(2, 3, 15, 9, dtype=torch.float64)  # rows and columns are left over
    expected = F.conv2d(x, layer.weight, layer.bias, stride=patch)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-12, atol=1e-12)
    tokens = out.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous()
    assert tokens.data_ptr() == out.data_ptr()


def tokens_of(image, layer, pos_embed, cls_token):
    """PatchEmbed step by step, in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    image = (image - mean) / std
    x = F.conv2d(image, layer.proj.weight.double(), layer.proj.bias.double(), stride=4)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((cls_token.double().expand(len(x), -1, -1), x), dim=1)
    return x + pos_embed.double()


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def test_patch_embed_fuses_all_and_passes_every_gradient():
    layer = PatchEmbed((8, 12), 4, 3, 16, mean=MEAN, std=STD, dtype=torch.float64)
    assert layer.grid_size == (2, 3)
    assert layer.num_patches == 6
    assert list(layer.state_dict()) == ["proj.weight", "proj.bias"]
    pos_embed = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    cls_token = torch.randn(1, 1, 16, dtype=torch.float64, requires_grad=True)
    image = torch.rand(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    wanted = (image, pos_embed, cls_token, layer.proj.weight, layer.proj.bias)

    out = layer(image, pos_embed, cls_token)
    expected = tokens_of(image, layer, pos_embed, cls_token)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out.sin().sum(), wanted)
    theirs = torch.autograd.grad(expected.sin().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_patch_embed_takes_oblong_patches_and_leaves_pixels_over():
    layer = PatchEmbed((9, 13), (2, 4), 3, 16)
    assert layer.grid_size == (4, 3)
    image = torch.rand(2, 3, 9, 13)
    expected = F.conv2d(image, layer.proj.weight, layer.proj.bias, stride=(2, 4))
    torch.testing.assert_close(layer(image), expected.flatten(2).transpose(1, 2))


def test_patch_embed_takes_bytes():
    layer = PatchEmbed(None, 4, 3, 16, mean=MEAN, std=STD)
    image = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    torch.testing.assert_close(layer(image), layer(image / 255), rtol=1e-5, atol=1e-5)


def test_patch_embed_has_timms_keys():
    timm = importorskip("timm")
    theirs = timm.layers.PatchEmbed(32, 8, 3, 24)
    ours = PatchEmbed(32, 8, 3, 24)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert (ours.grid_size, ours.num_patches) == (theirs.grid_size, theirs.num_patches)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def attention_by_hand(layer: TopKAttention, x: torch.Tensor) -> torch.Tensor:
    """The whole layer in plain PyTorch; the largest ``topk`` scores by a stable sort."""
    B, N, dim = x.shape
    packed = layer.qkv(x).reshape(B, N, 3, layer.num_heads, dim // layer.num_heads)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    scores = layer.q_norm(q) @ layer.k_norm(k).transpose(-1, -2) * layer.head_dim**-0.5
    kept = N if layer.topk is None else min(layer.topk, N)
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    mask = torch.full_like(scores, -torch.inf).scatter(-1, order, 0.0)
    out = (scores + mask).softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).reshape(B, N, dim))


@pytest.mark.parametrize("topk", [None, 1, 3, 8, 20])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_topk_attention_is_attention(topk, qk_norm):
    layer = TopKAttention(32, 4, qkv_bias=True, qk_norm=qk_norm, topk=topk, dtype=torch.float64)
    x = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    wanted = (x, *layer.parameters())
    out, expected = layer(x), attention_by_hand(layer, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(out.sin().sum(), wanted)
    theirs = torch.autograd.grad(expected.sin().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_dense_backward_is_the_gradient_of_dense_attention():
    x = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    layer = TopKAttention(16, 2, topk=2, dtype=torch.float64)

    def gradient(topk, backward):
        layer.topk, layer.backward = topk, backward
        return torch.autograd.grad(layer(x).sum(), x)[0]

    dense = gradient(None, "selected")
    torch.testing.assert_close(gradient(2, "dense"), dense, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(gradient(2, "selected"), dense)


def test_q_k_v_are_slices_of_the_packed_projection(monkeypatch):
    seen = []

    def spy(q, k, v, topk, **keywords):
        seen.extend((q, k, v))
        return torch.zeros_like(q)

    monkeypatch.setattr(attend_module, "topk_attention", spy)
    layer = TopKAttention(32, 4, topk=2)
    layer(torch.randn(2, 5, 32))
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1
    assert all(x.stride(-1) == 1 and x.shape == (2, 4, 5, 8) for x in seen)


def test_topk_attention_has_timms_keys_and_result():
    timm = importorskip("timm")
    keywords = {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm}
    theirs = timm.layers.Attention(64, num_heads=4, **keywords)
    ours = TopKAttention(64, 4, **keywords)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 10, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_attention_dropout_is_torchs_or_an_error():
    layer = TopKAttention(16, 2, attn_drop=0.5)
    x = torch.randn(1, 6, 16)
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), dropped)
    assert not torch.allclose(layer.eval()(x), dropped)
    layer.topk = 3
    layer(x)  # eval drops nothing
    with pytest.raises(NotImplementedError, match=r"nn\.TopKAttention: `attn_drop` must be 0"):
        layer.train()(x)


def test_dense_attention_honours_masks():
    layer = TopKAttention(16, 2)
    x = torch.randn(1, 6, 16)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    masked = layer(x, attn_mask=causal)
    torch.testing.assert_close(layer(x, is_causal=True), masked)
    torch.testing.assert_close(masked[:, :3], layer(x[:, :3], is_causal=True))
    assert not torch.allclose(layer(x), masked)


def multihead_twins(**keywords) -> tuple[TopKMultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours = TopKMultiheadAttention(24, 4, **keywords)
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, **keywords)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), "another initialisation"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 24), (7, 24)])
def test_multihead_attention_is_torchs(batch_first, bias, shape):
    ours, theirs = multihead_twins(batch_first=batch_first, bias=bias)
    x = torch.randn(shape)
    other = torch.randn(shape)
    for arguments in ((x, x, x), (x, other, other), (x, other, x)):
        out, weights = ours(*arguments, need_weights=False)
        assert weights is None
        expected = theirs(*arguments, need_weights=False)[0]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
def test_multihead_attention_honours_torchs_masks(per_head, boolean):
    ours, theirs = multihead_twins(batch_first=True)
    x = torch.randn(2, 5, 24)
    mask = torch.randn((8, 5, 5) if per_head else (5, 5))
    if boolean:
        mask = (mask > 0.5) & ~torch.eye(5, dtype=torch.bool)
    out = ours(x, x, x, need_weights=False, attn_mask=mask)[0]
    expected = theirs(x, x, x, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_multihead_attention_pickles():
    layer = TopKMultiheadAttention(24, 4, batch_first=True, topk=2)
    x = torch.randn(2, 5, 24)
    out = layer(x, x, x, need_weights=False)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x, need_weights=False)[0], out)
    layer.topk = None
    assert not torch.allclose(layer(x, x, x, need_weights=False)[0], out)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    layer = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    out = layer(x)
    per_image = out[:, 0, 0]
    assert torch.equal(out, per_image[:, None, None].expand_as(out))
    dropped = per_image == 0
    torch.testing.assert_close(per_image[~dropped], torch.full((int((~dropped).sum()),), 1 / 0.75))
    # Five standard deviations of a share of 0.25 among 4000.
    assert abs(float(dropped.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert layer.eval()(x) is x


X3, X4 = torch.zeros(2, 5, 16), torch.zeros(2, 3, 8, 8)


def _multihead(topk=None, **call):
    layer = TopKMultiheadAttention(16, 2, topk=topk, dropout=0.5).eval()
    return layer(X3, X3, X3, **{"need_weights": False, **call})


BAD = [
    (lambda: Conv2d(0, 4, 3), "nn.Conv2d", "in_channels"),
    (lambda: Conv2d(3.0, 4, 3), "nn.Conv2d", "in_channels"),
    (lambda: Conv2d(3, 0, 3), "nn.Conv2d", "out_channels"),
    (lambda: Conv2d(3, 4, 0), "nn.Conv2d", "kernel_size"),
    (lambda: Conv2d(3, 4, (3, 3, 3)), "nn.Conv2d", "kernel_size"),
    (lambda: Conv2d(3, 4, 3, stride=0), "nn.Conv2d", "stride"),
    (lambda: Conv2d(3, 4, 3, padding=-1), "nn.Conv2d", "padding"),
    (lambda: Conv2d(3, 4, 3, padding="full"), "nn.Conv2d", "padding"),
    (lambda: Conv2d(3, 4, 3, stride=2, padding="same"), "nn.Conv2d", "stride"),
    (lambda: Conv2d(3, 4, 3, dilation=0), "nn.Conv2d", "dilation"),
    (lambda: Conv2d(4, 4, 3, groups=3), "nn.Conv2d", "groups"),
    (lambda: Conv2d(4, 4, 3, groups=0), "nn.Conv2d", "groups"),
    (lambda: Conv2d(3, 4, 3, padding_mode="mirror"), "nn.Conv2d", "padding_mode"),
    (lambda: Conv2d(3, 4, 3)(torch.zeros(1, 4, 8, 8)), "conv2d", "x"),
    (lambda: PatchConv2d(3, 8, 0), "nn.PatchConv2d", "patch_size"),
    (lambda: PatchConv2d(3, 0, 4), "nn.PatchConv2d", "out_channels"),
    (lambda: PatchConv2d(3, 8, 4)(torch.zeros(8, 8)), "nn.PatchConv2d", "input"),
    (lambda: PatchEmbed(8, 0), "nn.PatchEmbed", "patch_size"),
    (lambda: PatchEmbed(8, 16), "nn.PatchEmbed", "img_size"),
    (lambda: PatchEmbed((8, 8, 8), 4), "nn.PatchEmbed", "img_size"),
    (lambda: PatchEmbed(8, 4, 0), "nn.PatchEmbed", "in_chans"),
    (lambda: PatchEmbed(8, 4, 3, -1), "nn.PatchEmbed", "embed_dim"),
    (lambda: PatchEmbed(8, 4, mean=[0.5]), "nn.PatchEmbed", "mean"),
    (lambda: PatchEmbed(8, 4, std=[0.5, 0.5, 0.0]), "nn.PatchEmbed", "std"),
    (lambda: PatchEmbed(8, 4, mean=[0.5, 0.5, "x"]), "nn.PatchEmbed", "mean"),
    (lambda: PatchEmbed(16, 4)(X4), "nn.PatchEmbed", "image"),
    (lambda: PatchEmbed(8, 4)(X4[0]), "nn.PatchEmbed", "image"),
    (lambda: PatchEmbed(8, 4)([X4]), "nn.PatchEmbed", "image"),
    (lambda: TopKAttention(0), "nn.TopKAttention", "dim"),
    (lambda: TopKAttention(16, 3), "nn.TopKAttention", "num_heads"),
    (lambda: TopKAttention(16, 0), "nn.TopKAttention", "num_heads"),
    (lambda: TopKAttention(16, 2, topk=0), "nn.TopKAttention", "topk"),
    (lambda: TopKAttention(16, 2, topk=True), "nn.TopKAttention", "topk"),
    (lambda: TopKAttention(16, 2, topk=1.5), "nn.TopKAttention", "topk"),
    (lambda: TopKAttention(16, 2, backward="all"), "nn.TopKAttention", "backward"),
    (lambda: TopKAttention(16, 2, attn_drop=2.0), "nn.TopKAttention", "attn_drop"),
    (lambda: TopKAttention(16, 2, proj_drop=-0.1), "nn.TopKAttention", "proj_drop"),
    (lambda: TopKAttention(16, 2)(X4), "nn.TopKAttention", "x"),
    (lambda: TopKAttention(8, 2)(X3), "nn.TopKAttention", "x"),
    (lambda: TopKAttention(16, 2)(X3.int()), "nn.TopKAttention", "x"),
    (
        lambda: TopKAttention(16, 2, topk=2)(X3, attn_mask=torch.ones(5, 5)),
        "nn.TopKAttention",
        "attn_mask",
    ),
    (lambda: TopKAttention(16, 2, topk=2)(X3, is_causal=True), "nn.TopKAttention", "is_causal"),
    (lambda: TopKMultiheadAttention(16, 3), "nn.TopKMultiheadAttention", "num_heads"),
    (lambda: TopKMultiheadAttention(0, 3), "nn.TopKMultiheadAttention", "embed_dim"),
    (lambda: TopKMultiheadAttention(16, 2, topk=-1), "nn.TopKMultiheadAttention", "topk"),
    (lambda: _multihead(need_weights=True), "nn.TopKMultiheadAttention", "need_weights"),
    (
        lambda: _multihead(key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)),
        "nn.TopKMultiheadAttention",
        "key_padding_mask",
    ),
    (
        lambda: _multihead(topk=2, attn_mask=torch.zeros(2, 2)),
        "nn.TopKMultiheadAttention",
        "attn_mask",
    ),
    (
        lambda: TopKMultiheadAttention(16, 2, 0.5, topk=2)(X3, X3, X3, need_weights=False),
        "nn.TopKMultiheadAttention",
        "dropout",
    ),
    (lambda: TopKMultiheadAttention(8, 2)(X3, X3, X3, None, False), "nn.TopKM", "query"),
    (lambda: DropPath(1.0), "nn.DropPath", "rate"),
    (lambda: DropPath(-0.5), "nn.DropPath", "rate"),
    (lambda: DropPath("0.5"), "nn.DropPath", "rate"),
]


@pytest.mark.parametrize(("call", "layer", "argument"), BAD)
def test_bad_input_names_the_layer_and_the_argument(call, layer, argument):
    message = rf"pyvit\.{re.escape(layer)}.*`{argument}` must be "
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        call()
