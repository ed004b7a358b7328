"""Attacks: their rules, against torchattacks and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim
from attack_models import CLASSES, batch, batch_invariant_cnn, small_cnn
from torch import nn

from pyvit.attacks import FGSM, PGD, Counts, losses
from pyvit.ops import projected_step


@pytest.fixture(scope="module")
def toy():
    """A trained model and its test images: four blurred patterns in noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = 0.3 + 0.4 * torch.rand(CLASSES, 1, 8, 8, generator=generator)

    def draw(count):
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        noise = 0.15 * torch.randn(count, 1, 8, 8, generator=generator)
        return (patterns[labels] + noise).clamp(0, 1), labels

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        images, labels = draw(64)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    images, labels = draw(200)
    assert accuracy(model, images, labels) > 0.95
    return model, images, labels


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean().item()


# ---- equal to torchattacks ------------------------------------------------------------------


@pytest.fixture
def torchattacks():
    return torchvision_shim.importorskip("torchattacks")


@pytest.mark.parametrize("count", [1, 8, 16])
def test_fgsm_equals_torchattacks_bit_for_bit(torchattacks, count):
    model, (images, labels) = small_cnn(), batch(count)
    ours = FGSM(model, eps=0.03)(images, labels)
    assert torch.equal(ours, torchattacks.FGSM(model, eps=0.03)(images, labels))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("count", [1, 8, 16])
def test_pgd_equals_torchattacks_bit_for_bit(torchattacks, count, random_start, memory_format):
    model, (images, labels) = small_cnn(), batch(count)
    images = images.contiguous(memory_format=memory_format)
    theirs = torchattacks.PGD(model, eps=0.05, alpha=0.01, steps=20, random_start=random_start)
    ours = PGD(model, eps=0.05, step_size=0.01, steps=20, random_start=random_start)
    torch.manual_seed(5)
    expected = theirs(images, labels)
    torch.manual_seed(5)
    assert torch.equal(ours(images, labels), expected)


def test_pgd_with_the_mean_loss_equals_torchattacks_at_any_batch_size(torchattacks):
    """Ours sums; their 1/B rounds where B is no power of two. Given their loss, no difference."""

    def mean(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none") / len(labels)

    model, (images, labels) = small_cnn(), batch(7)
    theirs = torchattacks.PGD(model, steps=20, random_start=False)(images, labels)
    ours = PGD(model, steps=20, random_start=False, loss=mean)(images, labels)
    assert torch.equal(ours, theirs)
    summed = PGD(model, steps=20, random_start=False)(images, labels)
    assert (summed != theirs).float().mean() <= 0.005


def test_targeted_pgd_equals_torchattacks_bit_for_bit(torchattacks):
    model, (images, labels) = small_cnn(), batch(8)
    theirs = torchattacks.PGD(model, steps=10, random_start=False)
    ours = PGD(model, steps=10, random_start=False, targeted=True)
    theirs.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(ours(images, labels), theirs(images, labels))
    theirs.set_mode_targeted_least_likely(quiet=True)
    ours = PGD(model, steps=10, random_start=False, targeted="least_likely")
    with torch.no_grad():
        predicted = model.eval()(images).argmax(1)
    assert torch.equal(ours(images, predicted), theirs(images, predicted))


def test_pgd_l2_agrees_with_torchattacks(torchattacks):
    model, (images, labels) = small_cnn(), batch(8)
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=10, random_start=False)
    ours = PGD(model, eps=0.5, step_size=0.1, steps=10, norm="l2", random_start=False)
    # Norms are summed in another order; ten steps of it stay within a few roundings.
    difference = (ours(images, labels) - theirs(images, labels)).abs().max()
    assert float(difference) <= 1e-5


