"""Skips the tests of drawn examples where hypothesis is not installed, and those alone."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


class _Anything(ModuleType):
    """A module whose every attribute can be called, and used as a strategy."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self


def _given(*arguments: Any, **options: Any):
    def decorate(function):
        def test():
            pytest.skip("hypothesis is not installed (pip install hypothesis)")

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


def _settings(*arguments: Any, **options: Any):
    return lambda function: function


def install() -> None:
    """Stand in for hypothesis, where it is not there, before test files import it."""
    if importlib.util.find_spec("hypothesis") is not None:
        return
    module = ModuleType("hypothesis")
    module.given, module.settings = _given, _settings  # type: ignore[attr-defined]
    module.strategies = _Anything("hypothesis.strategies")  # type: ignore[attr-defined]
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = module.strategies  # type: ignore[attr-defined]
