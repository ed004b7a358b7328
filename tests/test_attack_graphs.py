"""Attacks whose steps are recorded and replayed; on the CPU, by a stand-in for CUDA's graphs."""

from __future__ import annotations

import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded_ops import RecordedOps
from test_attacks import CLASSES, batch, batch_invariant_cnn, small_cnn
from torch import nn

from pyvit import attacks
from pyvit.attacks import FGSM, Attack, Counts, graph
from pyvit.attacks.batch import Batch
from pyvit.attacks.slots import Slots
from pyvit.models import VisionTransformer
from pyvit.ops import projected_step

STEPS = 14


class PGD(attacks.PGD):
    """Takes graphs where it can."""

    def __init__(self, *arguments, graph=None, **options):
        super().__init__(*arguments, graph=graph, **options)


@pytest.fixture
def recorder(monkeypatch):
    """The CPU knows graphs, for this test."""
    stand_in = RecordedOps()
    monkeypatch.setattr(graph, "capture_for", lambda device, generator: stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def attacked(count=40, spread=3.0, memory_format=torch.contiguous_format):
    """A model, its images and labels, and one eps an image, such that images fall one by one."""
    model = batch_invariant_cnn()
    images, _ = batch(count, 8)
    images = images.contiguous(memory_format=memory_format)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % CLASSES  # two are wrong from the start
    return model, images, labels, torch.linspace(0.1, spread, count) * 0.02


def both(model, images, labels, **options):
    """Without graphs and with them, from the same seed."""
    results = []
    for use in (False, None):
        torch.manual_seed(5)
        attack = PGD(model, graph=use, **options)
        results.append(attack(images, labels, return_counts=True))
    return results


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


# ---- calls that keep graphs -----------------------------------------------------------------


def test_calls_keep_graphs_where_asked(recorder):
    model, images, labels, _ = attacked()
    options = dict(eps=0.05, steps=STEPS, random_start=False)
    expected = PGD(model, graph=False, **options)(images, labels)
    attack = PGD(model, **options)
    for _ in range(2):
        assert torch.equal(attack(images, labels), expected)
    assert (recorder.captures, recorder.closed) == (2, 2)
    with attack.keep_graphs():
        for _ in range(3):
            assert torch.equal(attack(images, labels), expected)
    assert (recorder.captures, recorder.closed) == (3, 3)
    attack(images, labels)
    assert (recorder.captures, recorder.closed) == (4, 4)


def test_kept_graphs_see_new_values_of_parameters(recorder):
    model, images, labels, _ = attacked()
    options = dict(eps=0.05, steps=STEPS, random_start=False)
    attack = PGD(model, **options)
    with attack.keep_graphs():
        first = attack(images, labels)
        with torch.no_grad():
            model[2].weight.neg_()
        second = attack(images, labels)
    assert recorder.captures == 1
    assert not torch.equal(first, second)
    assert torch.equal(second, PGD(model, graph=False, **options)(images, labels))


def change_a_mode(model, attack):
    model[1].train()


def change_a_parameter(model, attack):
    model[2].weight = nn.Parameter(-model[2].weight.detach())


def change_a_module(model, attack):
    model[1] = nn.Tanh()


def change_a_setting(model, attack):
    attack.step = "raw"


def change_a_length(model, attack):
    attack.add_lengths(step_size=0.011)


@pytest.mark.parametrize(
    "change",
    [change_a_mode, change_a_parameter, change_a_module, change_a_setting, change_a_length],
)
def test_kept_graphs_are_recorded_anew_where_something_has_changed(recorder, change):
    model, images, labels, _ = attacked()
    model.eval()
    attack = PGD(model, eps=0.05, steps=STEPS, random_start=False, model_mode="keep")
    with attack.keep_graphs():
        first = attack(images, labels)
        change(model, attack)
        second = attack(images, labels)
    assert recorder.captures == 2
    attack.graph = False
    assert torch.equal(second, attack(images, labels))
    if change is not change_a_mode:
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images.contiguous(memory_format=torch.channels_last),
        lambda images: images.flip(3),  # the same layout
        lambda images: images[:39],
    ],
)
def test_kept_graphs_are_recorded_anew_for_other_layouts_and_sizes(recorder, change):
    model, images, labels, _ = attacked()
    options = dict(eps=0.05, steps=STEPS, random_start=False)
    attack = PGD(model, **options)
    others = change(images)
    with attack.keep_graphs():
        attack(images, labels)
        for _ in range(2):
            adversarial = attack(others, labels[: len(others)])
    same = others.stride() == images.stride() and len(others) == len(images)
    assert recorder.captures == (1 if same else 2)
    expected = PGD(model, graph=False, **options)(others, labels[: len(others)])
    assert torch.equal(adversarial, expected)
    assert adversarial.stride() == expected.stride()


