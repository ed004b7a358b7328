"""PGD end to end: our loop on our layers, against torchattacks and a plain loop on torch's."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import OURS, Case, Options, Row, run_under_pytest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pyvit

EPS, STEP = 8 / 255, 2 / 255
OUR_LAYERS = "torchattacks, our layers"
OUR_LOOP = "our loop, graph=False"  # beside the loop that replays its steps
IN_FLOAT32 = "plain loop, float32"  # beside a bfloat16 row, for its speed alone


@dataclass(frozen=True)
class Victim:
    """A model on torch's layers, and what our copy of it gets."""

    name: str
    make: Callable[[], nn.Module]
    batch: int  # powers of two: torchattacks divides the loss by it
    size: int  # height and width in pixels
    topk: int | None = None  # keys that each query of our copy keeps
    convolutional: bool = False  # then ours is channels_last, and a peer
    dtype: torch.dtype = torch.float32  # of model and images


def victims() -> list[Victim]:
    found = [
        Victim("CNN 3x64x64", small_cnn, 16, 64, convolutional=True),
        Victim("ResNet-18 3x224x224", ResNet18, 8, 224, convolutional=True),
    ]
    if importlib.util.find_spec("timm") is not None:
        found.append(Victim("ViT-Ti/16 3x224x224", vit_tiny, 8, 224))
        found.append(Victim("ViT-Ti/16 3x224x224, ours top-k 32", vit_tiny, 8, 224, topk=32))
    return found


def gpu_victims() -> list[Victim]:
    found = [Victim("ResNet-18 3x224x224 bfloat16", ResNet18, 64, 224, None, True, torch.bfloat16)]
    if importlib.util.find_spec("timm") is not None:
        single = Victim("ViT-B/16 3x224x224", vit_base, 64, 224)
        half = replace(single, name=f"{single.name} bfloat16", dtype=torch.bfloat16)
        found += [single, half, replace(half, name=f"{half.name}, ours top-k 32", topk=32)]
    return found


def cases(options: Options) -> list[Case]:
    steps = 2 if options.quick else 10
    found = []
    for victim in gpu_victims() if options.gpu_rows else victims():
        if options.quick:
            victim = replace(victim, batch=2)
        name = f"{victim.batch} images, {victim.name}"
        found.append(Case("attacks", f"PGD-{steps}", name, partial(build, victim, steps)))
        if options.gpu_rows:
            replayed = partial(build, victim, steps, graph=True)
            found.append(Case("attacks", f"PGD-{steps} replayed", name, replayed))
    return found


def small_cnn() -> nn.Module:
    """A stem and four 3x3 layers; 64x64 images, 10 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.ReLU()]
    for channels, out_channels, stride in ((64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)):
        layers.append(nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, and a way around them."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            projection = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.around = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.around(x))


class ResNet18(nn.Sequential):
    """He et al. (2016), 18 layers, random weights, 10 classes."""

    def __init__(self) -> None:
        stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)]
        layers: list[nn.Module] = [*stem, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        channels = 64
        for width in (64, 128, 256, 512):
            layers.append(BasicBlock(channels, width, stride=1 if width == 64 else 2))
            layers.append(BasicBlock(width, width, stride=1))
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def vit_tiny() -> nn.Module:
    return _vit("vit_tiny_patch16_224")


def vit_base() -> nn.Module:
    return _vit("vit_base_patch16_224")


def _vit(name: str) -> nn.Module:
    """timm's, with random weights; dense attention."""
    import torchvision_shim

    torchvision_shim.install()
    import timm

    model = timm.create_model(name, num_classes=10)
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


def build(victim: Victim, steps: int, graph: bool = False) -> Row:
    """``graph``: steps are recorded once and replayed, against our loop that runs each."""
    torch.manual_seed(0)
    torchs = victim.make().eval().to(victim.dtype)
    ours = copy.deepcopy(torchs)
    pyvit.replace_layers(ours, attention={"topk": victim.topk})
    images = torch.rand(victim.batch, 3, victim.size, victim.size).to(victim.dtype)
    labels = torch.arange(victim.batch) % 10
    ours_images = images
    if victim.convolutional:
        ours = ours.to(memory_format=torch.channels_last)
        ours_images = images.contiguous(memory_format=torch.channels_last)
    attack = partial(pyvit.attacks.PGD, ours, eps=EPS, step_size=STEP, steps=steps)
    our_loop = partial(attack(random_start=False), ours_images, labels)
    peers = _peers(victim, torchs, images, labels, steps)
    if "torchattacks" in peers:
        peers[OUR_LAYERS] = partial(_torchattacks(ours, steps), ours_images, labels)
    if graph:
        peers = {name: peer for name, peer in peers.items() if name.startswith("torchattacks")}
        peers[OUR_LOOP] = our_loop
    return Row(
        ours=_replayed(attack, ours_images, labels) if graph else our_loop,
        peers=peers,
        flops=_flops_of_a_step(victim, torchs, images, labels) * steps,
        bytes=2.0 * images.numel() * images.element_size(),
        check=partial(same_attack, torchs, ours, images, labels, steps),
        dtype=victim.dtype,
    )


