"""A vision transformer trained and attacked on real images, through pyvit's own kernels.

Run by ``make demo``. It trains a small ViT with pyvit's patch embedding and top-k attention on
scikit-learn's digits (1797 scanned 8x8 images), attacks it, compares every kernel with PyTorch's
own, puts pyvit's layers into a CNN that knows nothing of pyvit, and draws demo.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import pyvit

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
EPS = 0.1  # L-infinity, of a pixel range of 1


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images ``[B, 1, 8, 8]`` in [0, 1]."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    chosen = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    train, test = map(torch.tensor, chosen)
    return images[train], labels[train], images[test], labels[test]


def small_vit(images: Tensor) -> pyvit.models.VisionTransformer:
    """Patches of 2x2 pixels: 16 tokens and a class token, of which each query keeps 8."""
    return pyvit.models.VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        topk=8,
        mean=[images.mean().item()],
        std=[images.std().item()],
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    """Cross-entropy, AdamW, one cycle of the learning rate."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    batches = -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * batches)
    model.train()
    with tqdm(range(epochs), desc="training", unit="epoch") as bar:
        for _ in bar:
            for chosen in torch.randperm(len(images)).split(batch):
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def attack(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Adversarial images by name of the attack; the model is left exactly as it was."""
    generator = torch.Generator().manual_seed(0)
    attacks = {
        "FGSM": pyvit.attacks.FGSM(model, eps=EPS),
        "PGD-20": pyvit.attacks.PGD(
            model, eps=EPS, step_size=EPS / 8, steps=20, generator=generator
        ),
    }
    return {name: run(images, labels) for name, run in tqdm(attacks.items(), desc="attacking")}


def compare_kernels(seconds: float) -> None:
    """The first case of each group of the benchmark suite: agreement, then the ratio."""
    import machine
    import report
    import suite
    from harness import Options

    options = Options(seconds=seconds)
    first_of_group = {}
    for case in suite.collect(suite.ops(), options):
        first_of_group.setdefault((case.op, case.group), case)
    results, peaks = suite.run_all(list(first_of_group.values()), options)
    print(report.heading(machine.describe(), peaks), report.table(results, peaks), sep="\n\n")


def torch_cnn() -> nn.Module:
    """A convolutional network as anyone would write it, with torch alone."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding="valid"),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def swap_layers(images: Tensor) -> None:
    model = torch_cnn().eval()
    before = model(images)
    print(pyvit.replace_layers(model))
    after = model(images)
    difference = (after - before).abs().max() / before.abs().max()
    print(f"largest difference of the logits: {difference:.1e} of the largest logit")
    if difference > 1e-5:
        raise SystemExit("the logits do not agree")


@torch.no_grad()
def picture(
    path: Path, model: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor
) -> None:
    """Eight images, one of each digit from 0 to 7: clean, perturbation, adversarial."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [int((labels == digit).nonzero()[0]) for digit in range(8)]
    rows = (
        ("clean", images, "gray", (0, 1)),
        (f"perturbation\n(±{EPS:g})", adversarial - images, "RdBu_r", (-EPS, EPS)),
        ("adversarial", adversarial, "gray", (0, 1)),
    )
    figure, grid = pyplot.subplots(3, 8, figsize=(11, 4.9), layout="constrained")
    for line, (title, values, colours, limits) in zip(grid, rows, strict=True):
        confidence, predicted = model(values).softmax(1).max(1)
        line[0].set_ylabel(title, fontsize=11)
        for axes, column in zip(line, columns, strict=True):
            axes.imshow(values[column, 0], cmap=colours, vmin=limits[0], vmax=limits[1])
            axes.set(xticks=[], yticks=[])
            if values is images or values is adversarial:
                right = bool(predicted[column] == labels[column])
                axes.set_xlabel(
                    f"{predicted[column]}  ({confidence[column]:.0%})",
                    color="#1a7f37" if right else "#cf222e",
                    fontsize=10,
                )
    figure.suptitle(
        "PGD-20 on a ViT with top-k attention: prediction and confidence under each image, "
        "wrong ones red",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row of the table")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    asked = parser.parse_args()
    torch.manual_seed(0)

    title("1. A small vision transformer on pyvit's kernels, on scikit-learn's digits")
    train_images, train_labels, images, labels = digits()
    model = small_vit(train_images)
    begin = time.perf_counter()
    train(model, train_images, train_labels, asked.epochs)
    print(f"trained on {len(train_images)} images in {time.perf_counter() - begin:.0f} s")

    title(f"2. Under attack (L-infinity, eps {EPS:g})")
    adversarial = attack(model, images, labels)
    print(f"\naccuracy on {len(images)} test images")
    for name, attacked in {"clean": images, **adversarial}.items():
        print(f"  {name:<8} {accuracy(model, attacked, labels):6.1%}")
    picture(asked.picture, model, images, labels, adversarial["PGD-20"])
    print(f"\n{asked.picture}: clean image, perturbation, adversarial image, predictions")

    title("3. pyvit's layers in a CNN built with torch")
    swap_layers(images)

    title("4. Each kernel against PyTorch's own: agreement first, then speed")
    compare_kernels(asked.seconds)


if __name__ == "__main__":
    main()
