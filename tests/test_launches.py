"""What launchers decide before a kernel runs: precision, launches of a call, and what compiles."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from launches import recorded

from pyvit.kernels import (
    attention_backward,
    conv2d,
    linear,
    patch_embed,
    projected_step,
    topk_attention,
)

STRIDED = ((2, 2), (1, 1, 1, 1), (1, 1), 1, False)  # and dense otherwise


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


@pytest.fixture
def precisions():
    """Torch's switches for float32 products: of convolutions, and of matrix products."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]

    def set_both(conv, matmul):
        for switch, value in zip(switches, (conv, matmul)):
            switch.fp32_precision = value

    yield set_both
    set_both(*before)


def first_precision(call):
    return recorded(call)[0].arguments["PRECISION"]


# Set by fp32_precision, after which torch's older allow_tf32 cannot be read: that raises.
@pytest.mark.parametrize(("conv", "matmul"), [("tf32", "ieee"), ("ieee", "tf32")])
def test_each_layer_obeys_torchs_switch_for_it(precisions, conv, matmul):
    precisions(conv, matmul)
    x, weight, grad = torch.empty(9, 20), torch.empty(30, 20), torch.empty(9, 30)
    assert first_precision(lambda: linear.linear(x, weight, None)) == matmul
    assert first_precision(lambda: linear.linear_weight_grad(grad, x)) == matmul
    image, kernel, after = torch.empty(2, 3, 8, 8), torch.empty(4, 3, 3, 3), torch.empty(2, 4, 4, 4)
    assert first_precision(lambda: conv2d.conv2d(image, kernel, None, *STRIDED)) == conv
    assert (
        first_precision(lambda: conv2d.conv2d_weight_grad(after, image, kernel.shape, *STRIDED))
        == conv
    )
    tokens, patches = torch.empty(2, 16, 4), torch.empty(4, 3, 2, 2)
    nothing = (None,) * 5
    assert (
        first_precision(lambda: patch_embed.patch_embed(image, patches, *nothing, (2, 2))) == conv
    )
    assert (
        first_precision(
            lambda: patch_embed.patch_embed_weight_grad(
                tokens, image, None, None, patches.shape, (2, 2), False
            )
        )
        == conv
    )
    q = torch.empty(1, 2, 20, 16)
    attention = partial(topk_attention.topk_attention, q, q, q, 4, 0.25, True)
    assert first_precision(attention) == matmul
    out, selection, softmax = torch.empty(1, 2, 20, 16), *saved(q)
    backward = partial(attention_backward.topk_attention_backward, out, out, q, q, q)
    needs = (True,) * 4
    launches = recorded(lambda: backward(selection, softmax, 4, 20, 0.25, *needs))
    kinds = {launch.arguments.get("PRECISION", matmul) for launch in launches}
    assert kinds == {matmul}


