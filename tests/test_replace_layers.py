"""replace_layers(): the same model, on pyvit's kernels, and back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision_shim import importorskip

from pyvit.nn import (
    Conv2d,
    Linear,
    PatchConv2d,
    TopKAttention,
    TopKMultiheadAttention,
    replace_layers,
    restore_layers,
)

DENSE = {"topk": None}


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit: models.md's promise."""
    error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
    assert error <= 1e-5, f"relative error {error:.3g}"


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, padding_mode="reflect"),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 5),
        )


def timm_vit(**keywords):
    timm = importorskip("timm")
    torch.manual_seed(0)
    keywords = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7, **keywords}
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, **keywords)
    return model.eval()


def torchvision_vit(**keywords):
    torchvision = importorskip("torchvision")
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 7}
    model = torchvision.models.VisionTransformer(32, 8, **sizes, **keywords)
    nn.init.normal_(model.heads.head.weight)  # zero as it comes
    return model.eval()


def test_cnn_logits_gradients_and_training_are_kept():
    torch.manual_seed(0)
    theirs = Cnn()
    ours = copy.deepcopy(theirs)
    report = replace_layers(ours)
    assert [(e.name, e.outcome) for e in report.replaced] == [
        ("0", "pyvit.nn.Conv2d"),
        ("3", "pyvit.nn.Conv2d"),
        ("5", "pyvit.nn.Linear"),
    ]
    assert type(ours[0]) is Conv2d
    for mode in (True, False):
        x = torch.rand(4, 3, 8, 8, requires_grad=True)
        results = []
        for model in (ours.train(mode), theirs.train(mode)):
            logits = model(x)
            gradients = torch.autograd.grad(logits.logsumexp(1).sum(), (x, *model.parameters()))
            results.append((logits, *gradients))
        for a, b in zip(*results, strict=True):
            # 1e-5 of each tensor's largest entry; a gradient that is zero in truth (the bias
            # before a batch norm) is rounding noise of the size of a sum over 256 pixels.
            torch.testing.assert_close(
                a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()) + 3e-6
            )


def test_everything_about_a_layer_is_kept():
    model = Cnn().double()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    alias, parameters = model[3], dict(model.named_parameters())
    keys, text = list(model.state_dict()), repr(model)

    replace_layers(model)
    assert alias is model[3]
    assert type(alias) is Conv2d
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert not model[0].weight.requires_grad
    assert model[0].training
    assert not model[3].training
    out = model(torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True))
    out.sum().backward()
    assert calls == ["forward", "backward"]
    assert out.dtype is torch.float64

    assert restore_layers(model) == ["0", "3", "5"]
    assert type(model[0]) is nn.Conv2d
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not any("pyvit" in key for module in model.modules() for key in vars(module))
    assert restore_layers(model) == []


@pytest.mark.parametrize(
    "keywords",
    [
        {"qkv_bias": True},
        {"qkv_bias": False, "global_pool": "avg", "class_token": False},
        {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.5},
        {"dynamic_img_size": True, "reg_tokens": 2},
    ],
)
def test_timm_vit(keywords):
    model = timm_vit(**keywords)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    before = model(x)
    (gradient,) = torch.autograd.grad(before.logsumexp(1).sum(), x)
    keys = list(model.state_dict())

    report = replace_layers(model, attention=DENSE)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert [e.name for e in report.replaced] == [
        "patch_embed.proj",
        *linears,
        "blocks.0.attn",
        "blocks.1.attn",
        "blocks.2.attn",
    ]
    assert all(type(model.get_submodule(name)) is Linear for name in linears)
    assert report.left == []
    assert type(model.patch_embed.proj) is PatchConv2d
    assert all(type(block.attn) is TopKAttention for block in model.blocks)
    assert list(model.state_dict()) == keys
    after = model(x)
    assert_same_logits(after, before)
    assert_same_logits(torch.autograd.grad(after.logsumexp(1).sum(), x)[0], gradient)

    replace_layers(model, attention={"topk": 3})
    assert not torch.allclose(model(x), before, rtol=1e-3)
    replace_layers(model, attention={"topk": 99})
    assert_same_logits(model(x), before)
    restore_layers(model)
    assert torch.equal(model(x), before)


