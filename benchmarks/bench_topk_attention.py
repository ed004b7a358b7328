"""topk_attention and attention_with_penalty at ViT lengths, against SDPA and plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Options, Row, against_truth, run_under_pytest
from torch import Tensor

import pyvit
from pyvit.reference import topk_attention as reference


@dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    tokens: int
    dim: int
    topk: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.dim} k={self.topk}"

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
GROUPS = ("forward", "backward", "dense backward", "penalty forward", "penalty backward")


def cases(options: Options) -> list[Case]:
    sizes = [replace(s, batch=1, heads=2, tokens=min(s.tokens, 197)) for s in SIZES[:4]]
    return [
        Case("topk_attention", group, str(size), partial(build, group, size, options))
        for group in GROUPS
        for size in (sizes if options.quick else SIZES)
    ]


def _inputs(size: Size, dtype=torch.float32) -> list[Tensor]:
    """q, k, v as slices of a packed projection: what a vision transformer hands over."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, size.tokens, 3, size.heads, size.dim)
    packed = torch.randn(shape, generator=generator).to(dtype)
    return list(packed.permute(2, 0, 3, 1, 4).unbind(0))


def _work(function, size: Size, backward: bool, dtype=torch.float32):
    """A callable that does the forward or the backward pass of ``function(q, k, v)`` alone."""
    leaves = _inputs(size, dtype)
    if not backward:
        return partial(function, *leaves)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def _selection(size: Size) -> Tensor:
    """The keys that ours keeps: near-ties may fall otherwise in float64."""
    shape = (size.batch, size.heads, size.tokens, size.tokens)
    if size.topk >= size.tokens:
        return torch.ones(shape, dtype=torch.bool)
    q, k, v = _inputs(size)
    _, indices, _ = torch.ops.pyvit.topk_attention(q, k, v, size.topk, size.dim**-0.5, True)
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, indices.long(), True)


def _functions(group: str, size: Size):
    """Ours, the published way in plain PyTorch, and what the truth is computed by."""
    if group.startswith("penalty"):
        ours = partial(pyvit.attention_with_penalty, topk=size.topk)
        plain = partial(reference.attention_with_penalty, topk=size.topk)
    elif group == "dense backward":
        ours = partial(pyvit.topk_attention, topk=size.topk, backward="dense")
        return ours, None, F.scaled_dot_product_attention
    else:
        ours = partial(pyvit.topk_attention, topk=size.topk)
        plain = partial(knn_attention, topk=size.topk)
        if size.topk >= size.tokens:
            return ours, plain, F.scaled_dot_product_attention
    exact = getattr(reference, ours.func.__name__)
    return ours, plain, partial(exact, topk=size.topk, selection=_selection(size))


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
    dense = work(F.scaled_dot_product_attention)
    truth = work(exact, dtype=torch.float64)
    sparse = exact is not F.scaled_dot_product_attention
    peers = {} if plain is None else {"plain PyTorch": work(plain)}
    if options.compile and plain is not None:
        peers["compiled PyTorch"] = work(torch.compile(plain))
    # SDPA computes other numbers than sparse attention: it is a peer in speed alone.
    check = against_truth(truth, factor=3.0 if backward else 2.0)

    def check_but_sdpa(results):
        return check({name: r for name, r in results.items() if name != "dense SDPA"})

    tensor = 4.0 * size.rows * size.dim
    return Row(
        ours=work(ours),
        peers={**peers, "dense SDPA": dense} if sparse else {"dense SDPA": dense, **peers},
        flops=_flops(group, size),
        bytes=tensor * (8 if backward else 4),
        check=check_but_sdpa if sparse else check,
    )


def test_topk_attention(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
