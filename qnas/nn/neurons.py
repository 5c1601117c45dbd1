"""The neurons of a QuadraBlock's mixer as functions of tensors.

`qnas.spaces.neurons` has their formulas. QuadraNet's neuron has its own kernels (`qnas.nn.quadratic`). The
others use torch's operators, with depthwise gradients that are fast on CPUs (`qnas.nn.depthwise`).
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor

from qnas.nn.depthwise import depthwise_conv2d
from qnas.nn.quadratic import quadratic_conv2d
from qnas.spaces.neurons import DEFAULT_NEURON, NEURONS

Convolution = tuple[Tensor, Tensor | None]  # weights (C, 1, k, k), k odd, and bias (C,)


def run_neuron(name: str, x: Tensor, convolutions: Sequence[Convolution]) -> Tensor:
    """Compute a neuron: (B, C, H, W) -> (B, C, H, W). The convolutions are in the order of its roles."""
    if name == DEFAULT_NEURON:
        a, b, c = convolutions
        assert a[1] is b[1] is None, "the factors of QuadraNet's neuron have no bias"
        return quadratic_conv2d(x, a[0], b[0], c[0], c[1])
    calls = [partial(depthwise_conv2d, weight=weight, bias=bias) for weight, bias in convolutions]
    return cast(Tensor, NEURONS[name].formula(x, *calls))
