"""The vision transformer: timm's keys and logits, positions, top-k, and gradients to the image."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision_shim import importorskip

from pyvit import models
from pyvit.models import SIZES, VisionTransformer, resize_pos_embed, sincos1d, sincos2d

TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
TINY |= {"embed_dim": 32, "depth": 3, "num_heads": 4}


def tiny(**keywords) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**(TINY | keywords)).eval()


def pair(**keywords) -> tuple[VisionTransformer, nn.Module]:
    """Ours and timm's, of one configuration and with timm's parameters."""
    timm = importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(**(TINY | keywords)).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or name.endswith(("bias", "cls_token")):
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)  # not 0 and 1
    ours = tiny(**keywords)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_tiny_patch16_224", 5.7),
        ("vit_small_patch16_224", 22.1),
        ("vit_base_patch16_224", 86.6),
        ("vit_large_patch16_224", 304.3),
        ("vit_huge_patch14_224", 632.0),
    ],
)
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        model = getattr(models, name)()
    count = sum(p.numel() for p in model.parameters())
    # To the digits that are published.
    digits = 0 if millions == 632 else 1
    assert round(count / 1e6, digits) == millions
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_are_timms(name):
    timm = importorskip("timm")
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), timm.create_model(name, num_classes=1000)
    shapes = [
        {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_vit_tiny_gives_timms_logits():
    timm = importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    ours = models.vit_tiny_patch16_224().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(image)
        assert relative_error(ours(image), expected) <= 1e-5
        ours.set_topk(197)
        assert relative_error(ours(image), expected) <= 1e-5
        ours.set_topk(100)
        assert relative_error(ours(image), expected) > 1e-4


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"qkv_bias": False},
        {"img_size": (8, 12), "in_chans": 3},
        {"img_size": 9, "patch_size": 4},
        {"patch_size": (2, 4)},
        {"num_classes": 0},
        {"mlp_ratio": 2.5, "depth": 1, "num_heads": 1},
    ],
)
def test_logits_and_gradients_are_timms(keywords):
    ours, theirs = pair(**keywords)
    height, width = ours.patch_embed.img_size
    image = torch.rand(3, (TINY | keywords)["in_chans"], height, width, requires_grad=True)
    results = []
    for model in (ours, theirs):
        logits = model(image)
        wanted = [image, *model.parameters()]
        gradients = torch.autograd.grad(logits.sin().sum(), wanted, allow_unused=True)
        results.append((logits, gradients[0], dict(zip(model.state_dict(), gradients[1:]))))
    (a, image_a, parameters_a), (b, image_b, parameters_b) = results
    assert relative_error(a, b) <= 1e-5
    assert relative_error(image_a, image_b) <= 1e-4
    for name, gradient in parameters_b.items():
        # The scale of all gradients: some, as the key's bias, are zero in truth.
        torch.testing.assert_close(parameters_a[name], gradient, rtol=1e-4, atol=1e-4)


def test_topk_of_each_layer():
    model = tiny(topk=[2, None, 16], backward="dense")
    assert [block.attn.topk for block in model.blocks] == [2, None, 16]
    assert {block.attn.backward for block in model.blocks} == {"dense"}
    model.set_topk(5)
    assert [block.attn.topk for block in model.blocks] == [5, 5, 5]
    assert {block.attn.backward for block in model.blocks} == {"dense"}
    model.set_topk(None, backward="selected")
    image = torch.rand(2, 1, 8, 8)
    dense = model(image)
    model.set_topk(17)  # 16 patches and the class token
    torch.testing.assert_close(model(image), dense, rtol=1e-5, atol=1e-6)
    model.set_topk([None, None, 1])
    assert relative_error(model(image), dense) > 1e-4


def test_sincos1d_is_its_formula():
    table = sincos1d(5, 8)
    for t in range(5):
        for k in range(4):
            omega = 10000 ** (-2 * k / 8)
            assert table[t, 2 * k] == pytest.approx(math.sin(omega * t), abs=1e-12)
            assert table[t, 2 * k + 1] == pytest.approx(math.cos(omega * t), abs=1e-12)


def test_sincos2d_is_its_formula():
    table = sincos2d((2, 3), 8)
    assert table.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            x, y = ((p, p * 0.01) for p in (column, row))  # frequencies 1 and 10000^(-1/2)
            expected = [*map(math.sin, x), *map(math.cos, x), *map(math.sin, y), *map(math.cos, y)]
            assert table[3 * row + column].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("class_token", [True, False])
def test_fixed_positions_are_buffers(class_token):
    pool = "token" if class_token else "avg"
    for kind in ("sincos1d", "sincos2d"):
        model = tiny(pos_embed=kind, class_token=class_token, global_pool=pool)
        assert "pos_embed" not in dict(model.named_parameters())
        assert "pos_embed" in model.state_dict()
        assert model.pos_embed.dtype is torch.float32
        table = sincos1d(16 + class_token, 32) if kind == "sincos1d" else sincos2d((4, 4), 32)
        patches = model.pos_embed[0, -len(table) :]
        torch.testing.assert_close(patches.double(), table, rtol=0, atol=1e-7)
        if class_token and kind == "sincos2d":
            assert not model.pos_embed[0, 0].any()
        model.set_input_size((4, 6))
        assert model(torch.rand(1, 1, 4, 6)).shape == (1, 10)
        larger = tiny(pos_embed=kind, class_token=class_token, global_pool=pool, img_size=12)
        expected = larger.pos_embed.clone()
        larger.load_state_dict(model.state_dict())
        assert torch.equal(larger.pos_embed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resizing_is_timms(dtype):
    timm = importorskip("timm")
    positions = torch.randn(1, 1 + 14 * 14, 24).to(dtype)
    for grid in [(16, 16), (7, 9), (1, 1)]:
        ours = resize_pos_embed(positions, grid)
        theirs = timm.layers.resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=1)
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    oblong = resize_pos_embed(positions[:, :13], (5, 5), (3, 4))
    theirs = timm.layers.resample_abs_pos_embed(positions[:, :13], [5, 5], [3, 4])
    torch.testing.assert_close(oblong, theirs, rtol=1e-6, atol=1e-6)
    assert resize_pos_embed(positions, (14, 14)) is positions


def test_resizing_keeps_a_plane():
    """By hand: positions that rise linearly go on rising linearly away from the border."""
    ramp = torch.arange(8.0)[:, None].expand(8, 8).reshape(1, 64, 1)
    resized = resize_pos_embed(ramp, (16, 16), num_prefix_tokens=0).reshape(16, 16)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(resized[4:12, 3], expected[4:12], rtol=1e-5, atol=1e-5)


def test_another_image_size_as_timm():
    ours, theirs = pair()
    ours.set_input_size((12, 10))
    theirs.set_input_size((12, 10))
    image = torch.rand(2, 1, 12, 10)
    assert relative_error(ours(image), theirs(image)) <= 1e-5
    assert ours.pos_embed.requires_grad
    assert isinstance(ours.pos_embed, nn.Parameter)


def test_positions_are_fitted_while_they_load():
    small, large = tiny(), tiny(img_size=12)
    state = small.state_dict()
    resized = resize_pos_embed(state["pos_embed"], (6, 6))
    large.load_state_dict(state, strict=True)
    torch.testing.assert_close(large.pos_embed.detach(), resized)
    assert state["pos_embed"].shape == (1, 17, 32), "the caller's state dict was changed"
    inside = nn.Sequential(tiny(img_size=12))
    inside.load_state_dict({f"0.{key}": value for key, value in state.items()})
    torch.testing.assert_close(inside[0].pos_embed.detach(), resized)
    oblong = tiny(img_size=(8, 12))
    with pytest.raises(ValueError, match=r"resize_pos_embed: `old_grid` must be"):
        tiny().load_state_dict(oblong.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny(embed_dim=16).load_state_dict(state)


def test_normalisation_is_fused_and_bytes_are_taken():
    mean, std = [0.3], [0.4]
    plain, fused = tiny(), tiny(mean=mean, std=std)
    assert list(plain.state_dict()) == list(fused.state_dict())
    image = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    expected = plain((image / 255 - mean[0]) / std[0])
    assert relative_error(fused(image / 255), expected) <= 1e-5
    assert relative_error(fused(image), expected) <= 1e-5


def test_gradient_to_the_image_by_differences():
    model = tiny(topk=6, mean=[0.3], std=[0.4], depth=2).double()
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (image,))


def test_stochastic_depth_in_training_alone():
    model = tiny(drop_path_rate=0.5, depth=5)
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(image), model(image))
    assert not torch.equal(model.train()(image), model(image))
    assert torch.equal(model.eval()(image), tiny(depth=5)(image))


def test_one_image_is_itself_in_any_batch():
    model = tiny(topk=4)
    images = torch.rand(5, 1, 8, 8)
    tokens = model.patch_embed(images, model.pos_embed, model.cls_token)
    alone = model.patch_embed(images[2:3], model.pos_embed, model.cls_token)
    assert torch.equal(tokens[2:3], alone)
    assert model(images[:0]).shape == (0, 10)


def test_manners():
    """Pickling, deepcopy, functional_call, state dict: as any torch module."""
    model, image = tiny(topk=4, pos_embed="sincos2d", mean=[0.5], std=[0.5]), torch.rand(2, 1, 8, 8)
    logits = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image), logits)
    other = tiny(topk=4, pos_embed="sincos2d", mean=[0.5], std=[0.5])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    state = other.state_dict()
    assert torch.equal(functional_call(model, state, (image,)), other(image))
    assert torch.equal(model(image), logits)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(image), other(image))
    assert model.bfloat16()(image.bfloat16()).dtype is torch.bfloat16


def test_autocast():
    model, image = tiny(), torch.rand(2, 1, 8, 8)  # with topk, rounding chooses other keys
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image)
    assert logits.dtype is torch.bfloat16
    assert relative_error(logits.float(), model(image)) < 0.03  # 8 bits, three layers


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_in_one_graph(dynamic):
    model, image = tiny(topk=4, depth=1), torch.rand(2, 1, 8, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    logits, expected = compiled(image), model(image)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(logits.sin().sum(), image)
    (theirs,) = torch.autograd.grad(expected.sin().sum(), image)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_learns():
    """Eight random images by heart in 100 steps: every parameter gets a gradient that helps."""
    model = tiny(topk=6, depth=2).train()
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
    assert float((model(images).argmax(1) == labels).float().mean()) == 1.0


NAME = r"models\.VisionTransformer"


@pytest.mark.parametrize(
    ("keywords", "layer", "argument"),
    [
        ({"img_size": 1}, r"nn\.PatchEmbed", "img_size"),
        ({"img_size": None}, NAME, "img_size"),
        ({"patch_size": 0}, r"nn\.PatchEmbed", "patch_size"),
        ({"in_chans": 0}, r"nn\.PatchEmbed", "in_chans"),
        ({"num_classes": -1}, NAME, "num_classes"),
        ({"global_pool": "max"}, NAME, "global_pool"),
        ({"class_token": False}, NAME, "global_pool"),
        ({"depth": 0}, NAME, "depth"),
        ({"num_heads": 5}, r"nn\.TopKAttention", "num_heads"),
        ({"pos_embed": "rotary"}, NAME, "pos_embed"),
        ({"pos_embed": "sincos1d", "embed_dim": 9, "num_heads": 1}, r"models\.sincos1d", "dim"),
        ({"pos_embed": "sincos2d", "embed_dim": 34, "num_heads": 1}, r"models\.sincos2d", "dim"),
        ({"drop_path_rate": 1.0}, r"nn\.DropPath", "rate"),
        ({"proj_drop_rate": -1.0}, r"nn\.TopKAttention", "proj_drop"),
        ({"topk": 0}, r"nn\.TopKAttention", "topk"),
        ({"topk": [1, 2]}, NAME, "topk"),
        ({"topk": "4"}, NAME, "topk"),
        ({"backward": "none"}, r"nn\.TopKAttention", "backward"),
        ({"mean": [0.5, 0.5]}, r"nn\.PatchEmbed", "mean"),
        ({"std": [0.0]}, r"nn\.PatchEmbed", "std"),
    ],
)
def test_bad_arguments_are_named(keywords, layer, argument):
    with pytest.raises((TypeError, ValueError), match=rf"pyvit\.{layer}: `{argument}` must be "):
        VisionTransformer(**(TINY | keywords))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: m(torch.rand(1, 1, 8, 10)), "image"),
        (lambda m: m(torch.rand(1, 3, 8, 8)), "image|weight"),
        (lambda m: m(torch.rand(1, 1, 8, 8, dtype=torch.complex64)), "image"),
        (lambda m: m.set_topk([1]), "topk"),
        (lambda m: m.set_topk(0), "topk"),
        (lambda m: m.set_topk(1, backward="no"), "backward"),
        (lambda m: m.set_input_size(1), "img_size"),
        (lambda m: m.set_input_size(None), "img_size"),
    ],
)
def test_bad_calls_are_named(call, argument):
    with pytest.raises((TypeError, ValueError), match=rf"pyvit\..*`({argument})` must be "):
        call(tiny())