# ---- the definition -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("step", ["sign", "raw"])
def test_pgd_by_hand(norm, step):
    model, (images, labels) = small_cnn(), batch(3)
    eps, step_size = {"linf": (0.05, 0.02), "l2": (0.5, 0.2), "l1": (5.0, 2.0)}[norm]
    options = dict(norm=norm, step=step, eps=eps, step_size=step_size)
    ours = PGD(model, steps=3, random_start=False, **options)(images, labels)
    model.eval()
    x = images
    for _ in range(3):
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x)
        x = projected_step(x, grad, images, **options)
    assert torch.equal(ours, x)


@pytest.mark.parametrize("norm, order", [("linf", torch.inf), ("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("one_an_image", [False, True])
def test_random_start_is_uniform_in_the_ball(norm, order, one_an_image):
    """(distance / eps)^pixels is uniform in [0, 1], and the signs are fair."""
    count, pixels = 4000, 6
    images = torch.zeros(count, 1, 2, 3)
    eps = torch.linspace(0.5, 3, count) if one_an_image else 2.0
    generator = torch.Generator().manual_seed(0)
    attack = PGD(
        nn.Identity(), eps, 1.0, 0, norm=norm, bounds=(-9.0, 9.0), generator=generator
    )  # no step: the model is never asked
    start = attack(images, torch.zeros(count, dtype=torch.long))
    share = torch.linalg.vector_norm(start.flatten(1), order, dim=1) / eps
    assert float(share.max()) <= 1 + 1e-6
    volume = (share**pixels).sort().values
    # Kolmogorov-Smirnov: 1.95 / √n is passed with probability 0.001.
    distance = (volume - torch.linspace(0, 1, count)).abs().max()
    assert float(distance) <= 1.95 / count**0.5
    assert float(start.sign().mean((0, 1, 2, 3)).abs()) <= 4 / (count * pixels) ** 0.5


def test_linf_start_is_what_the_generator_draws():
    images, labels = batch(4)
    attack = PGD(small_cnn(), eps=0.1, steps=0, generator=torch.Generator().manual_seed(7))
    noise = torch.empty_like(images).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(7))
    first = attack(images, labels)
    assert torch.equal(first, (images + noise).clamp(0, 1))
    assert not torch.equal(first, attack(images, labels))  # the generator went on
    attack.generator.manual_seed(7)
    assert torch.equal(first, attack(images, labels))


def test_starts_are_clipped_to_the_bounds():
    images, labels = torch.full((2, 3, 16, 16), 0.95), torch.tensor([0, 1])
    for norm in ("linf", "l2", "l1"):
        start = PGD(small_cnn(), eps=50.0, norm=norm, steps=0)(images, labels)
        assert start.max() <= 1 and start.min() >= 0


def test_labels_may_be_omitted():
    model, (images, _) = small_cnn(), batch(8)
    model.eval()
    predicted = model(images).argmax(1)
    attack = PGD(model, random_start=False)
    assert torch.equal(attack(images), attack(images, predicted))
    attack = PGD(model, random_start=False, targeted="least_likely")
    assert torch.equal(attack(images), attack(images, predicted))


def test_targets():
    model, (images, labels) = small_cnn(), batch(8)
    seen = {}

    def loss(logits, targets):
        seen["targets"] = targets
        return losses.cross_entropy(logits, targets)

    def chosen(targeted, labels=labels, **options):
        PGD(model, steps=1, targeted=targeted, loss=loss, **options)(images, labels)
        return seen["targets"]

    model.eval()
    logits = model(images).detach()
    assert torch.equal(chosen(True), labels)
    least = chosen("least_likely", labels=logits.argmin(1))  # the least likely other class
    assert torch.equal(least, logits.topk(2, dim=1, largest=False).indices[:, 1])
    assert torch.equal(chosen(lambda x, y: (y + 1) % CLASSES), (labels + 1) % CLASSES)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([chosen("random", generator=generator) for _ in range(50)])
    assert not (drawn == labels).any()
    for i in range(8):
        assert set(drawn[:, i].tolist()) == set(range(CLASSES)) - {int(labels[i])}


def test_targeted_attack_goes_to_its_target(toy):
    model, images, labels = toy
    targets = (labels + 1) % CLASSES
    adversarial = PGD(model, eps=0.5, step_size=0.05, steps=20, targeted=True)(images, targets)
    assert accuracy(model, adversarial, targets) == 1.0
    adversarial = FGSM(model, eps=0.1, targeted=True)(images, targets)
    assert accuracy(model, adversarial, targets) > accuracy(model, images, targets)


def test_margin_loss():
    logits = torch.tensor([[-5.0, -3.0, -4.0], [-3.0, -5.0, -4.0]], requires_grad=True)
    margin = losses.margin(logits, torch.tensor([1, 1]))
    assert margin.tolist() == [-1.0, 2.0]  # a mask of 0 instead of -inf would give 3 and 5
    (grad,) = torch.autograd.grad(margin.sum(), logits)
    assert grad.tolist() == [[0.0, -1.0, 1.0], [1.0, -1.0, 0.0]]


def test_margin_loss_attacks(toy):
    model, images, labels = toy
    adversarial = PGD(model, eps=0.15, step_size=0.03, steps=20, loss="margin")(images, labels)
    assert accuracy(model, adversarial, labels) < 0.5 * accuracy(model, images, labels)


# ---- strength -------------------------------------------------------------------------------


def test_huge_eps_leaves_no_accuracy(toy):
    model, images, labels = toy
    for attack in (
        PGD(model, eps=1.0, step_size=0.1, steps=20),
        PGD(model, eps=8.0, step_size=1.0, steps=20, norm="l2"),
        PGD(model, eps=64.0, step_size=4.0, steps=40, norm="l1", quantile=0.9),
    ):
        assert accuracy(model, attack(images, labels), labels) == 0.0


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.4), ("l1", 2.0)])
def test_more_never_raises_robust_accuracy(toy, norm, eps):
    """More steps (early stopping keeps what worked), a larger ball."""
    model, images, labels = toy

    def robust(steps=20, eps=eps):
        options = dict(norm=norm, random_start=False, early_stop=True)
        attack = PGD(model, eps, eps / 5, steps, **options)
        return accuracy(model, attack(images, labels), labels)

    by_steps = [robust(steps) for steps in (0, 1, 3, 10, 30)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert by_steps[-1] < by_steps[0]
    by_eps = [robust(eps=eps * factor) for factor in (0.25, 0.5, 1.0, 2.0)]
    assert by_eps == sorted(by_eps, reverse=True)


def test_restarts_keep_the_best(toy):
    model, images, labels = toy
    options = dict(eps=0.07, step_size=0.07, steps=1)

    def run(**more):
        attack = PGD(model, generator=torch.Generator().manual_seed(3), **options, **more)
        return attack(images, labels)

    def fooled(adversarial):
        return model(adversarial).argmax(1) != labels

    once, often = run(), run(restarts=6)
    assert bool((fooled(often) | ~fooled(once)).all())
    assert fooled(often).sum() > fooled(once).sum()
    with torch.no_grad():
        same = fooled(often) == fooled(once)
        gain = losses.cross_entropy(model(often), labels) - losses.cross_entropy(
            model(once), labels
        )
    assert bool((gain[same] >= 0).all()) and bool((gain[same] > 0).any())
    _, counts = PGD(model, restarts=6, early_stop=True, **options)(
        images, labels, return_counts=True
    )
    assert counts.gradients < 6 * len(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.5), ("l1", 4.0)])
