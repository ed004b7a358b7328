"""``python -m pyvit tune``: a handful of configurations of every op measured on the present GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyvit.kernels import (
    attention_backward,
    conv2d,
    linear,
    patch_embed,
    projected_step,
    topk_attention,
    tuning,
    unfold,
)
from pyvit.kernels.tuning import Configuration

Work = tuple[str, str, Callable[[], Any]]  # its name, how products are made, and the call
LEAST_GAIN = 0.03  # of the time; what gains less may be noise
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


def candidates(shipped: Configuration) -> Iterator[Configuration]:
    """The shipped one first, then its neighbours: stages, and tiles that grow with their warps.

    None changes the order in which a result's terms are summed, so a tuned machine computes the
    same bits. Registers may spill in some (``benchmarks/aot.py --cases benchmarks/aot_tuning.py``
    says where); that is slow, and so never chosen.
    """
    yield shipped
    for stages in range(1, 5):
        if abs(stages - shipped.get("num_stages", stages)) == 1:
            yield shipped | {"num_stages": stages}
    rows = next(n for n in ("BLOCK_M", "BLOCK", "TILE", "CHUNK") if n in shipped)
    if shipped["num_warps"] <= 4:
        yield shipped | {"num_warps": 8, rows: 2 * shipped[rows]}
    elif shipped[rows] >= 128:
        yield shipped | {"num_warps": 4, rows: shipped[rows] // 2}
    for columns in ("BLOCK_K", "STEP"):
        if columns in shipped:
            yield shipped | {columns: 2 * shipped[columns]}
    if "BLOCK_K" in shipped and shipped["BLOCK_N"] < 128:
        yield shipped | {"BLOCK_N": 2 * shipped["BLOCK_N"]}
    if "num_stages" not in shipped:  # one pass over memory: fewer elements a thread, and more
        yield shipped | {rows: shipped[rows] // 2}
        yield shipped | {rows: 2 * shipped[rows]}


def seconds(call: Callable[[], Any]) -> float:
    """Median of some runs on the GPU; infinity where it cannot run, for lack of shared memory.

    The GPU is kept waiting until the launches are queued: it is its time that counts.
    """
    try:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        times = []
        for _ in range(15):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(500_000)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)
    except Exception:
        return float("inf")


def best(
    call: Callable[[], Any], measure: Callable[[Callable[[], Any]], float]
) -> dict[str, Configuration]:
    """For every policy that ``call`` asks, what beats the shipped configuration."""
    with tuning.trying({}) as asked:
        call()
        shipped = dict(asked)
    found: dict[str, Configuration] = {}
    for name, configuration in shipped.items():
        times = {}
        for candidate in candidates(configuration):
            with tuning.trying({**found, name: candidate}):
                times[tuple(candidate.items())] = measure(call)
        fastest = min(times, key=times.__getitem__)
        if times[fastest] < (1 - LEAST_GAIN) * times[tuple(configuration.items())]:
            found[name] = dict(fastest)
    return found


def works(device: torch.device) -> Iterator[Work]:
    """The common size classes of every op."""
    for kind, dtype in DTYPES.items():
        for name, call in (
            *_attention(device, dtype),
            *_convolutions(device, dtype),
            *_linear(device, dtype),
            *_patch_embed(device, dtype),
        ):
            yield f"{name} {kind}", kind, call
    for dtype in (torch.bfloat16, torch.float32):
        for name, call in _passes_over_memory(device, dtype):
            yield f"{name} {dtype}", "ieee", call


def _random(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    forward = topk_attention.topk_attention
    backward = attention_backward.topk_attention_backward
    for b, h, n, d, k in ((64, 12, 197, 64, 32), (16, 12, 577, 64, 32), (2, 12, 4096, 64, 64)):
        q = _random(device, dtype, b, h, n, d)
        out, bits, softmax = forward(q, q, q, k, d**-0.5, True)
        name = f"attention {b}x{h}x{n}x{d}"
        yield f"{name} forward", lambda q=q, k=k, d=d: forward(q, q, q, k, d**-0.5, False)
        arguments = (out, out, q, q, q, bits, softmax, k, n, d**-0.5, False, True, True, True)
        yield f"{name} backward", lambda arguments=arguments: backward(*arguments)
    penalty = topk_attention.attention_with_penalty
    yield f"{name} penalty", lambda: penalty(q, q, q, k, d**-0.5, True)


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    """Of many pixels and of few, of 64 channels and of more; stride 1 and 2."""
    for b, c, size, o, kernel, stride in (
        (64, 64, 56, 64, 3, 1),
        (64, 64, 56, 256, 1, 1),
        (64, 256, 14, 256, 3, 1),
        (64, 128, 56, 128, 3, 2),
    ):
        layout = {"memory_format": torch.channels_last}
        after = (size - 1) // stride + 1
        x = _random(device, dtype, b, c, size, size).contiguous(**layout)
        weight = _random(device, dtype, o, c, kernel, kernel).contiguous(**layout)
        grad = _random(device, dtype, b, o, after, after).contiguous(**layout)
        geometry = ((stride, stride), (kernel // 2,) * 4, (1, 1), 1, True)
        name = f"conv2d {b}x{c}x{size}x{size} {kernel}x{kernel}/{stride} to {o}"
        for way, launch, operands in (
            ("forward", conv2d.conv2d, (x, weight, None)),
            ("image gradient", conv2d.conv2d_input_grad, (grad, weight, x.shape)),
            ("weight gradient", conv2d.conv2d_weight_grad, (grad, x, weight.shape)),
        ):
            yield f"{name} {way}", partial(launch, *operands, *geometry)


def _linear(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    for rows, inputs, outputs in (
        (64 * 197, 768, 3072),
        (256 * 197, 192, 768),
        (256 * 197, 64, 64),
    ):
        x, weight = _random(device, dtype, rows, inputs), _random(device, dtype, outputs, inputs)
        name = f"linear {rows}x{inputs} to {outputs}"
        yield f"{name} forward", partial(linear.linear, x, weight, None)
        grad = _random(device, dtype, rows, outputs)
        yield f"{name} weight gradient", partial(linear.linear_weight_grad, grad, x)


def _patch_embed(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    b, c, size, dim, patch = 64, 3, 224, 768, 16
    image = _random(device, dtype, b, c, size, size)
    weight = _random(device, dtype, dim, c, patch, patch)
    grad = _random(device, dtype, b, (size // patch) ** 2, dim)
    stride, nothing = (patch, patch), (None,) * 5
    yield "patch_embed", partial(patch_embed.patch_embed, image, weight, *nothing, stride)
    of_image = (grad, weight, None, image.shape, stride, False)
    yield "patch_embed image gradient", partial(patch_embed.patch_embed_image_grad, *of_image)
    of_weight = (grad, image, None, None, weight.shape, stride, False)
    yield "patch_embed weight gradient", partial(patch_embed.patch_embed_weight_grad, *of_weight)


def _passes_over_memory(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    b, c, size = 64, 64, 56
    window = ((3, 3), (1, 1), (1, 1), (1, 1))
    yield "unfold", partial(unfold.unfold, _random(device, dtype, b, c, size, size), *window)
    cols = _random(device, dtype, b, 9 * c, size * size)
    yield "fold", partial(unfold.fold, cols, (size, size), *window)
    x = _random(device, dtype, 64, 3, 224, 224)
    step = (x, x, x, 0, False, False, 0.1, 0.3, None, None, 0.0, 1.0, 0.99)
    yield "projected_step linf", partial(projected_step.projected_step, *step)


def main(measure: Callable[[Callable[[], Any]], float] = seconds) -> int:
    """Measure, write the file, and say what was found."""
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Configuration] = {}
    for name, kind, call in works(device):
        with tuning.precision(kind == "tf32"):
            gained = best(call, measure)
        print(f"{name}: {gained or 'the shipped configuration stays'}", flush=True)
        found |= gained
    tuning.save(tuning.path(), device, found)
    print(f"{len(found)} configurations for {tuning.place(device)} are in {tuning.path()}")
    return 0
