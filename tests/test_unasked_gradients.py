"""Gradients that nobody reads are not computed, in the attack loops of other libraries too."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyvit


class OpNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def parameter(*shape):
    return torch.randn(shape, requires_grad=True)


# the function of x, x's shape, its parameters, and the op that makes the weight's gradient
CALLS = {
    "conv2d": (pyvit.conv2d, (2, 3, 8, 8), [(4, 3, 3, 3), (4,)], "conv2d_weight_grad"),
    "linear": (pyvit.linear, (2, 9, 6), [(5, 6), (5,)], "linear_weight_grad"),
    "patch_embed": (pyvit.patch_embed, (2, 3, 8, 8), [(6, 3, 4, 4), (6,)], "patch_embed_weight_g"),
}


@pytest.mark.parametrize("call", CALLS)
def test_weight_gradients_wait_until_they_are_asked_for(call):
    function, size, shapes, op = CALLS[call]
    x, parameters = parameter(*size), [parameter(*shape) for shape in shapes]
    grad = torch.randn_like(function(x, *parameters))

    def gradients(wanted):
        y = function(x, *parameters)
        with OpNames() as seen:
            found = torch.autograd.grad(y, wanted, grad)
        return found, any(op in name for name in seen.names)

    everything, computed = gradients([x, *parameters])
    assert computed
    for index, wanted in enumerate([x, *parameters]):
        (one,), computed = gradients([wanted])
        assert torch.equal(one, everything[index])
        assert computed == (index == 1), f"argument {index}"

    y = function(x, *parameters)
    y.backward(grad)  # everything, into .grad
    for tensor, expected in zip([x, *parameters], everything, strict=True):
        assert torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("call", CALLS)
def test_parameters_that_are_results_are_differentiated_too(call):
    """A weight that is itself computed, as under weight norm, is no leaf of the graph."""
    function, size, shapes, _ = CALLS[call]
    x, parameters = parameter(*size), [parameter(*shape) for shape in shapes]
    y = function(x, *(p * 2 for p in parameters))
    doubled = torch.autograd.grad(y.sum(), parameters)
    y = function(x, *(held := [(p * 2).detach().requires_grad_() for p in parameters]))
    for ours, plain in zip(doubled, torch.autograd.grad(y.sum(), held), strict=True):
        assert torch.equal(ours, 2 * plain)