def _replayed(attack: Callable[..., Any], images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """As for many batches: what the first call records, the others replay. Where the rows are
    rehearsed without a GPU, each step runs."""
    on_gpu = torch.get_default_device().type == "cuda"
    loop = attack(random_start=False, graph=on_gpu)
    kept = loop.keep_graphs()
    kept.__enter__()  # ends with the row: what is recorded is let go when `kept` is

    def run(kept: Any = kept) -> Tensor:
        return loop(images, labels)

    return run


def _peers(
    victim: Victim, torchs: nn.Module, images: Tensor, labels: Tensor, steps: int
) -> dict[str, Callable[[], Any]]:
    peers: dict[str, Callable[[], Any]] = {
        "plain loop": partial(plain_pgd, torchs, images, labels, steps)
    }
    if victim.dtype is not torch.float32:
        single = copy.deepcopy(torchs).float()
        peers[IN_FLOAT32] = partial(plain_pgd, single, images.float(), labels, steps)
    if importlib.util.find_spec("torchattacks") is None:
        return peers
    peers["torchattacks"] = partial(_torchattacks(torchs, steps), images, labels)
    if victim.convolutional:
        last = copy.deepcopy(torchs).to(memory_format=torch.channels_last)
        images_last = images.contiguous(memory_format=torch.channels_last)
        peers["torchattacks, channels_last"] = partial(
            _torchattacks(last, steps), images_last, labels
        )
    return peers


def _flops_of_a_step(victim: Victim, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Forward, and backward to the image alone: what is needed, not what a loop may do."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        plain_pgd(lambda x: frozen(x * 1), images, labels, steps=1)  # its hooks refuse a leaf
    flops = float(counter.get_total_flops())
    if victim.topk is not None:  # the counter saw dense attention: 4 and 10 operations a pair
        blocks = model.blocks
        heads, dim = blocks[0].attn.num_heads, blocks[0].attn.head_dim
        queries = (victim.size // 16) ** 2 + 1
        left_out = 12 * queries - 10 * victim.topk  # of 14: 2 for the scores, 2 + 8 a kept pair
        flops -= len(blocks) * victim.batch * heads * dim * queries * left_out
    return flops


def _torchattacks(model: nn.Module, steps: int) -> Callable[..., Tensor]:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)


def same_attack(
    torchs: nn.Module,
    ours: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    results: Mapping[str, Tensor],
) -> dict[str, str]:
    """Inside the ball, and as strong as the plain loop on the same model.

    sign() turns a rounding of a gradient near zero into a step of the other sign, and later steps
    build on it: between kernels that round differently the loss is compared, not the pixels.
    """
    wrong = {}
    wanted = {model: plain_pgd(model, images, labels, steps) for model in (torchs, ours)}
    for name, x in results.items():
        if name == IN_FLOAT32:
            continue
        model = ours if name in (OURS, OUR_LAYERS, OUR_LOOP) else torchs
        with torch.no_grad():
            loss, plain, clean = (
                F.cross_entropy(model(y).float(), labels).item() for y in (x, wanted[model], images)
            )
        reach = (x - images).abs().max().item()
        ulp = torch.finfo(x.dtype).eps
        if reach > EPS + ulp or x.min() < 0 or x.max() > 1:
            wrong[name] = f"outside the ball or the bounds: moved by {reach:.6f}"
        elif not abs(loss - plain) <= 0.01 * (plain - clean) + ulp * plain:  # rounded logits
            wrong[name] = f"loss {loss:.4f}, the plain loop reaches {plain:.4f}"
    if OUR_LOOP in results and not torch.equal(results[OURS], results[OUR_LOOP]):
        wrong[OURS] = "replayed steps do not give the same bits as those that run"
    same_layers = results.get(OUR_LAYERS)
    # In bfloat16 the mean of their loss and the sum of ours round to other gradients.
    comparable = same_layers is not None and images.dtype is torch.float32
    if comparable and not torch.equal(results[OURS], same_layers):
        wrong[OURS] = "not bit for bit what torchattacks gives on the same model"
    return wrong


def test_attacks(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