def test_slots_beyond_the_images_are_done_from_the_start():
    images, labels = batch(5, 8)
    rule = {"eps": torch.rand(5), "steps": 3}
    given = Batch(torch.arange(5), images, images + 1, labels, rule)
    slots = Slots(given, 8, stops=True)
    for _ in range(2):
        assert slots.live() == 5
        assert slots.done.tolist() == [False] * 5 + [True] * 3
        for name, tensor in slots.batch.tensors().items():
            assert len(tensor) == 8
            assert torch.equal(tensor[:5], given.tensors()[name])
            assert torch.equal(tensor[5:], given.tensors()[name][:1].expand_as(tensor[5:]))
        slots.done.logical_not_()
        slots.batch.x.zero_()
        slots.load(given)


def test_kept_graphs_take_batches_of_any_size_with_early_stop(recorder):
    model, images, labels, _ = attacked()
    options = dict(eps=0.03, step_size=0.002, steps=30, random_start=False, early_stop=True)
    attack, eager = PGD(model, **options), PGD(model, graph=False, **options)
    with attack.keep_graphs():
        for count in (40, 33, 21, 40, 1):
            some = images[:count], labels[:count]
            assert torch.equal(attack(*some), eager(*some))
    assert recorder.captures <= 3  # 40, 20, 10


# ---- what cannot be recorded ----------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(self.change(x))


class ReadsValues(Wrapped):
    def change(self, x):
        return x * (2 if bool(x.mean() > 0.5) else 1)


class MakesTensors(Wrapped):
    def change(self, x):
        return x * torch.tensor(2.0)


class DrawsWithPython(Wrapped):
    def change(self, x):
        return x.roll(random.randrange(4), 3)


class DrawsWithNumpy(Wrapped):
    def change(self, x):
        return x.roll(np.random.randint(4), 3)


class CountsCalls(Wrapped):
    number = 0

    def change(self, x):
        self.number += 1
        return x / self.number


class KeepsWhatItSaw(Wrapped):
    def change(self, x):
        self.seen = x.detach()
        return x


class Hooked(Wrapped):
    def __init__(self, model):
        super().__init__(model)
        self.register_forward_hook(lambda module, arguments, result: result * 2)

    def change(self, x):
        return x


OBSTACLES = {
    ReadsValues: "waits for the GPU in aten._local_scalar_dense",
    MakesTensors: "waits for the GPU in aten.lift_fresh",
    DrawsWithPython: "changes Python's random numbers on the host",
    DrawsWithNumpy: "changes numpy's random numbers on the host",
    CountsCalls: "changes `CountsCalls.number` on the host",
    KeepsWhatItSaw: "changes `KeepsWhatItSaw.seen` on the host",
    Hooked: "the model has hooks",
}


def from_the_same_seed(attack, images, labels):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    return attack(images, labels)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("kind", OBSTACLES)
def test_a_model_that_cannot_be_recorded_is_attacked_without_graphs(recorder, kind, early_stop):
    model, images, labels, eps = attacked()
    options = dict(eps=eps, step_size=eps / 4, steps=STEPS, early_stop=early_stop)
    expected = from_the_same_seed(PGD(kind(model), graph=False, **options), images, labels)
    attack = PGD(kind(model), **options)
    with pytest.warns(UserWarning) as warned:
        adversarial = from_the_same_seed(attack, images, labels)
    (warning,) = warned
    assert (
        f"PGD: steps run without CUDA graphs, because {'the' if kind is Hooked else 'a'} "
        in str(warning.message)
    )
    assert OBSTACLES[kind] in str(warning.message)
    assert "graph=False" in str(warning.message)
    assert torch.equal(adversarial, expected)
    assert recorder.captures == 0
    attack.model = kind(model)
    again = from_the_same_seed(attack, images, labels)  # once is enough: no second warning
    assert torch.equal(again, expected)


def test_the_warning_is_at_the_callers_line(recorder):
    for model in (ReadsValues(small_cnn()), Hooked(small_cnn()), lambda x: small_cnn()(x)):
        with pytest.warns(UserWarning) as warned:
            PGD(model, steps=STEPS)(*batch(4))
        assert [w.filename for w in warned] == [__file__]


