"""Triton's kernels for CPU tensors, run by its interpreter."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from pyvit.ops import _backends

_convert_float = interpreter._convert_float
_patched_modules: set[str] = set()
_create_dot = interpreter.InterpreterBuilder.create_dot


def _convert_as_processors_do(values, source, result, rounding_mode):
    """The interpreter cuts the low half off where every processor rounds to nearest even."""
    if (source, result) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy().reshape(values.shape)
    if (source, result) == (tl.bfloat16, tl.float32):
        return (values.view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
    return _convert_float(values, source, result, rounding_mode)


def _dot_in_one_order(builder, a, b, d, *options):
    """Rounded once, from float64: the same bits for a product and the one transposed.

    So it is on a GPU, where each element is summed alone and in one order. The interpreter would
    ask a BLAS library, whose order depends on sizes; and multiply the bit patterns of bfloat16.
    """
    if d.dtype.scalar != tl.float32:
        return _create_dot(builder, a, b, d, *options)
    left, right = (builder.cast_impl(x, tl.float32).data.astype(np.float64) for x in (a, b))
    with np.errstate(invalid="ignore"):  # NaN and infinity are part of the tests
        total = np.matmul(left, right) + d.data
        return interpreter.TensorHandle(total.astype(np.float32), tl.float32)


def _call_inside_a_kernel(function, *args, **kwargs):
    """The interpreter patches the language anew for each call; once for each module is enough.

    It never takes these patches back, only those of a kernel's launch, which come again with each.
    """
    module = function.fn.__module__
    if module not in _patched_modules:
        interpreter._patch_lang(function.fn)
        _patched_modules.add(module)
    return function.rewrite()(*args, **kwargs)


def mend() -> None:
    """Make the interpreter's bfloat16 what processors compute, and calls inside kernels quick."""
    interpreter._convert_float = _convert_as_processors_do
    interpreter.InterpreterBuilder.create_dot = _dot_in_one_order
    interpreter.InterpretedFunction.__call__ = _call_inside_a_kernel
    # It would copy every argument onto itself: on the CPU its kernels work where tensors lie.
    interpreter.GridExecutor._restore_args_dev = lambda *arguments: None


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """While it lasts, ``pyvit::`` ops on CPU tensors run the Triton kernels of ``kernels/``."""
    mend()
    runs_on_gpu, _backends.runs_on_gpu = _backends.runs_on_gpu, lambda value: True
    library = torch.library.Library("pyvit", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for name in _backends.triton_modules:
            library.impl(name, _backends.launcher(name, "triton"), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
        _backends.runs_on_gpu = runs_on_gpu
