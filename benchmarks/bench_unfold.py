"""unfold and fold on windows of well-known networks, against F.unfold and F.fold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Options, Row, against_truth, generator, run_under_pytest
from torch import Tensor

import pyvit


@dataclass(frozen=True)
class Window:
    batch: int
    channels: int
    size: int  # height and width in pixels
    kernel: int
    stride: int
    padding: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        images = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{images} {self.kernel}x{self.kernel}{stride} {dtype}"

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        return self.kernel, 1, self.padding, self.stride  # in F.unfold's order

    @property
    def patches(self) -> int:
        return ((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2


WINDOWS = [
    Window(8, 64, 56, 3, 1, 1),
    Window(8, 512, 7, 3, 1, 1),
    Window(8, 3, 224, 7, 2, 3),
    Window(8, 3, 224, 16, 16, 0),
    Window(8, 64, 56, 3, 1, 1, torch.bfloat16),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


GPU_WINDOWS = [replace(w, batch=128, dtype=torch.bfloat16) for w in WINDOWS[:4]]


def cases(options: Options) -> list[Case]:
    windows = GPU_WINDOWS if options.gpu_rows else WINDOWS
    if options.quick:
        windows = [replace(w, batch=1) for w in windows]
    return [
        Case("unfold", "unfold", f"{w}, {layout}", partial(build_unfold, w, layout))
        for w in windows
        for layout in LAYOUTS
    ] + [Case("unfold", "fold", str(w), partial(build_fold, w)) for w in windows]


def _bytes(w: Window) -> float:
    image, columns = w.channels * w.size**2, w.channels * w.kernel**2 * w.patches
    return float(w.batch * (image + columns) * w.dtype.itemsize)


def build_unfold(w: Window, layout: str) -> Row:
    x = torch.randn(w.batch, w.channels, w.size, w.size, generator=generator(0))
    x = x.to(w.dtype).contiguous(memory_format=LAYOUTS[layout])

    def truth() -> Tensor:
        return F.unfold(x.double(), *w.geometry)

    return Row(
        ours=lambda: pyvit.unfold(x, *w.geometry),
        peers={"F.unfold": lambda: F.unfold(x, *w.geometry)},
        flops=0.0,
        bytes=_bytes(w),
        check=against_truth(truth),
        dtype=w.dtype,
    )


def build_fold(w: Window) -> Row:
    size = (w.batch, w.channels * w.kernel**2, w.patches)
    cols = torch.randn(size, generator=generator(0)).to(w.dtype)

    def truth() -> Tensor:
        return F.fold(cols.double(), (w.size, w.size), *w.geometry)

    return Row(
        ours=lambda: pyvit.fold(cols, w.size, *w.geometry),
        peers={"F.fold": lambda: F.fold(cols, (w.size, w.size), *w.geometry)},
        flops=float(cols.numel()),
        bytes=_bytes(w),
        check=against_truth(truth),
        dtype=w.dtype,
    )


def test_unfold(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
