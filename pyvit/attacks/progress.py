"""A progress bar where it is wanted and tqdm is installed."""

from __future__ import annotations

import contextlib
from typing import Any


class _NoBar:
    def update(self, n: int) -> None:
        pass


def progress_bar(title: str, total: int, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if wanted:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            return tqdm(total=total, desc=title.removeprefix("attacks."), unit="step")
    return contextlib.nullcontext(_NoBar())
