"""What launchers ask before they choose: the GPU's generation, and what was measured on it.

``python -m pyvit tune`` (tune.py) writes a file of configurations that were the fastest on the
present GPU; launch policies look there first. Nothing is ever measured in a user's call. The file
is ``pyvit/tuning.json`` in the user's cache folder, or what ``PYVIT_TUNING`` names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

Configuration = dict[str, int]

# Triton up to 3.9 contracts a product and a sum unless told not to, later ones only if told to: so
# no result depends on the version. Matrix products in float32 are fused multiply-adds in any case
# (benchmarks/aot.py looks), and nothing else gains by it.
ROUNDS_EACH = {"enable_fp_fusion": False}


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(tensor: Tensor) -> int:
    """80 for an A100, 90 for an H100 or H200. Away from a GPU the newest that is known."""
    return _capability(tensor.device) if tensor.is_cuda else 90


def allows_tf32(products: str) -> bool:
    """Torch's switch for "conv" or "matmul". Not ``allow_tf32``: reading that raises once a user
    has set ``fp32_precision``, which came in its place."""
    switch = torch.backends.cuda.matmul if products == "matmul" else torch.backends.cudnn.conv
    return switch.fp32_precision == "tf32"


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Both switches on or off for a while."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = tf32
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def product_kind(tensor: Tensor, tf32: bool) -> str:
    """How matrix products of a tensor's type are made: "half", "tf32", or "ieee" by fused
    multiply-adds, without matrix instructions."""
    if tensor.element_size() == 2:
        return "half"
    return "tf32" if tf32 else "ieee"


def strides(tensor: Tensor) -> list[int]:
    """A tensor's, zero where there is one index alone: torch may then say anything. A zero keeps
    sums of offsets multiples of 16 bytes; a 1 for a 1×1 layer's taps, or for the one column of a
    linear layer, would make a kernel read two bytes at a time."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride())]


# ---- what was measured --------------------------------------------------------------------------

_trial: dict[str, Configuration] = {}  # what is being measured now, by op and class
_asked: dict[str, Configuration] = {}  # what policies ship, for each op and class asked for


def path() -> Path:
    if named := os.environ.get("PYVIT_TUNING"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyvit" / "tuning.json"


@functools.cache
def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


@functools.cache
def _measured(file: Path) -> dict[str, dict[str, Configuration]]:
    """By GPU and Triton version, then by op and class. Read once; a bad file is named and left."""
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text())
        for entries in table.values():
            for name, configuration in entries.items():
                if not all(type(value) is int and value > 0 for value in configuration.values()):
                    raise ValueError(f"{name} is {configuration}")
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(
            f"pyvit: {file} is not a file of tuned configurations ({error}); the shipped ones are "
            "used. `python -m pyvit tune` writes it anew.",
            stacklevel=4,
        )
        return {}
    return table


def place(device: torch.device) -> str:
    """The key under which configurations of one GPU and one Triton are kept."""
    return f"{gpu_name(device)}, Triton {triton.__version__}"


def chosen(tensor: Tensor, name: str, shipped: Configuration) -> Configuration:
    """What was measured for ``name``, an op with its type and size class; or the shipped one."""
    if _trial:
        _asked[name] = shipped
        return _trial.get(name, shipped)
    if not tensor.is_cuda:
        return shipped
    tuned = _measured(path()).get(place(tensor.device), {}).get(name)
    # One of another version of the kernel has other parameters.
    return tuned if tuned is not None and tuned.keys() == shipped.keys() else shipped


@contextlib.contextmanager
def trying(configurations: dict[str, Configuration]) -> Iterator[dict[str, Configuration]]:
    """Policies choose from these; gives what they ship for whatever they are asked."""
    _asked.clear()
    _trial.update(configurations or {"": {}})
    try:
        yield _asked
    finally:
        _trial.clear()


def save(file: Path, device: torch.device, configurations: dict[str, Configuration]) -> None:
    """Add to what is known of other GPUs, types and classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bad file is replaced
        table = dict(_measured(file))
    table[place(device)] = {**table.get(place(device), {}), **configurations}
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    written.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    written.replace(file)
    _measured.cache_clear()
