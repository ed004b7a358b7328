"""Put pyvit's layers into a model that someone else built, and take them out again.

A layer is swapped by changing its class, as ``torch.nn.utils.parametrize`` does: parameters,
buffers, hooks, mode, dtype and every reference that anyone holds to it stay what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pyvit.nn._attend import check_topk
from pyvit.nn.conv2d import Conv2d
from pyvit.nn.linear import Linear
from pyvit.nn.multihead_attention import HIDDEN_FROM_FAST_PATH, TopKMultiheadAttention
from pyvit.nn.patch_conv2d import PatchConv2d
from pyvit.nn.topk_attention import TopKAttention
from pyvit.ops import _checks

_NAME = "replace_layers"
_UNDO = "_pyvit_undo"
_TIMM_HOMES = ("timm.layers.attention", "timm.models.vision_transformer")
_TIMM_PARTS = ("qkv", "num_heads", "head_dim", "scale", "q_norm", "k_norm", "attn_drop", "proj")


@dataclass(frozen=True)
class Entry:
    """One layer of the report: its name in the model, its class, and what became of it."""

    name: str
    layer: str
    outcome: str


@dataclass
class Report:
    """What :func:`replace_layers` did; print it."""

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"replaced: {len(self.replaced)}",
                *_lines(self.replaced, "->"),
                f"left: {len(self.left)}",
                *_lines(self.left, "because"),
            ]
        )


def _lines(entries: list[Entry], link: str) -> list[str]:
    name = max((len(e.name) for e in entries), default=0)
    layer = max((len(e.layer) for e in entries), default=0)
    return [f"  {e.name:{name}}  {e.layer:{layer}}  {link} {e.outcome}" for e in entries]


@dataclass(frozen=True)
class _Swap:
    name: str
    module: nn.Module
    to: type[nn.Module]


def replace_layers(
    model: nn.Module,
    conv: bool = True,
    patch_embed: bool = True,
    attention: dict[str, Any] | None = None,
    linear: bool = True,
) -> Report:
    """Swap layers of ``model`` for pyvit's, in place; :func:`restore_layers` undoes it.

    Parameters are shared, not copied; state-dict keys, hooks, train/eval mode,
    ``requires_grad``, dtype and device are kept. Nothing is changed where an argument is wrong.

    Args:
        conv: every ``torch.nn.Conv2d`` that is not a patch embedding -> :class:`Conv2d`.
        patch_embed: the projections inside patch embeddings (timm's ``PatchEmbed.proj``,
            torchvision's ``conv_proj``, Hugging Face's ``projection``) -> :class:`PatchConv2d`,
            which has no second derivative.
        attention: None leaves attention alone. A dict swaps timm's ``Attention`` ->
            :class:`TopKAttention` and ``torch.nn.MultiheadAttention`` ->
            :class:`TopKMultiheadAttention`; its keys are "topk" (an int for all layers, a list
            with one for each in the order of ``model.named_modules()``, or None, the default:
            dense) and "backward" ("selected", the default, or "dense"). A second call changes
            the settings of layers that an earlier one swapped.
        linear: every ``torch.nn.Linear`` -> :class:`Linear`. A model whose other layers treat
            each image by itself then gives an image the same bits in any batch; and on
            processors where torch's own library leaves AVX-512 unused, it is twice as fast in
            float32. In bfloat16 torch's is faster where the processor has instructions for it.

    Returns:
        A :class:`Report`: what was replaced, what was left and why.

    Errors: ``TypeError`` or ``ValueError`` naming the argument.
    """
    if not isinstance(model, nn.Module):
        _checks.fail(TypeError, _NAME, "model", "a torch.nn.Module", type(model).__name__)
    _checks.flag(_NAME, "conv", conv)
    _checks.flag(_NAME, "patch_embed", patch_embed)
    _checks.flag(_NAME, "linear", linear)
    topk, backward = _attention_settings(attention)

    report = Report()
    simple = list(_plan_convs(model, conv, patch_embed, report))
    simple += _plan_linears(model, linear, report)
    attentions = list(_plan_attention(model, report)) if attention is not None else []
    topks = _one_for_each(topk, len(attentions))
    for swap in simple:
        _apply(swap, {}, report)
    for swap, k in zip(attentions, topks, strict=True):
        _apply(swap, {"topk": k, "backward": backward}, report)
    return report


def restore_layers(model: nn.Module) -> list[str]:
    """Undo :func:`replace_layers`; returns the names of the layers given back."""
    if not isinstance(model, nn.Module):
        _checks.fail(
            TypeError, "restore_layers", "model", "a torch.nn.Module", type(model).__name__
        )
    restored = []
    for name, module in model.named_modules():
        undo = module.__dict__.pop(_UNDO, None)
        if undo is None:
            continue
        module.__class__, previous, added = undo
        module.__dict__.update(previous)
        for attribute in added:
            del module.__dict__[attribute]
        restored.append(name)
    return restored


def _attention_settings(attention: object) -> tuple[Any, str]:
    if attention is None:
        return None, "selected"
    if not isinstance(attention, dict):
        _checks.fail(TypeError, _NAME, "attention", "a dict or None", type(attention).__name__)
    unknown = set(attention) - {"topk", "backward"}
    if unknown:
        _checks.fail(ValueError, _NAME, "attention", "of keys 'topk', 'backward'", unknown)
    topk, backward = attention.get("topk"), attention.get("backward", "selected")
    for k in topk if isinstance(topk, (list, tuple)) else [topk]:
        check_topk(_NAME, k, backward)
    return topk, backward


def _one_for_each(topk: int | Sequence[int | None] | None, count: int) -> Sequence[int | None]:
    if topk is None or isinstance(topk, int):
        return [topk] * count
    if len(topk) != count:
        _checks.fail(ValueError, _NAME, "topk", f"one for each of {count} layers", topk)
    return topk


def _apply(swap: _Swap, settings: dict[str, Any], report: Report) -> None:
    """Change the class, and write down how to change it back."""
    module, before = swap.module, type(swap.module)
    if _UNDO not in module.__dict__:
        settings = settings | _adopted(module, swap.to)
        previous = {key: module.__dict__[key] for key in settings if key in module.__dict__}
        module.__dict__[_UNDO] = (before, previous, tuple(settings.keys() - previous.keys()))
        module.__class__ = swap.to
    module.__dict__.update(settings)
    detail = ", ".join(f"{k}={v!r}" for k, v in settings.items() if k in ("topk", "backward"))
    outcome = f"pyvit.nn.{swap.to.__name__}" + (f"({detail})" if detail else "")
    report.replaced.append(Entry(swap.name, before.__name__, outcome))


def _adopted(module: nn.Module, to: type[nn.Module]) -> dict[str, Any]:
    """What a layer of class ``to`` sets in its constructor, which ``module`` did not go through."""
    if to is TopKAttention:
        return {name: None for name in ("norm", "gate") if not hasattr(module, name)}
    if to is TopKMultiheadAttention:
        return {"_qkv_same_embed_dim": HIDDEN_FROM_FAST_PATH}
    return {}


def _plan_convs(model: nn.Module, conv: bool, patch_embed: bool, report: Report) -> Iterator[_Swap]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        reason: str | None
        patches = _is_patch_embedding(model, name)
        if not (patch_embed if patches else conv):
            reason = f"{'patch_embed' if patches else 'conv'}=False"
        else:
            reason = _why_not(module, nn.Conv2d)
        to: type[nn.Module] = Conv2d
        if reason is None and patches:
            overlap = _why_not_patches(module)
            if overlap is None:
                to = PatchConv2d
            elif not conv:
                reason = overlap
        if reason is None:
            yield _Swap(name, module, to)
        else:
            report.left.append(Entry(name, type(module).__name__, reason))


def _plan_linears(model: nn.Module, linear: bool, report: Report) -> Iterator[_Swap]:
    # Its out_proj is never called: the attention layer takes its parameters.
    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module in inside:
            continue
        reason = _why_not(module, nn.Linear) if linear else "linear=False"
        if reason is None:
            yield _Swap(name, module, Linear)
        else:
            report.left.append(Entry(name, type(module).__name__, reason))


def _is_patch_embedding(model: nn.Module, name: str) -> bool:
    """By name: of the attribute, or of the class that owns it."""
    owner_name, _, attribute = name.rpartition(".")
    owner = type(model.get_submodule(owner_name)).__name__.lower() if name else ""
    return attribute == "conv_proj" or any(
        mark in text for mark in ("patch", "embed") for text in (owner, attribute.lower())
    )


def _why_not(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """Why a layer cannot be taken for a plain ``expected``; None where it can."""
    if type(module).__module__.startswith("pyvit."):
        return "it is pyvit's already"
    if type(module) is not expected:
        return f"a subclass of {expected.__name__} may compute something else"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward was replaced on the instance"
    odd = {p.dtype for p in module.parameters(recurse=False)} - set(_checks.FLOATING)
    return f"no kernel for {odd.pop()}" if odd else None


def _why_not_patches(conv: nn.Conv2d) -> str | None:
    if conv.stride != conv.kernel_size or conv.dilation != (1, 1) or conv.groups != 1:
        return "its patches overlap, have holes or are grouped"
    return None if conv.padding in ((0, 0), "valid") else "it pads the image"


def _plan_attention(model: nn.Module, report: Report) -> Iterator[_Swap]:
    for name, module in model.named_modules():
        if _UNDO in module.__dict__ and isinstance(module, (TopKAttention, TopKMultiheadAttention)):
            yield _Swap(name, module, type(module))
            continue
        to, reason = _attention_target(module)
        if to is not None:
            yield _Swap(name, module, to)
        elif reason is not None:
            report.left.append(Entry(name, type(module).__name__, reason))


def _attention_target(module: nn.Module) -> tuple[type[nn.Module] | None, str | None]:
    """The class to swap to, or why there is none; (None, None) for what is not attention."""
    if isinstance(module, nn.MultiheadAttention):
        reason = _why_not(module, nn.MultiheadAttention) or _why_not_multihead(module)
        return (TopKMultiheadAttention, None) if reason is None else (None, reason)
    timm = _timm_attention()
    if timm is not None and isinstance(module, timm):
        reason = _why_not(module, timm) or _why_not_timm(module)
        return (TopKAttention, None) if reason is None else (None, reason)
    if isinstance(module, TopKAttention):
        return None, "it is pyvit's already: set its topk and backward"
    if "attention" in type(module).__name__.lower():
        return None, f"{type(module).__module__}'s kind of attention is not known to pyvit"
    return None, None


def _timm_attention() -> type[nn.Module] | None:
    """timm's class, where the program has imported timm; pyvit itself never does."""
    for home in _TIMM_HOMES:
        found = getattr(sys.modules.get(home), "Attention", None)
        if found is not None:
            return found
    return None


def _why_not_timm(module: nn.Module) -> str | None:
    missing = [part for part in _TIMM_PARTS if not hasattr(module, part)]
    return f"this timm's Attention has no {', '.join(missing)}" if missing else None


def _why_not_multihead(module: nn.MultiheadAttention) -> str | None:
    if module.in_proj_weight is None:
        return "its keys or values have a width of their own (kdim, vdim)"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    return None
