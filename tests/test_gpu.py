"""What only a GPU shows: races, streams, graphs, other warps, and offsets beyond 32 bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate
from backends import BACKENDS, HAS_GPU
from gpu_calls import CALLS

import pyvit
from pyvit.ops import _backends

DEVICE = "cuda"
REPEATS = 200
BEYOND_32_BITS = 1 << 31  # elements
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")


@pytest.fixture(autouse=True, params=[name for name in BACKENDS if name != "cpu"])
def on_gpu(request):
    """Every test once with Triton's kernels and once with CUDA C++'s, where they are built."""
    with torch.device(DEVICE), pyvit.backend(request.param):
        yield request.param


@pytest.fixture
def warps(request, monkeypatch):
    """Every launch that names a number of warps takes this one."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def with_warps(self, *args, **options):
        if "num_warps" in options:
            options["num_warps"] = request.param
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", with_warps)
    return request.param


def assert_accurate(call) -> None:
    """Twice PyTorch's own error, thrice for gradients, as everywhere (accuracy.py)."""
    ours, theirs = call.results(), call.results(call.exact)
    truth = call.results(call.exact, torch.float64)
    outputs = len(truth) - (len(call.tensors) if call.differentiable else 0)
    for index, values in enumerate(zip(ours, theirs, truth, strict=True)):
        factor = 2 if index < outputs else 3
        assert_as_accurate(*values, factor, f"result {index}")


# Triton 3.4 to 3.6 on Hopper: a product's turned result, multiplied again, was silently wrong in
# blocks of 64 columns, at some numbers of warps and not at others.
@pytest.mark.parametrize("warps", [4, 8], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_as_accurate_at_every_number_of_warps(name, dtype, warps, on_gpu):
    if on_gpu == "cuda":
        pytest.skip("CUDA C++ kernels have their own numbers: test_as_accurate_as_torch")
    assert_accurate(CALLS[name](dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_as_accurate_as_torch(name, dtype):
    assert_accurate(CALLS[name](dtype))


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_by_the_other_kernels(name, on_gpu):
    """What one kind saves for the backward pass, the other kind reads."""
    call = CALLS[name](torch.float32)
    if _backends.cuda_problem() or not call.differentiable:
        pytest.skip("there is one kind of kernels, or no gradient")

    def forward(*tensors):
        with pyvit.backend(on_gpu):
            return call.ours(*tensors)

    with pyvit.backend("triton" if on_gpu == "cuda" else "cuda"):
        mixed = call.results(forward)
    for other, own in zip(mixed, call.results(), strict=True):
        torch.testing.assert_close(other, own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(name, dtype):
    call = CALLS[name](dtype)
    first = call.results()
    same = torch.ones((), dtype=torch.bool)
    for _ in range(REPEATS):
        for before, now in zip(first, call.results(), strict=True):
            same &= (before == now).all()
    assert not any(result.isnan().any() for result in first)
    assert bool(same), f"{name}: results differ between calls"


@pytest.mark.parametrize("name", CALLS)
def test_replayed_from_a_graph(name):
    """The same bits as a call makes, from inputs that were not there when it was captured."""
    call = CALLS[name](torch.float32)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and fills caches
        for _ in range(2):
            call.results()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.results()
    for tensor in call.tensors:
        tensor.copy_(tensor.flip(0))
    graph.replay()
    for replayed, called in zip(captured, call.results(), strict=True):
        assert torch.equal(replayed, called)


@pytest.mark.parametrize("name", CALLS)
def test_on_a_stream_of_its_own(name):
    """A kernel on another stream would read inputs that are not written yet."""
    call = CALLS[name](torch.float32)
    wanted = call.results()
    late = call._replace(tensors=[torch.zeros_like(t) for t in call.tensors])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds
        for tensor, source in zip(late.tensors, call.tensors):
            tensor.copy_(source)
        results = late.results()
    stream.synchronize()
    for result, exact in zip(results, wanted, strict=True):
        assert torch.equal(result, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("name", CALLS)
def test_on_a_second_gpu(name):
    """While the first one is current."""
    with torch.device("cuda:1"):
        call = CALLS[name](torch.float32)
        second = call.results()
    assert all(result.device == torch.device("cuda:1") for result in second)
    first = call._replace(tensors=[t.to("cuda:0") for t in call.tensors])
    if "attention" not in name:  # whose reference has a selection on the second
        for one, other in zip(first.results(), second, strict=True):
            assert torch.equal(one.to(other.device), other)


# ---- offsets beyond 32 bits ----------------------------------------------------------------------


def conv2d(x):
    weight = torch.randn(16, 16, 3, 3).to(x.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return pyvit.conv2d(x, weight, padding=1)


def unfold(x):
    return pyvit.unfold(x, 3, padding=1)


def fold(cols):
    return pyvit.fold(cols, (64, 64), 3, padding=1)


def patch_embed(image):
    return pyvit.patch_embed(image, torch.randn(64, 3, 16, 16).to(image.dtype))


def attention(q):
    return pyvit.topk_attention(q, q, q, 16)


def linear(x):
    return pyvit.linear(x, torch.randn(64, 1024).to(x.dtype))


LARGE = {
    "conv2d": (conv2d, (16, 128, 128), 1),
    "unfold": (unfold, (16, 64, 64), 9),
    "fold": (fold, (9 * 16, 64 * 64), 1),
    "patch_embed": (patch_embed, (3, 224, 224), 1),
    "topk_attention": (attention, (12, 197, 64), 1),
    "linear": (linear, (256, 1024), 1),
    "projected_step linf": (None, (3, 224, 224), 1),
    "projected_step l2": (None, (3, 224, 224), 1),
}


@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(name):
    """The last of very many images, and of their gradients, is what it is alone, bit for bit."""
    function, shape, written = LARGE[name]
    if function is None:
        function = partial(_step, norm=name.split()[1])
    elements = written * torch.Size(shape).numel()  # of one image, in what is read or written
    batch = BEYOND_32_BITS // elements + 2
    needed = 2 * batch * elements * 8  # bytes: bfloat16, with results, gradients and copies
    if needed > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    x = torch.empty((batch, *shape), dtype=torch.bfloat16).uniform_(-1, 1)
    alone = x[-1:].clone()
    torch.testing.assert_close(_last(function, x), _last(function, alone), rtol=0, atol=0)


def _last(function, x):
    """Of the last image: its result, and its gradient where there is one."""
    torch.manual_seed(0)
    if isinstance(function, partial):
        return function(x)[-1]
    x = x.requires_grad_()
    y = function(x)
    grad = torch.ones((), dtype=y.dtype).expand_as(y[-1:])
    (gradient,) = torch.autograd.grad(y[-1:], x, grad)
    return torch.cat([y[-1].detach().flatten(), gradient[-1].flatten()])


def _step(x, norm):
    return pyvit.projected_step(x, x, x, norm=norm, step_size=0.1, eps=0.3, bounds=(-1.0, 1.0))
