"""PGD end to end: our loop on our layers, against torchattacks and a plain loop on torch's."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import OURS, Case, Options, Row, run_under_pytest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pyvit

EPS, STEP = 8 / 255, 2 / 255


def cases(options: Options) -> list[Case]:
    steps = 2 if options.quick else 10
    models: list[tuple[str, Callable[[], nn.Module], int]] = [("CNN 3x64x64", small_cnn, 16)]
    if importlib.util.find_spec("timm") is not None:
        models.append(("ViT-Ti/16 3x224x224", vit_tiny, 4))
    found = []
    for name, make_model, batch in models:
        size = 2 if options.quick else batch  # powers of two: torchattacks divides the loss by it
        work = partial(build, make_model, size, steps)
        found.append(Case("attacks", f"PGD-{steps}", f"{size} images, {name}", work))
    return found


def small_cnn() -> nn.Module:
    """A stem and four 3x3 layers; 64x64 images, 10 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.ReLU()]
    for channels, out_channels, stride in ((64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)):
        layers.append(nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def vit_tiny() -> nn.Module:
    """timm's, with random weights; dense attention."""
    import torchvision_shim

    torchvision_shim.install()
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    nn.init.normal_(model.head.weight, std=0.1)  # timm's zero logits have no gradient to follow
    return model


def plain_pgd(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, steps: int
) -> Tensor:
    """The loop that everyone writes; parameters are not frozen, so their gradients are paid too."""
    x = images.clone()
    for _ in range(steps):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        x = x.detach() + STEP * grad.sign()
        x = (images + (x - images).clamp(-EPS, EPS)).clamp(0, 1)
    return x


def build(make_model: Callable[[], nn.Module], batch: int, steps: int) -> Row:
    torch.manual_seed(0)
    torchs = make_model().eval()
    ours = copy.deepcopy(torchs)
    pyvit.replace_layers(ours, attention={"topk": None})
    size = 224 if make_model is vit_tiny else 64
    images, labels = torch.rand(batch, 3, size, size), torch.arange(batch) % 10
    attack = pyvit.attacks.PGD(ours, eps=EPS, step_size=STEP, steps=steps, random_start=False)
    peers: dict[str, Callable[[], Any]] = {
        "plain loop": partial(plain_pgd, torchs, images, labels, steps)
    }
    if importlib.util.find_spec("torchattacks") is not None:
        for name, model in {"torchattacks": torchs, "torchattacks, our layers": ours}.items():
            peers[name] = partial(_torchattacks(model, steps), images, labels)
    # The step needs the image's gradient alone: a model with frozen parameters counts just that.
    frozen = copy.deepcopy(torchs).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        plain_pgd(lambda x: frozen(x * 1), images, labels, steps=1)  # its hooks refuse a leaf
    return Row(
        ours=partial(attack, images, labels),
        peers=peers,
        flops=float(counter.get_total_flops() * steps),
        bytes=2.0 * images.numel() * images.element_size(),
        check=partial(same_attack, torchs, images, labels),
    )


def _torchattacks(model: nn.Module, steps: int) -> Callable[..., Tensor]:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)


def same_attack(
    model: nn.Module, images: Tensor, labels: Tensor, results: Mapping[str, Tensor]
) -> dict[str, str]:
    """Inside the ball, and as strong as the plain loop.

    sign() turns a rounding of a gradient near zero into a step of the other sign, and later steps
    build on it: between kernels that round differently the loss is compared, not the pixels.
    """
    with torch.no_grad():
        losses = {name: F.cross_entropy(model(x), labels).item() for name, x in results.items()}
        gained = losses["plain loop"] - F.cross_entropy(model(images), labels).item()
    wrong = {}
    for name, x in results.items():
        reach = (x - images).abs().max().item()
        if reach > EPS + torch.finfo(x.dtype).eps or x.min() < 0 or x.max() > 1:
            wrong[name] = f"outside the ball or the bounds: moved by {reach:.6f}"
        elif not abs(losses[name] - losses["plain loop"]) <= 0.01 * gained:
            wrong[name] = (
                f"loss {losses[name]:.4f}, the plain loop reaches {losses['plain loop']:.4f}"
            )
    same_layers = results.get("torchattacks, our layers")
    if same_layers is not None and not torch.equal(results[OURS], same_layers):
        wrong[OURS] = "not bit for bit what torchattacks gives on the same model"
    return wrong


def test_attacks(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
