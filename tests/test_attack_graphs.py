"""Attacks whose steps are recorded and replayed; on the CPU, by a stand-in for CUDA's graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attack_models import CLASSES, batch, small_cnn
from recorded_attacks import PGD, STEPS, attacked, both
from recorded_ops import RecordedOps

from pyvit.attacks import FGSM, Attack, Counts, graph
from pyvit.models import VisionTransformer
from pyvit.ops import projected_step

pytestmark = pytest.mark.usefixtures("no_warning")


# ---- the same images ------------------------------------------------------------------------


@pytest.mark.parametrize("norm, scale", [("linf", 1), ("l2", 10), ("l1", 50)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_same_images_and_counts(recorder, norm, scale, memory_format):
    model, images, labels, eps = attacked(memory_format=memory_format)
    options = dict(norm=norm, eps=eps * scale, step_size=eps * scale / 4, steps=STEPS)
    (expected, counted), (adversarial, counts) = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert adversarial.stride() == expected.stride()
    assert counts == counted == Counts(40 * STEPS, 40 * STEPS)
    assert (recorder.captures, recorder.replays) == (1, STEPS - graph.WARM_UP)
    assert recorder.handed_over[0] is adversarial


@pytest.mark.parametrize("norm, scale", [("linf", 1), ("l2", 10), ("l1", 50)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_early_stop_gives_the_same_images_from_fewer_batch_sizes(
    recorder, norm, scale, memory_format
):
    model, images, labels, eps = attacked(60, 6.0, memory_format)
    options = dict(norm=norm, eps=eps * scale, step_size=eps * scale / 20, steps=40)
    (expected, few), (adversarial, counts) = both(model, images, labels, early_stop=True, **options)
    assert torch.equal(adversarial, expected)
    assert recorder.captures >= 3  # 60, 30, 15 or 8
    assert recorder.replays > 15
    assert few.gradients < counts.gradients < 60 * 40 * 0.6


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_vision_transformer_of_ours(recorder, autocast, early_stop):
    options = dict(embed_dim=48, depth=2, num_heads=4, num_classes=CLASSES, topk=6)
    model = VisionTransformer(img_size=32, patch_size=8, **options).eval()
    images, _ = batch(24, 32)
    with torch.no_grad():
        labels = model(images).argmax(1)
    options = dict(eps=torch.linspace(0.0, 0.05, 24), step_size=0.002, steps=30)
    more = dict(autocast=autocast, early_stop=early_stop)
    (expected, _), (adversarial, counts) = both(model, images, labels, **options, **more)
    assert torch.equal(adversarial, expected)
    assert recorder.captures >= 2 if early_stop else recorder.captures == 1
    assert (counts.gradients < 24 * 30) == early_stop


def test_early_stop_where_all_images_fall(recorder):
    model, images, labels, _ = attacked()
    options = dict(eps=1.0, step_size=0.02, steps=200, early_stop=True)
    (expected, _), (adversarial, counts) = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert (model(adversarial).argmax(1) != labels).all()
    assert counts.gradients < 40 * 200 / 2
    few = images[:5], labels[:5]
    _, counts = PGD(model, graph=True, **options)(*few, return_counts=True)
    assert counts.gradients < 5 * 200 / 2  # the smallest batch, too, is left when all have fallen


def test_restarts_replay_what_the_first_run_recorded(recorder):
    model, images, labels, eps = attacked()
    options = dict(eps=eps, step_size=eps / 4, steps=STEPS, restarts=4)
    (expected, _), (adversarial, _) = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert recorder.captures == 1
    assert recorder.replays == 4 * STEPS - graph.WARM_UP


def test_what_is_recorded_is_used_for_however_few_steps(recorder):
    model, images, labels, _ = attacked()
    PGD(model, steps=graph.WARM_UP + 2, restarts=3, graph=True)(images, labels)
    assert recorder.captures == 1
    assert recorder.replays == 2 + 2 * (graph.WARM_UP + 2)


@pytest.mark.parametrize("early_stop", [False, True])
def test_progress_bar(recorder, capsys, early_stop):
    pytest.importorskip("tqdm")
    model, images, labels, _ = attacked()
    options = dict(steps=STEPS, progress=True, early_stop=early_stop)
    PGD(model, eps=1.0 if early_stop else 0.01, **options)(images, labels)
    assert recorder.replays > 0
    assert f" {STEPS}/{STEPS} " in capsys.readouterr().err


def test_restarts_of_images_that_resist_fill_slots_up(recorder):
    """Restarts of any number of images: slots beyond them repeat one, and change nothing."""
    model, images, labels, eps = attacked()
    options = dict(eps=eps, step_size=eps / 4, steps=30, restarts=4, early_stop=True)
    (expected, _), (adversarial, _) = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert recorder.captures <= 3  # 40, 20, 10


@pytest.mark.parametrize("targeted", [True, "least_likely", "random"])
@pytest.mark.parametrize("loss", ["margin", lambda logits, labels: -logits.exp().sum(1)])
def test_targets_and_losses(recorder, targeted, loss):
    model, images, labels, eps = attacked()
    options = dict(eps=eps, steps=STEPS, targeted=targeted, loss=loss)
    (expected, _), (adversarial, _) = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert recorder.replays > 0


def test_random_models_draw_anew_in_each_replay(recorder):
    model, (images, labels) = small_cnn(), batch(8)
    options = dict(eps=0.1, steps=STEPS, model_mode="keep")
    before = [b.clone() for b in model.buffers()]
    (expected, _), (adversarial, _) = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert recorder.replays > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers()))


class Momentum(Attack):
    """State of each kind: replaced, changed in place, and the old value of another."""

    replayable = True
    steps = STEPS

    def begin(self, batch):
        batch.rule["momentum"] = torch.zeros_like(batch.x)
        batch.rule["visits"] = torch.zeros(len(batch.x))
        batch.rule["before"] = batch.x
        batch.rule["decay"] = 0.9

    def move(self, batch, grad):
        before, batch.rule["before"] = batch.rule["before"], batch.x
        batch.rule["visits"] += 1
        x, batch.rule["momentum"] = projected_step(
            batch.x + 0.1 * (batch.x - before),
            grad,
            batch.x0,
            norm="linf",
            step_size=0.002 * batch.rule["visits"],
            eps=0.1,
            momentum=batch.rule["momentum"],
            decay=batch.rule["decay"],
        )
        return x


@pytest.mark.parametrize("early_stop", [False, True])
def test_what_a_rule_keeps_for_each_image(recorder, early_stop):
    model, images, labels, _ = attacked()
    expected = Momentum(model, graph=False, early_stop=early_stop)(images, labels)
    assert torch.equal(Momentum(model, graph=None, early_stop=early_stop)(images, labels), expected)
    assert recorder.replays > 0


def test_the_images_are_not_the_memory_of_later_replays(recorder):
    model, images, labels, eps = attacked()
    attack = PGD(model, eps, steps=STEPS, random_start=False)
    with attack.keep_graphs():
        first = attack(images, labels)
        kept = first.clone()
        attack(images.flip(0), labels.flip(0))
    assert recorder.captures == 1
    assert torch.equal(first, kept)


# ---- when graphs are used -------------------------------------------------------------------


def test_too_few_steps_are_not_recorded(recorder):
    model, images, labels, _ = attacked()
    PGD(model, steps=graph.WARM_UP + graph.PAYS - 1)(images, labels)
    assert recorder.captures == 0
    PGD(model, steps=graph.WARM_UP + graph.PAYS)(images, labels)
    assert recorder.captures == 1
    PGD(model, steps=graph.WARM_UP + 1, graph=True)(images, labels)
    assert recorder.captures == 2
    PGD(model, steps=graph.WARM_UP, graph=True)(images, labels)
    PGD(model, steps=50, graph=False)(images, labels)
    PGD(model, steps=50)(images[:0], labels[:0])
    assert recorder.captures == 2


def test_without_a_gpu_nothing_is_recorded():
    model, images, labels, _ = attacked()
    assert graph.capture_for(images.device, None) is None
    attack = PGD(model, steps=50, random_start=False)
    expected = PGD(model, steps=50, random_start=False, graph=False)(images, labels)
    assert torch.equal(attack(images, labels), expected)
    with attack.keep_graphs():
        assert torch.equal(attack(images, labels), expected)
    with pytest.raises(NotImplementedError, match=r"PGD: `graph` must be .*; got True, but .* cpu"):
        PGD(model, graph=True)(images, labels)


def test_labels_are_checked_before_a_replay(recorder):
    model, images, labels, _ = attacked()
    attack = PGD(model, steps=STEPS)
    with attack.keep_graphs():
        with pytest.raises(ValueError, match="`labels` must be classes"):
            attack(images, labels.clone().fill_(CLASSES))
        attack(images, labels)
        with pytest.raises(ValueError, match="`labels` must be classes"):
            attack(images, labels.clone().fill_(CLASSES))
    assert recorder.captures == 1


def test_labels_are_checked_outside_what_is_watched(recorder):
    """Runs that end after a step each warm up; the last look is then at a run's first step."""
    model, images, labels, eps = attacked()
    attack = PGD(model, eps, steps=STEPS, early_stop=True)
    wrong = labels.clone().fill_(CLASSES)
    with attack.keep_graphs():
        for _ in range(graph.WARM_UP):
            attack(images, (labels + 2) % CLASSES)
            with pytest.raises(ValueError, match="`labels` must be classes"):
                attack(images, wrong)
        assert recorder.captures == 0
        attack(images, labels)
    assert recorder.captures > 0


