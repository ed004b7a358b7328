"""Recorded steps that later calls replay, and the memory that they hold."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from attack_models import CLASSES, batch
from recorded_attacks import PGD, STEPS, attacked
from torch import nn

from pyvit.attacks.batch import Batch
from pyvit.attacks.slots import Slots

pytestmark = pytest.mark.usefixtures("no_warning")


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
