"""Argument checks shared by every op.

A check raises ``TypeError`` for a value of the wrong kind, ``ValueError`` for a value out of
range and ``NotImplementedError`` for what pyvit does not offer. The message always has one
form, so that a user finds the mistake without a traceback of ours::

    pyvit.conv2d: `stride` must be at least 1; got 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(kind: type[Exception], op: str, argument: str, wanted: str, got: object) -> NoReturn:
    raise kind(f"pyvit.{op}: `{argument}` must be {wanted}; got {got}")


def shape_of(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}"


def tensor(
    op: str,
    argument: str,
    value: object,
    *,
    ndim: int | tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
) -> None:
    """A strided tensor of one of ``dtypes`` with ``ndim`` dimensions."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, "a torch.Tensor", type(value).__name__)
    if value.layout is not torch.strided:
        fail(NotImplementedError, op, argument, "a strided (dense) tensor", value.layout)
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(TypeError, op, argument, f"of dtype {names}", str(value.dtype).removeprefix("torch."))
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else ndim
        if value.dim() not in allowed:
            wanted = " or ".join(str(n) for n in allowed)
            fail(ValueError, op, argument, f"a tensor of {wanted} dimensions", shape_of(value))


def like(op: str, argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    """``value`` has the dtype and the device of ``other``."""
    if value.dtype != other.dtype:
        wanted = f"of `{other_argument}`'s dtype {str(other.dtype).removeprefix('torch.')}"
        fail(TypeError, op, argument, wanted, str(value.dtype).removeprefix("torch."))
    if value.device != other.device:
        wanted = f"on `{other_argument}`'s device {other.device}"
        fail(ValueError, op, argument, wanted, value.device)


def shape(op: str, argument: str, value: Tensor, wanted: Sequence[int], why: str = "") -> None:
    if tuple(value.shape) != tuple(wanted):
        fail(ValueError, op, argument, f"of shape {tuple(wanted)}{why}", shape_of(value))


def integer(op: str, argument: str, value: object, *, minimum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(TypeError, op, argument, "an int", f"{value!r} ({type(value).__name__})")
    if minimum is not None and value < minimum:
        fail(ValueError, op, argument, f"at least {minimum}", value)
    return value  # type: ignore[return-value]


def pair(op: str, argument: str, value: object, *, minimum: int) -> tuple[int, int]:
    """An int for both image axes, or one int for each: (height, width)."""
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            value = (value[0], value[0])
        if len(value) != 2:
            fail(ValueError, op, argument, "one int or two (height, width)", value)
        height, width = value
    else:
        height = width = value
    return (
        integer(op, argument, height, minimum=minimum),
        integer(op, argument, width, minimum=minimum),
    )


def number(
    op: str, argument: str, value: object, *, minimum: float = -math.inf, positive: bool = False
) -> float:
    """A finite float, at least ``minimum``; above zero where ``positive``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(TypeError, op, argument, "a number", f"{value!r} ({type(value).__name__})")
    # Not math.isfinite: torch.compile's symbolic floats know comparisons alone.
    if not -math.inf < value < math.inf:
        fail(ValueError, op, argument, "finite", value)
    if positive and value <= 0:
        fail(ValueError, op, argument, "above 0", value)
    if value < minimum:
        fail(ValueError, op, argument, f"at least {minimum}", value)
    return float(value)


def choice(op: str, argument: str, value: object, options: Sequence[object]) -> None:
    if value not in options:
        wanted = " or ".join(repr(o) for o in options)
        fail(ValueError, op, argument, wanted, repr(value))


def flag(op: str, argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        fail(TypeError, op, argument, "True or False", f"{value!r} ({type(value).__name__})")
    return value