def test_stays_in_the_ball_in_any_dtype(dtype, norm, eps):
    model, (images, labels) = small_cnn().to(dtype), batch(4)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    adversarial = PGD(model, eps, eps / 4, norm=norm)(images, labels)
    assert adversarial.dtype == dtype and adversarial.stride() == images.stride()
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    delta = (adversarial.double() - images.double()).flatten(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    # Each pixel of the sum x0 + delta is rounded once, by half an ulp of at most 1.
    rounding = torch.linalg.vector_norm(torch.full_like(delta, torch.finfo(dtype).eps), order, 1)
    length = torch.linalg.vector_norm(delta, order, 1)
    assert bool((length <= eps * (1 + 1e-6) + rounding).all())
    assert bool((length > 0.5 * eps).all())


def test_raw_step_is_far_weaker(toy):
    model, images, labels = toy
    options = dict(eps=0.1, step_size=0.02, steps=10, random_start=False)
    sign = accuracy(model, PGD(model, **options)(images, labels), labels)
    raw = accuracy(model, PGD(model, step="raw", **options)(images, labels), labels)
    assert sign < raw


# ---- batches --------------------------------------------------------------------------------


def test_an_image_alone_is_an_image_in_a_batch():
    model, (images, labels) = batch_invariant_cnn(), batch(5, 8)
    for norm, eps in (("linf", 0.05), ("l2", 0.5), ("l1", 4.0)):
        attack = PGD(model, eps, eps / 4, norm=norm, random_start=False)
        together = attack(images, labels)
        for i in range(5):
            assert torch.equal(attack(images[i : i + 1], labels[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.2), ("l1", 1.0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_early_stop_keeps_the_first_success_and_changes_nothing_for_the_rest(
    norm, eps, memory_format
):
    model = batch_invariant_cnn()
    images, _ = batch(24, 8)
    images = images.contiguous(memory_format=memory_format)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % CLASSES  # two images are wrong from the start
    steps, eps_of_image = 6, torch.linspace(0.1, 1.5, 24) * eps
    options = dict(norm=norm, eps=eps_of_image, step_size=eps_of_image / 4, random_start=False)
    path = [PGD(model, steps=t, **options)(images, labels) for t in range(steps + 1)]
    attack = PGD(model, steps=steps, early_stop=True, **options)
    stopped, counts = attack(images, labels, return_counts=True)
    expected, gradients = path[-1].clone(), 0
    with torch.no_grad():
        for i in range(24):
            fooled = [bool(model(x[i : i + 1]).argmax(1) != labels[i]) for x in path[:-1]]
            first = fooled.index(True) if any(fooled) else steps
            expected[i] = path[first][i]
            gradients += first
    assert torch.equal(stopped, expected)
    assert torch.equal(stopped[:2], images[:2])
    assert counts.gradients == gradients
    assert 0 < gradients < 24 * steps
    assert (stopped == path[-1]).flatten(1).all(1).sum() not in (0, 24)  # the case is a real one


def test_one_value_an_image():
    model, (images, labels) = batch_invariant_cnn(), batch(4, 8)
    eps, step_size = torch.tensor([0.0, 0.01, 0.05, 0.3]), torch.tensor([0.1, 0.01, 0.02, 0.05])
    together = PGD(model, eps, step_size, random_start=False)(images, labels)
    for i in range(4):
        attack = PGD(model, float(eps[i]), float(step_size[i]), random_start=False)
        one = attack(images[i : i + 1], labels[i : i + 1])
        assert torch.equal(one, together[i : i + 1])
    assert torch.equal(together[0], images[0])
    fgsm = FGSM(model, eps)(images, labels)
    assert torch.equal(fgsm[2:3], FGSM(model, float(eps[2]))(images[2:3], labels[2:3]))


def test_empty_batch():
    images, labels = torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.long)
    assert PGD(small_cnn())(images, labels).shape == images.shape
    assert FGSM(small_cnn())(images).shape == images.shape


def test_counts():
    images, labels = batch(8)
    _, counts = PGD(small_cnn(), steps=3)(images, labels, return_counts=True)
    assert counts == Counts(forwards=24, gradients=24)
    _, counts = FGSM(small_cnn())(images, return_counts=True)
    assert counts == Counts(forwards=16, gradients=8)  # one pass for the clean prediction
