"""Attacks by real CUDA graphs: the same images as without, and a process that stays usable."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from attack_models import CLASSES, batch, batch_invariant_cnn, small_cnn
from recorded_attacks import (
    STEPS,
    CountsCalls,
    DrawsWithPython,
    MakesTensors,
    ReadsValues,
    from_the_same_seed,
)

from pyvit.attacks import PGD
from pyvit.attacks.capture import CudaCapture, Uncapturable
from pyvit.ops import projected_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def kernels():
    x = torch.zeros(1, 1, device="cuda")
    try:
        projected_step(x, x, x, norm="linf", step_size=0.1, eps=0.1)
    except NotImplementedError as error:
        pytest.skip(str(error))
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture
def captures(monkeypatch):
    """How many graphs were captured, and in what order."""
    taken = []
    capture = CudaCapture.capture

    def counted(self, work):
        taken.append(work)
        return capture(self, work)

    monkeypatch.setattr(CudaCapture, "capture", counted)
    return taken


def on_gpu(model, count=32, size=16, memory_format=torch.contiguous_format):
    images, labels = batch(count, size)
    images = images.to("cuda", memory_format=memory_format)
    return model.cuda(), images, labels.cuda()


def both(model, images, labels, **options):
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        results.append(PGD(model, graph=use, **options)(images, labels))
    return results


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.5), ("l1", 4.0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_the_same_images(captures, norm, eps, memory_format, autocast):
    model, images, labels = on_gpu(small_cnn(), memory_format=memory_format)
    options = dict(norm=norm, eps=eps, step_size=eps / 4, steps=STEPS, autocast=autocast)
    expected, adversarial = both(model, images, labels, restarts=2, **options)
    assert torch.equal(adversarial, expected)
    assert adversarial.stride() == expected.stride()
    assert len(captures) == 1


def test_early_stop(captures):
    model, images, _ = on_gpu(batch_invariant_cnn(), 60, 8)
    try:
        with torch.no_grad():
            labels = model(images).argmax(1)
    except NotImplementedError as error:
        pytest.skip(str(error))
    eps = torch.linspace(0.1, 6.0, 60, device="cuda") * 0.02
    options = dict(eps=eps, step_size=eps / 20, steps=40, early_stop=True, restarts=2)
    expected, adversarial = both(model, images, labels, **options)
    assert torch.equal(adversarial, expected)
    assert len(captures) >= 3


def test_random_models(captures):
    """Replays draw the numbers that steps would have drawn, and go on from there."""
    model, images, labels = on_gpu(small_cnn())
    ends = []
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        attack = PGD(model, steps=STEPS, model_mode="keep", graph=use)
        results.append(attack(images, labels))
        ends.append(torch.cuda.get_rng_state())
    assert torch.equal(*results) and torch.equal(*ends)
    generator = torch.Generator("cuda").manual_seed(1)
    before = torch.cuda.get_rng_state()
    PGD(model, steps=STEPS, model_mode="keep", generator=generator, graph=True)(images, labels)
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert len(captures) == 2


def test_autocast_of_the_caller(captures):
    model, images, labels = on_gpu(small_cnn())
    with torch.autocast("cuda", torch.bfloat16):
        expected, adversarial = both(model, images, labels, steps=STEPS)
        assert torch.equal(adversarial, expected)
    assert len(captures) == 1


def test_calls_on_any_stream_and_kept_graphs(captures):
    model, images, labels = on_gpu(small_cnn())
    options = dict(steps=STEPS, random_start=False)
    expected = PGD(model, graph=False, **options)(images, labels)
    attack = PGD(model, graph=None, **options)
    with attack.keep_graphs():
        for _ in range(3):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                moved = images.clone()
                torch.cuda._sleep(10_000_000)  # the attack waits for its images
                moved.copy_(images)
                adversarial = attack(moved, labels)
                assert torch.equal(adversarial, expected)
        with torch.no_grad():
            model[0].weight.neg_()
        changed = attack(images, labels)
    assert len(captures) == 1
    assert torch.equal(changed, PGD(model, graph=False, **options)(images, labels))
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("kind", [ReadsValues, MakesTensors, DrawsWithPython, CountsCalls])
def test_what_cannot_be_recorded(captures, kind):
    model, images, labels = on_gpu(small_cnn())
    options = dict(steps=STEPS, random_start=False)

    def victim():
        made = kind(model)
        if kind is MakesTensors:
            made.change = lambda x: x * torch.tensor(2.0, device="cuda")
        return made

    expected = from_the_same_seed(PGD(victim(), graph=False, **options), images, labels)
    with pytest.warns(UserWarning, match="without CUDA graphs, because a step ") as warned:
        adversarial = from_the_same_seed(PGD(victim(), graph=None, **options), images, labels)
    assert torch.equal(adversarial, expected)
    assert not captures
    if kind is ReadsValues:
        assert "recorded_attacks.py:" in str(warned[0].message)  # where it waits


def test_the_process_survives_a_failed_capture(captures):
    """One that the driver refuses, which no look before has found."""
    x = torch.rand(1000, device="cuda")
    capture = CudaCapture(x.device, None)
    with capture.stream(), pytest.raises(Uncapturable, match="capturing a step failed"):
        capture.capture(lambda: (x * 2).sum().item())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.rand(5, device="cuda")  # generators have left capture mode
    torch.nn.functional.dropout(x)
    assert float(x.sum()) > 0
    model, images, labels = on_gpu(small_cnn())
    expected, adversarial = both(model, images, labels, steps=STEPS, model_mode="keep")
    assert torch.equal(adversarial, expected)


def test_an_exception_of_python_in_a_capture(captures):
    x = torch.rand(1000, device="cuda")
    capture = CudaCapture(x.device, None)

    def fails():
        x.mul_(2)
        raise ArithmeticError("half-way")

    before = x.clone()
    with capture.stream(), pytest.raises(Uncapturable, match="ArithmeticError: half-way"):
        capture.capture(fails)
    assert torch.equal(x, before)
    torch.rand(5, device="cuda")


def test_memory_comes_back(captures):
    model, images, labels = on_gpu(small_cnn())
    attack = PGD(model, steps=STEPS, random_start=False, graph=None)
    attack(images, labels)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        attack(images, labels)
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_another_thread_may_use_the_gpu(captures):
    model, images, labels = on_gpu(small_cnn())
    expected = PGD(model, steps=STEPS, random_start=False, graph=False)(images, labels)
    stop, faults = threading.Event(), []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    assert torch.ones(1000, device="cuda").mul(2).sum().item() == 2000
        except Exception as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the other thread's waiting may be taken for ours
            adversarial = PGD(model, steps=STEPS, random_start=False, graph=None)(images, labels)
    finally:
        stop.set()
        thread.join()
    assert not faults
    assert torch.equal(adversarial, expected)


def test_labels_are_still_checked(captures):
    model, images, labels = on_gpu(small_cnn())
    with pytest.raises(ValueError, match="`labels` must be classes"):
        PGD(model, steps=STEPS, graph=None)(images, labels.fill_(CLASSES))
    assert not captures
