"""conv2d on ten layers of well-known networks, against F.conv2d in both layouts and F.unfold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Options, Row, against_truth, run_under_pytest
from torch import Tensor

import pyvit
from pyvit.reference.conv2d import conv2d as unfold_conv2d


@dataclass(frozen=True)
class Layer:
    batch: int
    channels: int
    size: int  # height and width in pixels
    out_channels: int
    kernel: int
    stride: int
    padding: int

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        images = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        return f"{images} {self.kernel}x{self.kernel}{stride} to {self.out_channels}"

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> float:
        """Of the forward pass, and of each of the gradients of x and weight."""
        products = self.batch * self.out_channels * self.out_size**2
        return 2.0 * products * self.channels * self.kernel**2


LAYERS = [
    Layer(8, 3, 224, 64, 7, 2, 3),
    Layer(16, 64, 56, 64, 3, 1, 1),
    Layer(16, 128, 28, 128, 3, 1, 1),
    Layer(16, 256, 14, 256, 3, 1, 1),
    Layer(16, 512, 7, 512, 3, 1, 1),
    Layer(16, 64, 56, 256, 1, 1, 0),
    Layer(16, 128, 56, 128, 3, 2, 1),
    Layer(32, 64, 32, 64, 5, 1, 2),
    Layer(32, 3, 128, 64, 7, 2, 3),
    Layer(8, 3, 224, 768, 16, 16, 0),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS = ("forward", "backward", "input gradient")


def cases(options: Options) -> list[Case]:
    layers = [replace(layer, batch=1) for layer in LAYERS]
    return [
        Case("conv2d", group, f"{layer}, {layout}", partial(build, group, layer, layout, options))
        for group in GROUPS
        for layer in (layers if options.quick else LAYERS)
        for layout in LAYOUTS
    ]


def _arguments(layer: Layer, memory_format, wants_x: bool, wants_weight: bool):
    """x, weight, bias; the same values whatever the layout."""
    generator = torch.Generator().manual_seed(0)
    fan_in = layer.channels * layer.kernel**2
    x = torch.randn(layer.batch, layer.channels, layer.size, layer.size, generator=generator)
    size = (layer.out_channels, layer.channels, layer.kernel, layer.kernel)
    weight = torch.randn(size, generator=generator) / fan_in**0.5
    bias = torch.randn(layer.out_channels, generator=generator)
    x = x.contiguous(memory_format=memory_format).requires_grad_(wants_x)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_(wants_weight)
    return x, weight, bias.requires_grad_(wants_weight)


def _work(group: str, conv2d, layer: Layer, memory_format, dtype=torch.float32):
    """A callable that does the group's work with ``conv2d`` alone: backward excludes forward."""
    wants_x, wants_weight = group != "forward", group == "backward"
    tensors = _arguments(layer, memory_format, wants_x, wants_weight)
    x, weight, bias = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors)
    forward = partial(conv2d, x, weight, bias, layer.stride, layer.padding)
    if group == "forward":
        return forward
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    y = forward()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(dtype).contiguous(memory_format=memory_format)
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def _bytes(group: str, layer: Layer) -> float:
    x = layer.batch * layer.channels * layer.size**2
    y = layer.batch * layer.out_channels * layer.out_size**2
    weight = layer.out_channels * layer.channels * layer.kernel**2
    # Backward reads the output's gradient, x and weight and writes the gradients of both.
    return (
        4.0
        * {
            "forward": x + weight + y,
            "backward": y + 2 * x + 2 * weight,
            "input gradient": y + weight + x,
        }[group]
    )


def build(group: str, layer: Layer, layout: str, options: Options) -> Row:
    given = LAYOUTS[layout]
    other = next(value for value in LAYOUTS.values() if value is not given)
    work = partial(_work, group, layer=layer)
    peers = {
        "F.conv2d": work(F.conv2d, memory_format=given),
        "F.conv2d, other layout": work(F.conv2d, memory_format=other),
        "F.unfold": work(unfold_conv2d, memory_format=given),
    }
    if options.compile:
        peers["compiled F.conv2d"] = work(torch.compile(F.conv2d), memory_format=given)

    def truth() -> Tensor | tuple[Tensor, ...]:
        return work(F.conv2d, memory_format=torch.contiguous_format, dtype=torch.float64)()

    return Row(
        ours=work(pyvit.conv2d, memory_format=given),
        peers=peers,
        flops=layer.flops * (2 if group == "backward" else 1),
        bytes=_bytes(group, layer),
        # Gradients sum over more terms than the forward pass: the tests' factor for them is 3.
        check=against_truth(truth, factor=2.0 if group == "forward" else 3.0),
    )


def test_conv2d(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
