"""Attacks: what a call leaves as it was, which models it takes, and what it refuses."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from attack_models import CLASSES, batch, small_cnn
from torch import nn

from pyvit.attacks import FGSM, PGD, Attack, normalized

# ---- what is left as it was -----------------------------------------------------------------


def mixed_model() -> nn.Module:
    """In train mode but for two modules; one parameter frozen; gradients present; BN used."""
    model = small_cnn()
    model(torch.rand(8, 3, 16, 16)).sum().backward()
    model.train()
    model[1].eval()
    model[3].eval()
    model[3][1].train()
    model[0].weight.requires_grad_(False)
    model[6].bias.grad = None
    return model


def everything(model):
    return (
        copy.deepcopy(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1] == after[1]
    for a, b in zip(before[2], after[2]):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert before[3] == after[3]
    assert torch.equal(before[4], after[4])


class RaisesAt(nn.Module):
    """Raises at its n-th forward pass."""

    def __init__(self, model, n):
        super().__init__()
        self.model, self.left = model, n

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("half-way")
        return self.model(x)


@pytest.mark.parametrize("model_mode", ["eval", "keep"])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("rule", [FGSM, PGD])
def test_the_model_is_left_as_it_was(rule, raises, model_mode):
    model, (images, labels) = mixed_model(), batch(8)
    images.requires_grad_()
    tensors = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters()]
    before = everything(model)
    victim = RaisesAt(model, 3 if rule is PGD else 1) if raises else model
    generator = torch.Generator().manual_seed(0)
    attack = rule(victim, generator=generator, model_mode=model_mode)
    if raises:
        with pytest.raises(RuntimeError, match="half-way"):
            attack(images, labels)
    else:
        adversarial = attack(images, labels)
        assert not adversarial.requires_grad and adversarial.grad_fn is None
    assert_same(before, everything(model))
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()]))
    assert all(a is p.grad for a, p in zip(grads, model.parameters()))
    assert images.grad is None and images.requires_grad


def test_a_model_of_inference_tensors_is_left_as_it_was():
    with torch.inference_mode():
        model = small_cnn().train()
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="Inference tensors"):  # autograd's own words
        PGD(model)(*batch(2))
    after = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    assert before == after


def test_global_random_state_without_a_generator_is_used():
    model, (images, labels) = small_cnn(), batch(2)
    before = torch.get_rng_state()
    PGD(model, random_start=False)(images, labels)
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn
    first = PGD(model, steps=0)(images, labels)
    assert not torch.equal(first, PGD(model, steps=0)(images, labels))


def test_the_model_during_the_attack():
    model, (images, labels) = mixed_model(), batch(4)
    model[3][1].eval()
    seen = []

    def look(module, arguments):
        (x,) = arguments
        seen.append(
            (
                x.requires_grad and x.is_leaf,
                any(p.requires_grad for p in module.parameters()),
                [m.training for m in module.modules()],
            )
        )

    model.register_forward_pre_hook(look)
    PGD(model, steps=2)(images, labels)
    PGD(model, steps=2, model_mode="keep")(images, labels)
    modes = [m.training for m in model.modules()]
    assert [s[0] for s in seen] == [True] * 4
    assert [s[1] for s in seen] == [False] * 4
    assert [s[2] for s in seen] == [[False] * len(modes)] * 2 + [modes] * 2


def test_a_graph_made_before_can_still_be_used():
    model, (images, labels) = small_cnn().train(), batch(8)
    out = model(images)
    PGD(model)(images, labels)
    out.sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(mode):
    model, (images, labels) = small_cnn(), batch(4)
    expected = PGD(model, random_start=False)(images, labels)
    with mode():
        inside = images.clone()
        assert torch.equal(PGD(model, random_start=False)(inside, labels.clone()), expected)
        assert not torch.is_grad_enabled()


def test_images_are_not_changed():
    model, (images, labels) = small_cnn(), batch(4)
    kept = images.clone()
    for attack in (PGD(model, steps=0, random_start=False), PGD(model, early_stop=True)):
        adversarial = attack(images, labels)
        adversarial.zero_()
        assert torch.equal(images, kept)


def test_a_function_is_a_model():
    weight = torch.randn(3 * 16 * 16, CLASSES)
    images, labels = batch(4)
    adversarial = PGD(lambda x: x.flatten(1) @ weight, eps=0.1)(images, labels)
    assert float((adversarial - images).abs().max()) <= 0.1 + 1e-7


# ---- normalized -----------------------------------------------------------------------------


def test_normalized():
    inner, (images, labels) = small_cnn().eval(), batch(4)
    mean, std = (0.485, 0.456, 0.406), torch.tensor([0.229, 0.224, 0.225])
    model = normalized(inner, mean, std)
    by_hand = (images - torch.tensor(mean).view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert torch.equal(model(images), inner(by_hand))
    assert not model.training
    assert set(model.state_dict()) == {f"model.{key}" for key in inner.state_dict()}
    assert FGSM(model)(images, labels).shape == images.shape
    assert normalized(inner.double(), mean, std)(images.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"pyvit\.attacks\.normalized: `x` must be .*3 values"):
        normalized(inner, mean, std)(images[:, :2])


# ---- progress -------------------------------------------------------------------------------


def test_progress_bar(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    model, (images, labels) = small_cnn(), batch(2)
    PGD(model, steps=4, progress=True)(images, labels)
    assert "4/4" in capsys.readouterr().err
    PGD(model, steps=4)(images, labels)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # as where tqdm is not installed
    PGD(model, steps=4, progress=True)(images, labels)
    assert capsys.readouterr().err == ""


# ---- bad calls ------------------------------------------------------------------------------


class Half(nn.Module):
    def forward(self, x):
        return {"logits": x.flatten(1)}


BAD_SETTINGS = {
    "model is a number": (TypeError, "model", dict(model=3)),
    "eps negative": (ValueError, "eps", dict(eps=-0.1)),
    "eps infinite": (ValueError, "eps", dict(eps=float("inf"))),
    "eps a text": (TypeError, "eps", dict(eps="8/255")),
    "eps of integers": (TypeError, "eps", dict(eps=torch.tensor([1, 2]))),
    "eps NaN for one image": (ValueError, "eps", dict(eps=torch.tensor([0.1, torch.nan]))),
    "eps of two dimensions": (ValueError, "eps", dict(eps=torch.zeros(2, 1))),
    "step_size negative": (ValueError, "step_size", dict(step_size=-1.0)),
    "step_size negative for one image": (
        ValueError,
        "step_size",
        dict(step_size=torch.tensor([0.1, -0.1])),
    ),
    "steps negative": (ValueError, "steps", dict(steps=-1)),
    "steps of one half": (TypeError, "steps", dict(steps=0.5)),
    "norm unknown": (ValueError, "norm", dict(norm="Linf")),
    "step unknown": (ValueError, "step", dict(step="gradient")),
    "quantile 1": (ValueError, "quantile", dict(quantile=1.0)),
    "random_start is a number": (TypeError, "random_start", dict(random_start=1)),
    "bounds the wrong way round": (ValueError, "bounds", dict(bounds=(1, 0))),
    "bounds is a number": (TypeError, "bounds", dict(bounds=255)),
    "targeted unknown": (ValueError, "targeted", dict(targeted="best")),
    "targeted is None": (ValueError, "targeted", dict(targeted=None)),
    "loss unknown": (ValueError, "loss", dict(loss="ce")),
    "restarts 0": (ValueError, "restarts", dict(restarts=0)),
    "restarts without a random start": (
        ValueError,
        "restarts",
        dict(restarts=2, random_start=False),
    ),
    "early_stop is None": (TypeError, "early_stop", dict(early_stop=None)),
    "model_mode unknown": (ValueError, "model_mode", dict(model_mode="train")),
    "generator is a seed": (TypeError, "generator", dict(generator=0)),
    "progress is a text": (TypeError, "progress", dict(progress="yes")),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_name_the_argument(case):
    error, argument, changed = BAD_SETTINGS[case]
    arguments = dict(model=small_cnn()) | changed
    with pytest.raises(error, match=rf"pyvit\.attacks\.PGD: `{argument}` must be .*; got "):
        PGD(**arguments)


GOOD = dict(images=torch.full((2, 3, 16, 16), 0.5), labels=torch.tensor([0, 1]))
BAD_CALLS = {
    "images is a list": (TypeError, "images", {}, dict(images=[[0.5]])),
    "images of bytes": (
        TypeError,
        "images",
        {},
        dict(images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
    ),
    "images of one dimension": (ValueError, "images", {}, dict(images=torch.zeros(2))),
    "images below the bounds": (ValueError, "images", {}, dict(images=GOOD["images"] - 0.6)),
    "images above the bounds": (ValueError, "images", {}, dict(images=GOOD["images"] * 255)),
    "images NaN": (ValueError, "images", {}, dict(images=GOOD["images"] * torch.nan)),
    "images elsewhere": (ValueError, "images", {}, dict(images=GOOD["images"].to("meta"))),
    "labels of floats": (TypeError, "labels", {}, dict(labels=torch.tensor([0.0, 1.0]))),
    "labels of another batch": (ValueError, "labels", {}, dict(labels=torch.tensor([0]))),
    "labels one-hot": (ValueError, "labels", {}, dict(labels=torch.eye(2).long())),
    "labels is a list": (TypeError, "labels", {}, dict(labels=[0, 1])),
    "labels elsewhere": (
        ValueError,
        "labels",
        {},
        dict(labels=torch.tensor([0, 1], device="meta")),
    ),
    "label too large": (ValueError, "labels", {}, dict(labels=torch.tensor([0, CLASSES]))),
    "label negative": (ValueError, "labels", {}, dict(labels=torch.tensor([0, -1]))),
    "labels missing": (ValueError, "labels", dict(targeted=True), dict(labels=None)),
    "eps of another batch": (ValueError, "eps", dict(eps=torch.zeros(3)), {}),
    "step_size of another batch": (ValueError, "step_size", dict(step_size=torch.zeros(1)), {}),
    "model returns a dict": (TypeError, "model", dict(model=Half()), {}),
    "model returns images": (ValueError, "model", dict(model=nn.Identity()), {}),
    "model without a graph": (
        ValueError,
        "model",
        dict(model=lambda x: x.detach().flatten(1)),
        {},
    ),
    "model of something else": (
        ValueError,
        "model",
        dict(model=lambda x: torch.ones(2, CLASSES, requires_grad=True) * 2),
        {},
    ),
    "loss averages": (ValueError, "loss", dict(loss=F.cross_entropy), {}),
    "targets of floats": (TypeError, "targeted", dict(targeted=lambda x, y: y * 0.5), {}),
    "targets out of range": (ValueError, "targeted", dict(targeted=lambda x, y: y + CLASSES), {}),
    "targets of one class": (
        ValueError,
        "model",
        dict(model=nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), targeted="random"),
        dict(labels=torch.tensor([0, 0])),
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    error, argument, settings, changed = BAD_CALLS[case]
    attack = PGD(**(dict(model=small_cnn()) | settings))
    with pytest.raises(error, match=rf"pyvit\.attacks\.PGD: `{argument}` must be .*; got "):
        attack(**(GOOD | changed))


def test_the_message_names_the_attack():
    with pytest.raises(ValueError, match=r"pyvit\.attacks\.FGSM: `images` must be within bounds"):
        FGSM(small_cnn())(GOOD["images"] * 3, GOOD["labels"])
    with pytest.raises(ValueError, match="normalized"):
        FGSM(small_cnn())(GOOD["images"] * 3, GOOD["labels"])


BAD_NORMALIZATIONS = {
    "model is a function": (TypeError, "model", dict(model=lambda x: x)),
    "mean is a text": (TypeError, "mean", dict(mean="0.5")),
    "mean is one number": (ValueError, "mean", dict(mean=0.5)),
    "std of another length": (ValueError, "std", dict(std=(0.2, 0.2))),
    "std 0": (ValueError, "std", dict(std=(0.2, 0.2, 0.0))),
    "std NaN": (ValueError, "std", dict(std=(0.2, 0.2, float("nan")))),
}


@pytest.mark.parametrize("case", BAD_NORMALIZATIONS)
def test_bad_normalizations_name_the_argument(case):
    error, argument, changed = BAD_NORMALIZATIONS[case]
    arguments = dict(model=small_cnn(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)) | changed
    message = rf"pyvit\.attacks\.normalized: `{argument}` must be .*; got "
    with pytest.raises(error, match=message):
        normalized(**arguments)


def test_a_rule_of_ones_own():
    """The base class alone: begin, move, and state that follows the live images."""

    class Walk(Attack):
        steps = 3

        def begin(self, batch):
            batch.rule["visits"] = torch.zeros(len(batch.x))

        def move(self, batch, grad):
            batch.rule["visits"] += 1
            assert len(batch.rule["visits"]) == len(batch.x) == len(grad)
            return (batch.x + 0.01 * grad.sign()).clamp(*self.bounds)

    model, (images, labels) = small_cnn(), batch(8)
    adversarial = Walk(model, early_stop=True)(images, labels)
    assert float((adversarial - images).abs().max()) <= 0.03 + 1e-6
