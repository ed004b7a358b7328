"""``python -m pyvit tune``: a handful of configurations of every op measured on the present GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyvit.kernels import attention_backward, conv2d, patch_embed, topk_attention, tuning
from pyvit.kernels.tuning import Configuration

Work = tuple[str, Callable[[], Any]]
LEAST_GAIN = 0.03  # of the time; what gains less may be noise


def candidates(shipped: Configuration) -> Iterator[Configuration]:
    """The shipped one first, then its neighbours: stages, and tiles that grow with their warps."""
    yield shipped
    for stages in range(1, 5):
        if abs(stages - shipped["num_stages"]) == 1:
            yield shipped | {"num_stages": stages}
    rows = next(name for name in ("BLOCK_M", "BLOCK") if name in shipped)
    if shipped["num_warps"] <= 4:
        yield shipped | {"num_warps": 8, rows: 2 * shipped[rows]}
    elif shipped[rows] >= 128:
        yield shipped | {"num_warps": 4, rows: shipped[rows] // 2}
    for columns in ("BLOCK_K", "STEP"):
        if columns in shipped:
            yield shipped | {columns: 2 * shipped[columns]}


def seconds(call: Callable[[], Any]) -> float:
    """Median of some runs on the GPU; infinity where it cannot run, for lack of shared memory."""
    try:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        times = []
        for _ in range(15):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    for dtype in (torch.bfloat16, torch.float32):
        yield from _attention(device, dtype)
        yield from _convolutions(device, dtype)


def _random(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    forward = topk_attention.topk_attention
    backward = attention_backward.topk_attention_backward
    for b, h, n, d, k in ((64, 12, 197, 64, 32), (16, 12, 577, 64, 32), (2, 12, 4096, 64, 64)):
        q = _random(device, dtype, b, h, n, d)
        out, bits, softmax = forward(q, q, q, k, d**-0.5, True)
        name = f"attention {b}x{h}x{n}x{d} {dtype}"
        yield f"{name} forward", lambda q=q, k=k, d=d: forward(q, q, q, k, d**-0.5, False)
        arguments = (out, out, q, q, q, bits, softmax, k, n, d**-0.5, False, True, True, True)
        yield f"{name} backward", lambda arguments=arguments: backward(*arguments)


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    for b, c, size, o, kernel in ((64, 64, 56, 64, 3), (64, 256, 14, 256, 3)):
        layout = {"memory_format": torch.channels_last}
        x = _random(device, dtype, b, c, size, size).contiguous(**layout)
        weight = _random(device, dtype, o, c, kernel, kernel).contiguous(**layout)
        geometry = ((1, 1), (kernel // 2,) * 4, (1, 1), 1, True)
        name = f"conv2d {b}x{c}x{size}x{size} to {o} {dtype}"
        yield name, lambda x=x, w=weight, g=geometry: conv2d.conv2d(x, w, None, *g)
    image = _random(device, dtype, 64, 3, 224, 224)
    weight = _random(device, dtype, 768, 3, 16, 16)
    rest = (None, None, None, None, None, (16, 16))
    embed = patch_embed.patch_embed
    yield f"patch_embed {dtype}", lambda: embed(image, weight, *rest)


def main(measure: Callable[[Callable[[], Any]], float] = seconds) -> int:
    """Measure, write the file, and say what was found."""
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Configuration] = {}
    for name, call in works(device):
        gained = best(call, measure)
        print(f"{name}: {gained or 'the shipped configuration stays'}", flush=True)
        found |= gained
    tuning.save(tuning.path(), device, found)
    print(f"{len(found)} configurations for {tuning.place(device)} are in {tuning.path()}")
    return 0
