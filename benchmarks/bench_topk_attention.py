"""topk_attention and attention_with_penalty at ViT lengths, against SDPA and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from attention_truth import own_selection  # tests/attention_truth.py
from harness import Case, Options, Row, against_truth, generator, run_under_pytest
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyvit
from pyvit.reference import topk_attention as reference


@dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    tokens: int
    dim: int
    topk: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = "" if self.dtype is torch.float32 else " bfloat16"
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.dim} k={self.topk}{dtype}"

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.tokens


SIZES = [
    Size(8, 12, 197, 64, 16),
    Size(8, 12, 197, 64, 32),
    Size(8, 12, 197, 64, 100),
    Size(8, 12, 197, 64, 197),
    Size(2, 12, 1025, 64, 64),
    Size(1, 6, 4096, 64, 64),
]
GPU_SIZES = [
    Size(64, 12, 197, 64, 16, torch.bfloat16),
    Size(64, 12, 197, 64, 32, torch.bfloat16),
    Size(64, 12, 197, 64, 100, torch.bfloat16),
    Size(64, 12, 197, 64, 197, torch.bfloat16),
    Size(4, 12, 4096, 64, 64, torch.bfloat16),
    Size(64, 12, 197, 64, 32),
]
GROUPS = ("forward", "backward", "dense backward", "penalty forward", "penalty backward")
DENSE = "dense SDPA"
# What SDPA chooses from on a GPU.
SDPA_BACKENDS = {
    "flash SDPA": SDPBackend.FLASH_ATTENTION,
    "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient SDPA": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(options: Options) -> list[Case]:
    sizes = GPU_SIZES if options.gpu_rows else SIZES
    if options.quick:
        sizes = [replace(s, batch=1, heads=2) for s in sizes if s.tokens == 197]
    return [
        Case("topk_attention", group, str(size), partial(build, group, size, options))
        for group in GROUPS
        for size in sizes
    ]


def _inputs(size: Size, dtype: torch.dtype | None = None) -> list[Tensor]:
    """q, k, v as slices of a packed projection: what a vision transformer hands over."""
    shape = (size.batch, size.tokens, 3, size.heads, size.dim)
    packed = torch.randn(shape, generator=generator(0)).to(size.dtype).to(dtype or size.dtype)
    return list(packed.permute(2, 0, 3, 1, 4).unbind(0))


def _work(function, size: Size, backward: bool):
    """A callable that does the forward or the backward pass of ``function(q, k, v)`` alone."""
    leaves = _inputs(size)
    if not backward:
        return partial(function, *leaves)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    results = _results(function(*leaves))
    grads = _grads(results)
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def _results(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _grads(results: tuple[Tensor, ...]) -> list[Tensor]:
    numbers = generator(1)
    return [torch.randn(r.shape, generator=numbers).to(r.dtype) for r in results]


def _exactly(group: str, size: Size, exact, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The group's results by ``exact(q, k, v, selection)``, with the keys that ours keeps.

    Near-ties may fall otherwise in another dtype. Image by image: a matrix of all scores with its
    gradient is large.
    """
    backward = group.endswith("backward")
    given, inputs = _inputs(size), _inputs(size, dtype)
    grads = _grads(_results(_functions(group, size)[0](*given))) if backward else []
    of_images = []
    for b in range(size.batch):
        selection = own_selection(*(t[b : b + 1] for t in given), size.topk)
        leaves = [t[b : b + 1].requires_grad_(backward) for t in inputs]
        results = _results(exact(*leaves, selection=selection))
        if backward:
            wanted = [g[b : b + 1].to(r.dtype) for g, r in zip(grads, results)]
            results = torch.autograd.grad(results, leaves, wanted)
        of_images.append(results)
    return tuple(map(torch.cat, zip(*of_images)))


def _functions(group: str, size: Size):
    """Ours, the published way in plain PyTorch, and what the truth is computed by."""
    if group.startswith("penalty"):
        return (
            partial(pyvit.attention_with_penalty, topk=size.topk),
            partial(reference.attention_with_penalty, topk=size.topk),
            partial(reference.attention_with_penalty, topk=size.topk),
        )
    if group == "dense backward":
        ours = partial(pyvit.topk_attention, topk=size.topk, backward="dense")
        return ours, None, _dense
    ours = partial(pyvit.topk_attention, topk=size.topk)
    plain = partial(knn_attention, topk=size.topk)
    exact = partial(reference.topk_attention, topk=size.topk)
    return ours, plain, _dense if size.topk >= size.tokens else exact


def _dense(q: Tensor, k: Tensor, v: Tensor, selection: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _sdpa(size: Size, backward: bool, options: Options) -> dict[str, Callable[[], Any]]:
    """SDPA as it chooses itself on the CPU; on a GPU by each backend that takes these sizes."""
    if options.device == "cpu":
        return {DENSE: _work(F.scaled_dot_product_attention, size, backward)}
    found = {}
    for name, backend in SDPA_BACKENDS.items():
        by_backend = partial(_sdpa_by, backend)
        try:
            by_backend(*_inputs(size))
        except RuntimeError:  # no available kernel
            continue
        found[name] = _work(by_backend, size, backward)
    return found


def _sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def knn_attention(q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
    """As published k-NN attention is written: every score, torch.topk, a mask, a full softmax."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    kept = scores.topk(min(topk, scores.shape[-1]), dim=-1).indices
    mask = torch.zeros_like(scores).scatter_(-1, kept, 1.0)
    scores = torch.where(mask > 0, scores, torch.full_like(scores, float("-inf")))
    return scores.softmax(-1) @ v


def _flops(group: str, size: Size) -> float:
    """Of the least work: every score once, and the chosen keys (all keys where dense) else."""
    product = 2.0 * size.rows * size.dim  # with one key a query
    chosen = min(size.topk, size.tokens)
    return (
        product
        * {
            "forward": size.tokens + chosen,
            "backward": 4 * chosen if chosen < size.tokens else 5 * chosen,
            "dense backward": 5 * size.tokens,
            "penalty forward": 2 * size.tokens,
            "penalty backward": 5 * size.tokens,
        }[group]
    )


def build(group: str, size: Size, options: Options) -> Row:
    backward = group.endswith("backward")
    ours, plain, exact = _functions(group, size)
    work = partial(_work, size=size, backward=backward)
    dense = _sdpa(size, backward, options)
    sparse = exact is not _dense
    peers = {} if plain is None else {"plain PyTorch": work(plain)}
    if options.compile and plain is not None:
        peers["compiled PyTorch"] = work(torch.compile(plain))
    check = against_truth(
        lambda: _exactly(group, size, exact, torch.float64),
        factor=3.0 if backward else 2.0,
        yardstick=(lambda: _exactly(group, size, exact, size.dtype)) if sparse else None,
    )
    # Peers in speed alone: SDPA, which computes other numbers than sparse attention does, and the
    # published way in bfloat16, whose scores are so rounded that it keeps other keys.
    apart = set(dense) if sparse else set()
    if sparse and group in ("forward", "backward") and size.dtype is torch.bfloat16:
        apart |= set(peers)

    tensor = float(size.dtype.itemsize * size.rows * size.dim)
    return Row(
        ours=work(ours),
        peers={**peers, **dense} if sparse else {**dense, **peers},
        flops=_flops(group, size),
        bytes=tensor * (8 if backward else 4),
        check=lambda results: check({n: r for n, r in results.items() if n not in apart}),
        dtype=size.dtype,
    )


def test_topk_attention(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