def saved(q):
    """What the forward pass of attention leaves for the backward pass."""
    rows, keys = q.shape[:3], q.shape[2]
    return torch.empty(*rows, (keys + 7) // 8, dtype=torch.uint8), torch.empty(*rows, 2)


def test_older_switches_are_obeyed(precisions):
    x, weight = torch.empty(9, 20), torch.empty(30, 20)
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        assert first_precision(lambda: linear.linear(x, weight, None)) == precision


def gradient(image, kernel, stride, padding=0, **layout):
    weight = torch.empty(8, image[1], *kernel)
    sizes = [(n + 2 * padding - k) // stride + 1 for n, k in zip(image[2:], kernel)]
    grad = torch.empty(image[0], 8, *sizes).to(**layout)
    geometry = ((stride, stride), (padding,) * 4, (1, 1), 1, False)
    return recorded(lambda: conv2d.conv2d_input_grad(grad, weight, image, *geometry))


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_all_phases_of_a_strided_gradient_are_one_launch(stride):
    assert [launch.name for launch in gradient((2, 3, 30, 31), (7, 7), stride, 3)] == [
        "_taps_kernel"
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patches_that_do_not_overlap_are_products_of_their_own(layout):
    (launch,) = gradient((2, 3, 32, 48), (16, 16), 16, memory_format=layout)
    assert launch.name == "_image_kernel"
    assert gradient((2, 3, 32, 48), (1, 1), 2)[0].name == "_taps_kernel"
    assert gradient((2, 3, 32, 48), (3, 3), 2)[0].name == "_taps_kernel"


def test_a_weight_that_many_pixels_read_has_its_channels_together():
    weight = torch.empty(8, 16, 3, 3)
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1, False)
    for size, copied in ((64, True), (4, False)):
        x = torch.empty(2, 16, size, size)
        (launch,) = recorded(lambda x=x: conv2d.conv2d(x, weight, None, *geometry))
        assert (launch.arguments["w_k"] == 1) is copied


# A stride of 1 where there is one index makes every offset a number of 2 bytes, not of 16.
@pytest.mark.parametrize("layer", ["linear", "1x1"])
def test_strides_that_say_nothing_are_zero(layer):
    if layer == "linear":
        call = lambda: linear.linear(torch.empty(64, 32), torch.empty(48, 32), None)  # noqa: E731
    else:
        x = torch.empty(2, 32, 8, 8, memory_format=torch.channels_last)
        weight, geometry = torch.empty(48, 32, 1, 1), ((1, 1), (0,) * 4, (1, 1), 1, True)
        call = lambda: conv2d.conv2d(x, weight, None, *geometry)  # noqa: E731
    (launch,) = recorded(call)
    strides = [launch.arguments[name] for name in ("s_x", "s_c", "w_k", "w_y", "w_x")]
    assert strides == [0 if layer == "linear" else 32, 1, 1, 0, 0]


def test_no_result_depends_on_tritons_default_for_fusion():
    x = torch.empty(2, 16, 8, 8)
    step = (x, x, x, 1, False, False, 0.1, 0.3, None, None, 0.0, 1.0, 0.99)

    def call():
        conv2d.conv2d_weight_grad(x, x, (16, 16, 3, 3), *STRIDED)
        conv2d.conv2d(x, torch.empty(4, 16, 3, 3), None, *STRIDED)
        projected_step.projected_step_momentum(*step, x, 1.0)

    launches = recorded(call)
    assert len(launches) == 7
    assert all(launch.arguments["enable_fp_fusion"] is False for launch in launches)


# In a process that compiles: here kernels are the interpreter's. Prints, for each kernel, how many
# there are for batches of these sizes.
COUNT_KERNELS = """
import collections, json
import aot, torch
from pyvit.kernels import (
    attention_backward,
    conv2d,
    linear,
    patch_embed,
    projected_step,
    topk_attention,
)

kernels = collections.defaultdict(set)
torch.set_default_device("meta")
for batch in (1, 2, 3, 4, 7, 16):
    image, tokens = torch.empty(batch, 16, 20, 20), torch.empty(batch, 25, 48)
    weight, patches = torch.empty(32, 16, 3, 3), torch.empty(48, 16, 4, 4)
    grad, geometry = torch.empty(batch, 32, 10, 10), ((2, 2), (1,) * 4, (1, 1), 1, False)
    x, y, of_linear = torch.empty(batch * 9, 16), torch.empty(batch * 9, 48), torch.empty(48, 16)
    nothing = (None,) * 5
    step = (image, image, image, 1, False, False, 0.1, 0.3, None, None, 0.0, 1.0, 0.99)

    def call():
        conv2d.conv2d(image, weight, None, *geometry)
        conv2d.conv2d_input_grad(grad, weight, image.shape, *geometry)
        conv2d.conv2d_weight_grad(grad, image, weight.shape, *geometry)
        linear.linear(x, of_linear, None)
        linear.linear_weight_grad(y, x)
        patch_embed.patch_embed(image, patches, *nothing, (4, 4))
        patch_embed.patch_embed_image_grad(tokens, patches, None, image.shape, (4, 4), False)
        patch_embed.patch_embed_weight_grad(
            tokens, image, None, None, patches.shape, (4, 4), False
        )
        projected_step.projected_step_momentum(*step, image, 1.0)

    for place, launch in enumerate(aot.launches(call, 90)):
        kernels[f"{place} {launch.kernel.fn.__name__}"].add(aot.prepare(launch, 90)[-1])
print(json.dumps({name: len(keys) for name, keys in kernels.items()}))
"""


def test_a_batch_of_another_size_compiles_nothing_anew():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    environment["PYTHONPATH"] = os.pathsep.join([str(benchmarks), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", COUNT_KERNELS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert len(counts) >= 12
    # A batch of one has strides that say nothing, which are zero: a kernel of its own.
    assert all(count <= 2 for count in counts.values()), counts
