"""One step of a projected-gradient attack: momentum, step, projection on the ball, bounds."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from pyvit.ops import _backends, _checks, _library

_ARGUMENTS = (
    "Tensor x, Tensor grad, Tensor x0, int norm, bool raw, bool targeted, float step_size, "
    "float eps, Tensor? step_sizes, Tensor? eps_of_image, float lo, float hi, float quantile"
)
_library.define(f"projected_step({_ARGUMENTS}) -> Tensor")
_library.define(
    f"projected_step_momentum({_ARGUMENTS}, Tensor momentum, float decay) -> (Tensor, Tensor)"
)

_backends.gpu_kernels("projected_step", "projected_step", "projected_step_momentum")

NORMS = ("linf", "l2", "l1")
STEPS = ("sign", "raw")


@_library.fake("projected_step")
def _(x, grad, x0, *options):
    return torch.empty_like(x)


@_library.fake("projected_step_momentum")
def _(x, grad, x0, *options):
    momentum = options[-2]
    return torch.empty_like(x), torch.empty_like(momentum)


def check_length(
    op: str, argument: str, value: object, batch: int, *, infinite: bool = False
) -> float | Tensor:
    """A step size or a radius: one number, or one an image (``[B]``); not negative.

    The values of a tensor are not looked at: that would wait for the device.
    """
    if isinstance(value, Tensor):
        _checks.tensor(op, argument, value, ndim=1)
        _checks.shape(op, argument, value, (batch,), " (one value an image)")
        return value
    if infinite and isinstance(value, float) and value == math.inf:
        return value
    return _checks.number(op, argument, value, minimum=0.0)


def check_bounds(op: str, bounds: object) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        _checks.fail(TypeError, op, "bounds", "two numbers (lowest, highest)", repr(bounds))
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            _checks.fail(TypeError, op, "bounds", "two numbers (lowest, highest)", repr(bounds))
    lo, hi = float(bounds[0]), float(bounds[1])
    if not lo < hi:
        _checks.fail(ValueError, op, "bounds", "two numbers, the lower one first", bounds)
    return lo, hi


def _scalar_and_tensor(value: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(value, Tensor):
        return 0.0, value.detach().to(torch.float64).contiguous()
    return value, None


@overload
def projected_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: float | Tensor,
    eps: float | Tensor,
    bounds: tuple[float, float] = ...,
    targeted: bool = ...,
    momentum: None = ...,
    decay: float = ...,
    step: str = ...,
    quantile: float = ...,
) -> Tensor: ...


@overload
def projected_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: float | Tensor,
    eps: float | Tensor,
    bounds: tuple[float, float] = ...,
    targeted: bool = ...,
    momentum: Tensor,
    decay: float = ...,
    step: str = ...,
    quantile: float = ...,
) -> tuple[Tensor, Tensor]: ...


def projected_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: float | Tensor,
    eps: float | Tensor,
    bounds: tuple[float, float] = (0.0, 1.0),
    targeted: bool = False,
    momentum: Tensor | None = None,
    decay: float = 1.0,
    step: str = "sign",
    quantile: float = 0.99,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a projected-gradient attack, for a batch of images, in one fused pass.

    With d = ``grad``, or the new momentum where one is given:

    - ``norm="linf"``: x + step_size·sign(d); then ``clamp(x0 + clamp(x - x0, -eps, eps))`` to
      the bounds, rounded after each operation as the chain of PyTorch operators rounds, so that
      the result is the same bits. sign(NaN) is 0, as in PyTorch.
    - ``norm="l2"``: x + step_size·d/‖d‖₂ (no move where ‖d‖₂ = 0); the perturbation is scaled
      down to length eps where it is longer; then the bounds.
    - ``norm="l1"``: a sparse step: of the pixels that the bounds let move, those with the
      largest ``|d|`` (a part 1 - quantile of all pixels, at least one; ties go to the first in
      memory) move by the same amount, step_size in all; then the nearest point of the L1 ball
      that also lies within the bounds, its threshold found exactly.

    ``targeted=True`` steps against d, for a loss that is to fall. With ``momentum`` v the step
    follows v ← decay·v + grad / mean|grad|, the mean of each image's own gradient.

    A NaN in one image's arguments never reaches another image. For L2 and L1 a gradient that
    is not finite makes its whole image NaN.

    Args:
        x: the present images ``[B, ...]``: any number of dimensions, any strides.
        grad: gradient of the loss with respect to x; of x's shape and dtype, any strides.
        x0: the clean images, the ball's centre; likewise.
        norm: of the step and of the ball: "linf", "l2" or "l1".
        step_size: length of the step in the units of x; a number, or one an image (``[B]``).
        eps: radius of the ball; a number, or one an image. ``math.inf``: no ball.
        bounds: lowest and highest value of a pixel.
        targeted: step down the gradient instead of up.
        momentum: v of the step before (zeros at first), of x's shape and dtype, or None.
        decay: factor of the old momentum.
        step: "sign" steps as above; "raw" steps along step_size·d itself, far weaker because
            gradients of an image are tiny.
        quantile: of ``norm="l1"`` alone, see there; in [0, 1).

    Returns:
        The new x, in x's layout, never in place; with ``momentum`` the pair (x, momentum).

    Dtypes: float32, float64, bfloat16, float16. L2 and L1 compute in float32 (float64 for
    float64) with sums in float64, and round once, at the end.

    Not differentiable: works as under ``torch.no_grad()``, whatever its arguments require.

    Deterministic and batch-invariant: the result for one image is the same bits alone and in
    any batch.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was
            wanted. Values of tensors are not checked.

    Cost: reads x, grad and x0 once and writes x once (L∞; momentum is read and written besides,
    and grad read twice). L2 reads x and x0 twice and grad three times, from the cache where an
    image fits in it. L1 passes over each image about 40 times, one thread an image.

    Source: Madry et al. (2018) for PGD; Dong et al. (2018) for the momentum; Tramèr & Boneh
    (2019) for the sparse step; Croce & Hein (2021) for the L1 projection within bounds.

    Example:
        >>> import torch, pyvit
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> grad = torch.randn(2, 3, 8, 8)
        >>> x = pyvit.projected_step(x0, grad, x0, norm="linf", step_size=2 / 255, eps=8 / 255)
        >>> bool((x - x0).abs().max() <= 2.001 / 255)
        True
    """
    op = "projected_step"
    _checks.tensor(op, "x", x)
    if x.dim() == 0:
        _checks.fail(ValueError, op, "x", "a batch (at least one dimension)", _checks.shape_of(x))
    operands = {"grad": grad, "x0": x0}
    if momentum is not None:
        operands["momentum"] = momentum
    for name, operand in operands.items():
        _checks.tensor(op, name, operand)
        _checks.like(op, name, operand, "x", x)
        _checks.shape(op, name, operand, x.shape, " (x's)")
    _checks.choice(op, "norm", norm, NORMS)
    _checks.choice(op, "step", step, STEPS)
    _checks.flag(op, "targeted", targeted)
    step_size = check_length(op, "step_size", step_size, x.shape[0])
    eps = check_length(op, "eps", eps, x.shape[0], infinite=True)
    lo, hi = check_bounds(op, bounds)
    decay = _checks.number(op, "decay", decay)
    quantile = _checks.number(op, "quantile", quantile, minimum=0.0)
    if quantile >= 1.0:
        _checks.fail(ValueError, op, "quantile", "below 1", quantile)
    for name, value in (("step_size", step_size), ("eps", eps)):
        if isinstance(value, Tensor) and value.device != x.device:
            _checks.fail(ValueError, op, name, f"on `x`'s device {x.device}", value.device)
    _backends.require_kernels(op, x)

    one_step, step_sizes = _scalar_and_tensor(step_size)
    one_eps, eps_of_image = _scalar_and_tensor(eps)
    arguments = (
        *(x.detach(), grad.detach(), x0.detach()),
        *(NORMS.index(norm), step == "raw", targeted),
        *(one_step, one_eps, step_sizes, eps_of_image, lo, hi, quantile),
    )
    if momentum is None:
        return torch.ops.pyvit.projected_step(*arguments)
    return torch.ops.pyvit.projected_step_momentum(*arguments, momentum.detach(), decay)