def test_timm_vit_tiny_at_its_own_size():
    timm = importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        replace_layers(model, attention=DENSE)
        assert_same_logits(model(x), before)


def test_timm_gated_attention_and_gradients_of_its_parameters():
    timm = importorskip("timm")
    try:
        layer = timm.layers.Attention(32, num_heads=4, qkv_bias=True, gated=True)
    except TypeError:
        pytest.skip(f"timm {timm.__version__} has no gated attention")
    x = torch.randn(2, 9, 32)
    before = layer(x)
    theirs = torch.autograd.grad(before.sin().sum(), list(layer.parameters()))
    replace_layers(layer, attention=DENSE)
    assert type(layer) is TopKAttention
    ours = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    assert_same_logits(layer(x), before)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_timm_resnet_and_convolutions_of_another_kind():
    timm = importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        report = replace_layers(model)
        assert len(report.replaced) == 21
        assert_same_logits(model(x), before)

    model = nn.Sequential(timm.layers.StdConv2d(3, 4, 3))
    report = replace_layers(model)
    assert report.replaced == []
    assert "subclass of Conv2d" in report.left[0].outcome
    assert type(model[0]) is timm.layers.StdConv2d


def test_torchvision_vit():
    model = torchvision_vit()
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    keys = list(model.state_dict())
    report = replace_layers(model, attention=DENSE)
    assert [type(model.get_submodule(e.name)) for e in report.replaced] == [
        PatchConv2d,
        *[Linear] * 5,
        TopKMultiheadAttention,
        TopKMultiheadAttention,
    ]
    assert report.left == []
    assert list(model.state_dict()) == keys
    assert_same_logits(model(x), before)
    with torch.no_grad():
        assert_same_logits(model(x), before)
        replace_layers(model, attention={"topk": 2})
        assert not torch.allclose(model(x), before, rtol=1e-3)
    restore_layers(model)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_does_not_go_around_the_layer():
    """In eval mode torch's encoder layer computes attention from the weights by itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        before = model(x)
        replace_layers(model, attention=DENSE)
        assert_same_logits(model(x), before)
        replace_layers(model, attention={"topk": 1})
        assert not torch.allclose(model(x), before, rtol=1e-3)
        padding = torch.zeros(2, 9, dtype=torch.bool)
        padding[0, -1] = True
        with pytest.raises(NotImplementedError, match="TopKMultiheadAttention"):
            model(x, src_key_padding_mask=padding)
        restore_layers(model)
        assert torch.equal(model(x), before)


class ViTPatchEmbeddings(nn.Module):
    """Built as Hugging Face's class of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 16, kernel_size=4, stride=4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


def test_hugging_face_patch_embeddings():
    model = ViTPatchEmbeddings()
    x = torch.rand(2, 3, 8, 8)
    before = model(x)
    assert replace_layers(model, conv=False).replaced[0].outcome == "pyvit.nn.PatchConv2d"
    assert_same_logits(model(x), before)


def test_flags_choose():
    model = nn.ModuleDict(
        {"patches": nn.Conv2d(3, 8, 4, 4), "body": nn.Conv2d(8, 8, 3), "head": nn.Linear(8, 2)}
    )
    report = replace_layers(model, conv=False, patch_embed=False, linear=False)
    assert report.replaced == []
    reasons = [e.outcome for e in report.left]
    assert reasons == ["patch_embed=False", "conv=False", "linear=False"]
    assert type(model["body"]) is nn.Conv2d
    assert type(model["head"]) is nn.Linear
    replace_layers(model, conv=False)
    assert type(model["head"]) is Linear
    assert (type(model["patches"]), type(model["body"])) == (PatchConv2d, nn.Conv2d)
    replace_layers(model)
    assert type(model["body"]) is Conv2d


def test_overlapping_patches_are_a_convolution():
    model = nn.ModuleDict({"patches": nn.Conv2d(3, 8, 7, stride=4, padding=3)})
    report = replace_layers(model, conv=False)
    assert "overlap" in report.left[0].outcome
    replace_layers(model)
    assert type(model["patches"]) is Conv2d
    x = torch.rand(1, 3, 16, 16)
    after = model["patches"](x)
    restore_layers(model)
    assert_same_logits(after, model["patches"](x))


