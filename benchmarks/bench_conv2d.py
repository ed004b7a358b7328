"""conv2d on ten layers of well-known networks, against F.conv2d in both layouts and F.unfold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Options, Row, against_truth, generator, run_under_pytest
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
    groups: int = 1
    dilation: int = 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        images = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        extra = f" in {self.groups} groups" if self.groups > 1 else ""
        if self.groups == self.channels == self.out_channels:
            extra = " depth-wise"
        if self.dilation > 1:
            extra += f" dilated by {self.dilation}"
        return f"{images} {self.kernel}x{self.kernel}{stride} to {self.out_channels}{extra}"

    @property
    def out_size(self) -> int:
        span = self.dilation * (self.kernel - 1) + 1
        return (self.size + 2 * self.padding - span) // self.stride + 1

    @property
    def flops(self) -> float:
        """Of the forward pass, and of each of the gradients of x and weight."""
        products = self.batch * self.out_channels * self.out_size**2
        return 2.0 * products * self.channels / self.groups * self.kernel**2

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """What a convolution takes after x, weight and bias."""
        return self.stride, self.padding, self.dilation, self.groups


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
# No combination of parameters may fall off a cliff: depth-wise, grouped and dilated layers.
OTHER_LAYERS = [
    Layer(16, 128, 28, 128, 3, 1, 1, groups=128),  # MobileNet
    Layer(16, 64, 56, 64, 3, 2, 1, groups=64),
    Layer(8, 96, 56, 96, 7, 1, 3, groups=96),  # ConvNeXt
    Layer(16, 128, 56, 128, 3, 1, 1, groups=32),  # ResNeXt
    Layer(16, 96, 27, 256, 5, 1, 2, groups=2),  # AlexNet
    Layer(16, 128, 28, 128, 3, 1, 2, dilation=2),
    Layer(8, 256, 28, 256, 3, 1, 4, dilation=4),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS = ("forward", "backward", "input gradient")
OTHER = ", groups and dilation"  # after the group's name
GPU_BATCH = 256


def cases(options: Options) -> list[Case]:
    def rows(title: str, layers: list[Layer], layouts, make) -> list[Case]:
        if options.gpu_rows:
            layers = [replace(layer, batch=GPU_BATCH) for layer in layers]
        if options.quick:
            layers = [replace(layer, batch=1) for layer in layers]
        return [
            Case("conv2d", title, f"{layer}, {layout}", partial(make, layer=layer, layout=layout))
            for layer in layers
            for layout in layouts
        ]

    found = []
    for group in GROUPS:
        single = partial(build, group, torch.float32, options)
        half = partial(build, group, torch.bfloat16, options)
        if options.gpu_rows:
            found += rows(f"{group}, bfloat16", LAYERS, LAYOUTS, half)
            found += rows(group, LAYERS[:3], ["channels_last"], single)
            found += rows(f"{group}, bfloat16{OTHER}", OTHER_LAYERS, ["channels_last"], half)
        else:
            found += rows(group, LAYERS, LAYOUTS, single)
            found += rows(group + OTHER, OTHER_LAYERS, LAYOUTS, single)
    if not options.gpu_rows:
        for group in ("forward", "input gradient"):
            found += rows(f"{group}, bfloat16", LAYERS, LAYOUTS, partial(build_widened, group))
    return found


def _arguments(layer: Layer, memory_format, wants_x: bool, wants_weight: bool):
    """x, weight, bias; the same values whatever the layout."""
    draw = partial(torch.randn, generator=generator(0))
    fan_in = layer.channels // layer.groups * layer.kernel**2
    x = draw(layer.batch, layer.channels, layer.size, layer.size)
    size = (layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel)
    weight = draw(size) / fan_in**0.5
    bias = draw(layer.out_channels)
    x = x.contiguous(memory_format=memory_format).requires_grad_(wants_x)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_(wants_weight)
    return x, weight, bias.requires_grad_(wants_weight)


def _work(
    group: str,
    conv2d,
    layer: Layer,
    memory_format,
    dtype=torch.float32,
    rounded=torch.float32,
):
    """A callable that does the group's work with ``conv2d`` alone: backward excludes forward.

    Its arguments are of ``dtype``, with values that ``rounded`` has too.
    """
    wants_x, wants_weight = group != "forward", group == "backward"
    tensors = _arguments(layer, memory_format, wants_x, wants_weight)
    x, weight, bias = (
        t.detach().to(rounded).to(dtype).requires_grad_(t.requires_grad) for t in tensors
    )
    forward = partial(conv2d, x, weight, bias, *layer.geometry)
    if group == "forward":
        return forward
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    y = forward()
    grad = torch.randn(y.shape, generator=generator(1))
    grad = grad.to(rounded).to(dtype).contiguous(memory_format=memory_format)
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def _bytes(group: str, layer: Layer, itemsize: int = 4) -> float:
    x = layer.batch * layer.channels * layer.size**2
    y = layer.batch * layer.out_channels * layer.out_size**2
    weight = layer.out_channels * layer.channels // layer.groups * layer.kernel**2
    # Backward reads the output's gradient, x and weight and writes the gradients of both.
    return (
        float(itemsize)
        * {
            "forward": x + weight + y,
            "backward": y + 2 * x + 2 * weight,
            "input gradient": y + weight + x,
        }[group]
    )


def build(group: str, dtype: torch.dtype, options: Options, layer: Layer, layout: str) -> Row:
    given = LAYOUTS[layout]
    other = next(value for value in LAYOUTS.values() if value is not given)
    work = partial(_work, group, layer=layer, dtype=dtype, rounded=dtype)
    peers = {
        "F.conv2d": work(F.conv2d, memory_format=given),
        "F.conv2d, other layout": work(F.conv2d, memory_format=other),
        "F.unfold": work(unfold_conv2d, memory_format=given),
    }
    if options.compile and not options.gpu_rows:  # there Inductor calls what F.conv2d calls
        peers["compiled F.conv2d"] = work(torch.compile(F.conv2d), memory_format=given)

    def truth() -> Tensor | tuple[Tensor, ...]:
        return work(F.conv2d, memory_format=torch.contiguous_format, dtype=torch.float64)()

    return Row(
        ours=work(pyvit.conv2d, memory_format=given),
        peers=peers,
        flops=layer.flops * (2 if group == "backward" else 1),
        bytes=_bytes(group, layer, dtype.itemsize),
        # Gradients sum over more terms than the forward pass: the tests' factor for them is 3.
        check=against_truth(truth, factor=2.0 if group == "forward" else 3.0),
        dtype=dtype,
    )


def build_widened(group: str, layer: Layer, layout: str) -> Row:
    """Against torch's bfloat16, and against our own float32 (1x: widening costs nothing)."""
    work = partial(_work, group, layer=layer, memory_format=LAYOUTS[layout], rounded=torch.bfloat16)
    return Row(
        ours=work(pyvit.conv2d, dtype=torch.bfloat16),
        peers={
            "F.conv2d": work(F.conv2d, dtype=torch.bfloat16),
            "our float32": work(pyvit.conv2d, dtype=torch.float32),
        },
        flops=layer.flops,
        bytes=_bytes(group, layer, itemsize=2),
        check=against_truth(
            lambda: work(F.conv2d, dtype=torch.float64)(), 2.0 if group == "forward" else 3.0
        ),
    )


def test_conv2d(case, options, benchmark):
    run_under_pytest(case, options, benchmark)
