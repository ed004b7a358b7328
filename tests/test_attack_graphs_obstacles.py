"""Models and rules that cannot be recorded: attacked without graphs, after a warning."""

from __future__ import annotations

import pytest
import torch
from attack_models import batch, small_cnn
from recorded_attacks import (
    PGD,
    STEPS,
    CountsCalls,
    DrawsWithNumpy,
    DrawsWithPython,
    Hooked,
    KeepsWhatItSaw,
    MakesTensors,
    ReadsValues,
    attacked,
    from_the_same_seed,
)

from pyvit.attacks import graph

pytestmark = pytest.mark.usefixtures("no_warning")


OBSTACLES = {
    ReadsValues: "waits for the GPU in aten._local_scalar_dense",
    MakesTensors: "waits for the GPU in aten.lift_fresh",
    DrawsWithPython: "changes Python's random numbers on the host",
    DrawsWithNumpy: "changes numpy's random numbers on the host",
    CountsCalls: "changes `CountsCalls.number` on the host",
    KeepsWhatItSaw: "changes `KeepsWhatItSaw.seen` on the host",
    Hooked: "the model has hooks",
}


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