class OddAttention(nn.Module):
    pass


def test_report_says_what_was_left_and_why():
    model = nn.ModuleDict(
        {
            "odd": OddAttention(),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
            "biased": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "parametrised": nn.utils.parametrizations.orthogonal(nn.Conv2d(2, 2, 3)),
            "patched": nn.Conv2d(2, 2, 3),
            "complex": nn.Conv2d(2, 2, 3, dtype=torch.complex64),
            "ours": Conv2d(2, 2, 3),
            "orthogonal": nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
            "attention": TopKAttention(8, 2),
        }
    )
    model["patched"].forward = lambda x: x
    report = replace_layers(model, attention=DENSE)
    assert report.replaced == []
    reasons = {e.name: e.outcome for e in report.left}
    assert "not known to pyvit" in reasons["odd"]
    assert "kdim" in reasons["cross"]
    assert "add_bias_kv" in reasons["biased"]
    assert "subclass of Conv2d" in reasons["parametrised"]
    assert "forward was replaced" in reasons["patched"]
    assert "complex64" in reasons["complex"]
    assert "already" in reasons["ours"]
    assert "subclass of Linear" in reasons["orthogonal"]
    assert "already" in reasons["attention"]
    text = str(report)
    assert text.startswith("replaced: 0\nleft: 11\n")
    assert all(name in text and reason in text for name, reason in reasons.items())


def test_one_topk_for_each_layer_and_new_settings():
    model = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(3))
    replace_layers(model, attention={"topk": [1, None, 4], "backward": "dense"})
    assert [(m.topk, m.backward) for m in model] == [(1, "dense"), (None, "dense"), (4, "dense")]
    report = replace_layers(model, attention={"topk": 2})
    assert [(m.topk, m.backward) for m in model] == [(2, "selected")] * 3
    assert len(report.replaced) == 3
    replace_layers(model)  # attention=None leaves attention as it is
    assert [m.topk for m in model] == [2] * 3
    assert restore_layers(model) == ["0", "1", "2"]
    assert not hasattr(model[0], "topk")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm_hooks_and_shared_layers_work():
    shared = torch.nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.rand(1, 3, 8, 8)
    before = model(x)
    assert len(replace_layers(model).replaced) == 1
    assert_same_logits(model(x), before)


def test_copies_of_a_replaced_model_can_be_restored():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(8, 2))
    replace_layers(model, attention={"topk": 2})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is TopKMultiheadAttention
        assert twin[1].topk == 2
        restore_layers(twin)
        assert [type(m) for m in twin] == [nn.Conv2d, nn.MultiheadAttention]
    assert type(model[0]) is Conv2d, "the original was restored with its copy"


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"conv": 1}, "conv"),
        ({"patch_embed": None}, "patch_embed"),
        ({"attention": 32}, "attention"),
        ({"attention": {"k": 32}}, "attention"),
        ({"attention": {"topk": 0}}, "topk"),
        ({"attention": {"topk": "8"}}, "topk"),
        ({"attention": {"topk": [1, 2]}}, "topk"),
        ({"attention": {"topk": [0]}}, "topk"),
        ({"attention": {"backward": "none"}}, "backward"),
    ],
)
def test_bad_arguments_change_nothing(arguments, argument):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(8, 2))
    message = rf"pyvit\.replace_layers: `{argument}` must be "
    with pytest.raises((TypeError, ValueError), match=message):
        replace_layers(model, **arguments)
    assert [type(m) for m in model] == [nn.Conv2d, nn.MultiheadAttention]


def test_bad_model_is_named():
    with pytest.raises(TypeError, match=r"pyvit\.replace_layers: `model` must be"):
        replace_layers([nn.Conv2d(3, 4, 3)])
    with pytest.raises(TypeError, match=r"pyvit\.restore_layers: `model` must be"):
        restore_layers([nn.Conv2d(3, 4, 3)])


def test_pyvit_imports_neither_timm_nor_torchvision():
    code = "import sys, pyvit.nn, pyvit.models; print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
