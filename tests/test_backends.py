"""The two kinds of GPU kernels where there is no GPU: together, and in every order of threads."""

from __future__ import annotations

import contextlib

import pytest
import torch
from backends import CAN_EMULATE, HAS_GPU, HAS_TRITON
from gpu_calls import CALLS, attention

if CAN_EMULATE and not HAS_GPU:
    from cuda_emulator import Order, emulated, load, schedule

    load()
    SCHEDULES = [
        (Order.FORWARD, 0),
        (Order.BACKWARD, 0),
        (Order.SHUFFLED, 1),
        (Order.SHUFFLED, 2),
    ]
else:
    SCHEDULES = []

pytestmark = pytest.mark.skipif(not SCHEDULES, reason="CUDA is emulated where there is no GPU")


def same(results, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_order_of_threads_does_not_matter(name, dtype):
    """A missing barrier would show: which thread is ahead differs."""
    with emulated():
        torch.manual_seed(0)
        call = CALLS[name](dtype)
        results = []
        for order, seed in SCHEDULES:
            with schedule(order, seed):
                results.append(call.results())
    assert not any(result.isnan().any() for result in results[0])
    for chosen, result in zip(SCHEDULES, results, strict=True):
        assert same(result, results[0]), f"differs with {chosen}"


PRODUCTS = ["conv2d 3x3", "conv2d stem", "linear", "patch_embed", "dense attention"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_tf32_where_torchs_switches_allow_it(name):
    """Then operands have ten bits of fraction: results differ, and by no more than that."""
    with emulated():
        call = CALLS[name](torch.float32)
        exact = call.results()
        with tf32_allowed():
            rounded = call.results()
    for result, truth in zip(rounded, exact, strict=True):
        error = (result - truth).norm() / truth.norm()
        assert error < 2**-10  # two operands, each within 2^-11, and errors of either sign
    assert not same(rounded, exact)


@contextlib.contextmanager
def tf32_allowed():
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("forward", ["triton", "cuda"])
@pytest.mark.parametrize("kind", ["chosen", "penalty"])
def test_a_gradient_by_the_other_kernels(kind, forward):
    """What one kind saves for the backward pass, the other kind reads."""
    from triton_interpreter import interpreted

    call = attention((1, 2, 41, 40), 8, kind)(torch.float32)
    first, second = (interpreted, emulated) if forward == "triton" else (emulated, interpreted)

    def by_the_first(*tensors):
        with first():
            return call.ours(*tensors)

    with second():
        mixed, own = call.results(by_the_first), call.results()
    for other, result in zip(mixed, own, strict=True):
        torch.testing.assert_close(other, result)