@pytest.mark.parametrize("kind", [k for k in OBSTACLES if k is not Hooked])
def test_graph_true_insists(recorder, kind):
    model, images, labels, _ = attacked()
    message = rf"PGD: `graph` must be None or False here; got True, but .*{OBSTACLES[kind]}"
    with pytest.raises(NotImplementedError, match=message):
        PGD(kind(model), steps=STEPS, graph=True)(images, labels)
    assert recorder.captures == 0
    assert recorder.closed == 1
    assert all(p.requires_grad for p in model.parameters())


def test_graph_true_skips_hooks_and_takes_functions(recorder):
    model, images, labels, eps = attacked()
    for victim in (Hooked(model), lambda x: model(x) * 3):
        options = dict(eps=eps, steps=STEPS, random_start=False)
        expected = PGD(victim, graph=False, **options)(images, labels)
        assert torch.equal(PGD(victim, graph=True, **options)(images, labels), expected)
    assert recorder.captures == 2


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_capture_that_fails_is_not_tried_again(recorder, early_stop):
    recorder.fails = "capturing a step failed (RuntimeError: no memory left)"
    model, images, labels, eps = attacked()
    options = dict(eps=eps, step_size=eps / 4, steps=STEPS, random_start=False)
    expected = PGD(model, graph=False, early_stop=early_stop, **options)(images, labels)
    attack = PGD(model, early_stop=early_stop, **options)
    with pytest.warns(UserWarning, match="because capturing a step failed .*no memory left"):
        assert torch.equal(attack(images, labels), expected)
    assert torch.equal(attack(images, labels), expected)
    assert recorder.captures == 1
    with pytest.raises(NotImplementedError, match="no memory left"):
        PGD(model, graph=True, **options)(images, labels)


def test_a_models_own_exception_is_not_taken_for_an_obstacle(recorder):
    def fails(logits, labels):
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        PGD(small_cnn(), steps=STEPS, loss=fails)(*batch(4))
    assert recorder.closed == 1 and not recorder.inside


def test_parameters_elsewhere_are_an_obstacle(recorder):
    model, (images, _) = small_cnn(), batch(4)
    model.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    with pytest.raises(NotImplementedError, match="buffers that are not on cpu"):
        graph._give_up(
            attack := PGD(model, graph=True), graph._obstacle(attack, images.device), stacklevel=1
        )


class Undeclared(PGD):
    def move(self, batch, grad):
        return super().move(batch, grad)


class Declared(Undeclared):
    replayable = True


class NumberOfSteps(PGD):
    """Declares what is not so: a number of its changes from step to step."""

    replayable = True

    def begin(self, batch):
        super().begin(batch)
        batch.rule["taken"] = 0

    def move(self, batch, grad):
        batch.rule["taken"] += 1
        return super().move(batch, grad / batch.rule["taken"])


def test_a_rule_says_that_it_can_be_replayed(recorder):
    model, images, labels, eps = attacked()
    options = dict(eps=eps, steps=STEPS, random_start=False)
    expected = PGD(model, graph=False, **options)(images, labels)
    assert torch.equal(Declared(model, **options)(images, labels), expected)
    assert recorder.captures == 1
    with pytest.warns(UserWarning, match="Undeclared does not declare its `move` as `replayable`"):
        assert torch.equal(Undeclared(model, **options)(images, labels), expected)
    with pytest.raises(NotImplementedError, match="Undeclared does not declare"):
        Undeclared(model, graph=True, **options)(images, labels)
    options["step"] = "raw"
    expected = NumberOfSteps(model, graph=False, **options)(images, labels)
    with pytest.warns(UserWarning, match="the rule changes a number"):
        assert torch.equal(NumberOfSteps(model, **options)(images, labels), expected)
    assert recorder.captures == 1


# ---- memory ---------------------------------------------------------------------------------


def test_graphs_go_with_the_call_and_do_not_hold_the_model(recorder):
    model, images, labels, eps = attacked()
    attack = PGD(model, eps, steps=STEPS)
    adversarial = attack(images, labels)
    with attack.keep_graphs():
        attack(images, labels)
    recorder.handed_over.clear()
    alive = weakref.ref(model), weakref.ref(attack)
    gc.disable()
    try:
        del model, attack
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()
    assert adversarial.shape == images.shape


def test_nothing_stays_open_after_an_exception(recorder):
    class Fails(nn.Module):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("half-way")
            return x.flatten(1)[:, :CLASSES] * 2

    victim, (images, labels) = Fails(), batch(4)
    attack = PGD(victim, steps=STEPS, restarts=2)
    with pytest.raises(RuntimeError, match="half-way"), attack.keep_graphs():
        attack(images, labels)
        victim.fails = True
        attack(images, labels)
    assert recorder.closed == 1 and not recorder.inside
    assert attack._kept is None and not attack._keeps_graphs


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
