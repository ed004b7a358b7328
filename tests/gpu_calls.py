"""One small call of every op, with its gradients: what test_gpu.py and sanitize_gpu.py run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention_truth import own_selection
from torch import Tensor

import pyvit
from pyvit.reference import patch_embed as patch_embed_reference
from pyvit.reference import projected_step as projected_step_reference
from pyvit.reference import topk_attention as attention_reference


class Call(NamedTuple):
    ours: Callable
    exact: Callable  # the same in PyTorch, for tensors of any dtype
    tensors: list[Tensor]
    differentiable: bool = True

    def results(self, function: Callable | None = None, dtype=None) -> list[Tensor]:
        """What ``function`` (ours unless said) gives, then the gradients of all tensors."""
        leaves = [t.detach().to(dtype or t.dtype) for t in self.tensors]
        if self.differentiable:
            leaves = [t.requires_grad_() for t in leaves]
        out = (function or self.ours)(*leaves)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        if not self.differentiable:
            return outputs
        grads = [_like(o, self.tensors[0].dtype) for o in outputs]
        return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, grads))


def _like(out: Tensor, rounded: torch.dtype) -> Tensor:
    """A gradient of other numbers everywhere, the same in every dtype; nothing is drawn."""
    count = torch.arange(out.numel(), device=out.device).reshape(out.shape)
    return (torch.sin(count * 0.7).to(rounded)).to(out.dtype)


def _draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _conv2d(shape, weight, *options) -> Callable[[torch.dtype], Call]:
    def make(dtype):
        bias = (weight[0],)
        tensors = _draw(dtype, shape, weight, bias)
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)

        def with_options(function, *leaves):
            return function(*leaves, *options)

        return Call(partial(with_options, pyvit.conv2d), partial(with_options, F.conv2d), tensors)

    return make


def _linear(dtype):
    return Call(pyvit.linear, F.linear, _draw(dtype, (197, 96), (130, 96), (130,)))


def _unfold(dtype):
    geometry = (3, 1, 1, 2)

    def ours(x):
        return pyvit.unfold(x, *geometry)

    return Call(ours, lambda x: F.unfold(x, *geometry), _draw(dtype, (3, 20, 29, 31)))


def _fold(dtype):
    geometry = ((29, 31), 3, 1, 1, 2)

    def ours(cols):
        return pyvit.fold(cols, *geometry)

    return Call(ours, lambda cols: F.fold(cols, *geometry), _draw(dtype, (3, 180, 15 * 16)))


def _patch_embed(dtype):
    shapes = ((3, 3, 64, 48), (72, 3, 16, 16), (72,), (13, 72), (72,))

    statistics = {"mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.tensor([0.2, 0.3, 0.4])}

    def named(function, image, weight, bias, pos_embed, cls_token):
        return function(image, weight, bias, pos_embed=pos_embed, cls_token=cls_token, **statistics)

    ours, exact = pyvit.patch_embed, patch_embed_reference.patch_embed
    return Call(partial(named, ours), partial(named, exact), _draw(dtype, *shapes))


def attention(shape, topk: int, kind: str = "chosen") -> Callable[[torch.dtype], Call]:
    def make(dtype):
        tensors = _draw(dtype, shape, shape, shape)
        selection = own_selection(*tensors, topk)
        if kind == "penalty":
            ours = partial(pyvit.attention_with_penalty, topk=topk)
            exact = partial(attention_reference.attention_with_penalty, topk=topk)
        else:
            ours = partial(pyvit.topk_attention, topk=topk)
            exact = partial(attention_reference.topk_attention, topk=topk)
        return Call(ours, partial(exact, selection=selection), tensors)

    return make


def _dense_attention(dtype):
    """Its own gradient is dense attention's, so the forward pass here keeps every key."""
    ours = partial(pyvit.topk_attention, topk=197, backward="dense")
    return Call(ours, F.scaled_dot_product_attention, _draw(dtype, *3 * [(2, 2, 197, 64)]))


def _projected_step(norm: str, momentum: bool = False) -> Callable[[torch.dtype], Call]:
    sizes = {"linf": (0.01, 0.03), "l2": (0.2, 1.0), "l1": (1.0, 12.0)}
    step_size, eps = sizes[norm]

    def make(dtype):
        shape = (5, 3, 57, 43)
        x0, (grad, noise, velocity) = torch.rand(shape).to(dtype), _draw(dtype, *3 * [shape])
        x = (x0 + 0.02 * noise).clamp(0, 1)

        def step(function, x, grad, x0, velocity=None):
            options = {"norm": norm, "step_size": step_size, "eps": eps, "momentum": velocity}
            return function(x, grad, x0, **options)

        exact = projected_step_reference.projected_step
        tensors = [x, grad, x0, *([velocity] if momentum else [])]
        return Call(partial(step, pyvit.projected_step), partial(step, exact), tensors, False)

    return make


CALLS: dict[str, Callable[[torch.dtype], Call]] = {
    "conv2d 3x3": _conv2d((3, 64, 14, 14), (72, 64, 3, 3), 1, 1),
    "conv2d stem": _conv2d((2, 3, 57, 61), (64, 3, 7, 7), 2, 3),
    "conv2d depth-wise": _conv2d((2, 96, 15, 15), (96, 1, 7, 7), 1, 3, 1, 96),
    "conv2d grouped, dilated": _conv2d((2, 64, 14, 14), (32, 16, 3, 3), 2, 2, 2, 4),
    "linear": _linear,
    "unfold": _unfold,
    "fold": _fold,
    "patch_embed": _patch_embed,
    "topk_attention": attention((2, 3, 197, 64), 32),
    "topk_attention, streamed": attention((1, 2, 1100, 64), 64),
    "dense attention": _dense_attention,
    "attention_with_penalty": attention((2, 3, 197, 64), 32, "penalty"),
    "projected_step linf": _projected_step("linf"),
    "projected_step momentum": _projected_step("linf", momentum=True),
    "projected_step l2": _projected_step("l2"),
    "projected_step l1": _projected_step("l1"),
}
