"""What the attention tests compare with: the kernel's own selection fed to the reference, and
how far two float64 results may lie apart by rounding alone."""

from __future__ import annotations

import torch
from backends import INTERPRETED
from torch import Tensor

from pyvit.reference import topk_attention as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# batch, heads, queries, keys, head dimension of q and k, of v
SHAPES = {
    "one": (1, 1, 1, 1, 32, 32),
    "two": (3, 1, 2, 2, 64, 20),
    "small": (2, 3, 17, 17, 80, 96),
    "rectangular": (2, 2, 5, 49, 96, 32),
    "vit": (2, 2, 197, 197, 64, 64),
    "no class token": (1, 1, 196, 196, 128, 128),
    "long": (1, 2, 577, 577, 32, 32),
    "odd": (1, 1, 19, 785, 7, 1),
    "vit head": (1, 1, 40, 197, 64, 64),
    "streamed": (1, 1, 21, 1100, 20, 12),
    "wide heads": (1, 1, 20, 90, 256, 200),
    "many keys": (1, 1, 26, 4999, 300, 270),
}
REFUSED_ON_GPU = ["many keys"]  # heads too wide


# Those that Triton's interpreter, at a millisecond a tile, is quick enough for.
INTERPRETED_SHAPES = ["one", "two", "small", "rectangular", "vit head", "odd", "streamed"]
INTERPRETED_SHAPES += ["wide heads"]


def vit(backend: str) -> tuple[int, ...]:
    """Images as a vision transformer has them, or fewer tokens for the interpreter."""
    tokens = 40 if backend == INTERPRETED else 197
    return (2, 2, tokens, tokens, 64, 64)


def tensors(shape, dtype=torch.float32) -> list[Tensor]:
    batch, heads, queries, keys, dim, value_dim = shape
    sizes = ((queries, dim), (keys, dim), (keys, value_dim))
    return [torch.randn(batch, heads, *size).to(dtype) for size in sizes]


def counts(keys: int, *, few: bool = False) -> list[int]:
    if few:
        return [keys // 6, keys - 1]
    return sorted({1, min(2, keys), max(1, keys // 6), max(1, keys - 1), keys, keys + 5})


def doubled(values):
    return [value.double() for value in values]


def with_gradients(function, arguments, grads, **options) -> tuple[Tensor, ...]:
    """Results of ``function(q, k, v, …)`` and then the gradients of q, k and v."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    filled = (torch.zeros_like(a) if g is None else g for a, g in zip(arguments, gradients))
    return (*(r.detach() for r in results), *filled)


def own_selection(q: Tensor, k: Tensor, v: Tensor, topk: int, scale: float | None = None):
    """The keys that the kernel chose, as a mask."""
    if topk >= k.shape[2]:
        return torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _, selection, weights = torch.ops.pyvit.topk_attention(q, k, v, topk, scale, True)
    if selection.dtype is torch.uint8:
        return unpacked(selection, k.shape[2])
    assert selection.shape == weights.shape == (*q.shape[:3], topk)
    assert bool((selection.diff(dim=-1) > 0).all()), "indices do not ascend"
    mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    return mask.scatter_(-1, selection.long(), True)


def unpacked(bits: Tensor, keys: int) -> Tensor:
    """A mask from bytes of eight keys, the first in the lowest bit."""
    eight = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    assert not bool(eight.flatten(-2)[..., keys:].any()), "bits past the last key"
    return eight.flatten(-2)[..., :keys].bool()


def assert_selects_largest(selection: Tensor, q: Tensor, k: Tensor, topk: int) -> None:
    """As float64 selects, except within the rounding of a score around the threshold."""
    topk = min(topk, k.shape[2])
    assert bool((selection.sum(-1) == topk).all())
    exact = reference.scores(q.double(), k.double())
    threshold = exact.topk(topk, dim=-1).values[..., -1:]
    # A sum of D products errs by (D + 1) · eps/2 · Σ|products| at most, the threshold as much.
    eps = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    band = (q.shape[3] + 2) * eps * reference.scores(q.double().abs(), k.double().abs()).amax(-1)
    assert bool(selection[exact > threshold + band.unsqueeze(-1)].all())
    assert not bool(selection[exact < threshold - band.unsqueeze(-1)].any())


def rounding_bounds(q, k, v, selection, grads) -> tuple[Tensor, ...]:
    """How far two float64 evaluations may differ: of each result, then of dq, dk, dv.

    With S the largest Σ|products| of a score, a score errs by D · eps · S at most, a weight by
    twice that of itself, and a sum of n terms by n · eps of the sum of its magnitudes. So each
    bound is the same formula on magnitudes, times (1 + 4 S) · (all terms) · eps. With three
    ``grads``, those of attention_with_penalty: ‖w‖ is at least 1/√N.
    """
    w = reference.scores(q, k).masked_fill(~selection, -torch.inf).softmax(-1)
    q, k, v = q.abs(), k.abs(), v.abs()
    grad, *penalty_grads = (g.abs() for g in grads)
    largest = float(reference.scores(q, k).max())
    keys = k.shape[2]
    dw = grad @ v.transpose(-2, -1)
    bounds = [w @ v]
    if penalty_grads:
        tail, hoyer = (g.unsqueeze(-1) for g in penalty_grads)
        dw = dw + w * (2 * tail + hoyer * keys**1.5 / max(keys**0.5 - 1, 0.4))
        bounds += [torch.ones_like(w[..., 0]), torch.full_like(w[..., 0], keys**0.5)]
    ds = q.shape[3] ** -0.5 * w * (dw + (w * dw).sum(-1, keepdim=True))
    bounds += [ds @ k, ds.transpose(-2, -1) @ q, w.transpose(-2, -1) @ grad]
    terms = q.shape[2] + q.shape[3] + keys + v.shape[3] + 16
    factor = (1 + 4 * largest) * terms * torch.finfo(torch.float64).eps
    return tuple(b * factor for b in bounds)


def difference_bounds(q, k, v, selection, grad) -> tuple[float, float]:
    """How far float32 sums of Dv terms, dP and Δ = dO · out, put dq and dk off by themselves."""
    w = reference.scores(q, k).masked_fill(~selection, -torch.inf).softmax(-1)
    dw = grad.abs() @ v.abs().transpose(-2, -1)
    terms = (v.shape[3] + 2) * torch.finfo(torch.float32).eps
    ds = q.shape[3] ** -0.5 * w * (dw + (w * dw).sum(-1, keepdim=True)) * terms
    return float((ds @ k.abs()).max()), float((ds.transpose(-2, -1) @ q.abs()).max())


def assert_within(ours, truth, bounds, names) -> None:
    for name, mine, exact, bound in zip(names, ours, truth, bounds, strict=True):
        assert mine.shape == exact.shape, name
        excess = ((mine - exact).abs() - bound).max() if mine.numel() else torch.tensor(0.0)
        assert bool(excess <= 0), f"{name}: error exceeds rounding by {float(excess):.3g}"
