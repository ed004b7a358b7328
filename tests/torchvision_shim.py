"""Lets timm and torchvision be imported beside a CPU-only torch; for tests and benchmarks alone.

torchvision's wheel registers its own C++ operators, and its Python side registers fake kernels
for them while it is imported. Where the wheel's library was built for another torch (the CUDA
wheel beside a CPU torch), those operators are missing and ``import torchvision`` fails, and timm
with it. Declaring their schemas is enough to import both: no test of ours calls one of them.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)
_library: torch.library.Library | None = None


def install() -> None:
    """Declare torchvision's operators, once, where its own library cannot be loaded."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401  (imports on its own: nothing to mend)
    except RuntimeError:
        _library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            _library.define(f"{name}(...) -> Tensor")


def importorskip(name: str) -> ModuleType:
    """``pytest.importorskip`` for timm and torchvision, with the operators declared first."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install --no-deps {name})")
    install()
    return pytest.importorskip(name)
