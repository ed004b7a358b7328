from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim
from torch import nn

from pyvit.attacks import FGSM, PGD, Attack, Counts, losses, normalized
from pyvit.nn import Conv2d
from pyvit.ops import projected_step

CLASSES = 4


def small_cnn(channels: int = 3, size: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * (size // 2) ** 2, CLASSES),
    )


def batch_invariant_cnn() -> nn.Module:
    """Made of layers whose results for one image do not depend on the others, bit for bit."""
    torch.manual_seed(1)
    return nn.Sequential(Conv2d(3, 8, 3, padding=1), nn.ReLU(), Conv2d(8, CLASSES, 8), nn.Flatten())


def batch(count: int = 8, size: int = 16, channels: int = 3):
    return torch.rand(count, channels, size, size), torch.randint(0, CLASSES, (count,))


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