# ---- autocast -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_autocast_by_hand(monkeypatch, dtype, recorded):
    if recorded:
        monkeypatch.setattr(graph, "capture_for", lambda device, generator: RecordedOps())
    model, (images, labels) = small_cnn().eval(), batch(4)
    seen = []

    def loss(logits, labels):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels, reduction="none")

    ours = PGD(model, 0.05, 0.01, STEPS, random_start=False, autocast=dtype, loss=loss)
    x = images
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype):
            logits = model(x)
        assert logits.dtype == dtype
        (grad,) = torch.autograd.grad(loss(logits.float(), labels).sum(), x)
        x = projected_step(x, grad, images, norm="linf", step_size=0.01, eps=0.05)
    assert torch.equal(ours(images, labels), x)
    assert set(seen) == {torch.float32}
    plain = PGD(model, 0.05, 0.01, STEPS, random_start=False)(images, labels)
    assert not torch.equal(plain, x)  # the dtype does matter
    fgsm = FGSM(model, 0.05, autocast=dtype)(images, labels)
    assert fgsm.dtype == images.dtype
    assert float((fgsm - images).abs().max()) <= 0.05 + 1e-6


def test_autocast_of_the_caller_is_used(recorder):
    model, images, labels, eps = attacked()
    options = dict(eps=eps, steps=STEPS, random_start=False)
    attack = PGD(model, **options)
    with attack.keep_graphs():
        plain = attack(images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            cast = attack(images, labels)
            assert torch.equal(cast, PGD(model, graph=False, **options)(images, labels))
    assert recorder.captures == 2
    assert not torch.equal(plain, cast)


@pytest.mark.parametrize(
    "error, argument, changed",
    [
        (TypeError, "graph", dict(graph="auto")),
        (TypeError, "graph", dict(graph=1)),
        (ValueError, "autocast", dict(autocast=torch.float32)),
        (ValueError, "autocast", dict(autocast="bfloat16")),
        (ValueError, "autocast", dict(autocast=True)),
    ],
)
def test_bad_settings_name_the_argument(error, argument, changed):
    with pytest.raises(error, match=rf"pyvit\.attacks\.PGD: `{argument}` must be .*; got "):
        PGD(small_cnn(), **changed)
