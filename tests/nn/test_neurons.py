import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.mutants import check_refusal
from helpers.neurons import check_neuron
from torch import Tensor

from qnas.common.errors import SpaceError, UsageError
from qnas.nn.neurons import Convolution, run_neuron
from qnas.spaces.neurons import NEURONS, register_neuron
from qnas.spaces.space import Candidate


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """W * x, each channel by itself: the patch around every place times the weights, zeros outside."""
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    patches = F.unfold(x.reshape(batch * channels, 1, height, width), kernel, padding=kernel // 2)
    rows = weight.reshape(channels, kernel**2)
    found = torch.einsum("bckp,ck->bcp", patches.view(batch, channels, kernel**2, -1), rows)
    return found.view(x.shape)


def constant(values: Tensor) -> Tensor:
    return values[:, None, None]


# The formulas as docs/guides/blocks.md writes them; w[i] and b[i] are weights and biases.
FORMULAS: dict[str, Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]] = {
    "quadranet": lambda x, w, b: convolve(x, w[0]) * convolve(x, w[1]) + convolve(x, w[2]),
    "linear": lambda x, w, b: convolve(x, w[0]) + constant(b[0]),
    "type2": lambda x, w, b: convolve(x**2, w[0]),
    "type3": lambda x, w, b: convolve(x, w[0]) ** 2,
    "type4": lambda x, w, b: convolve(x, w[0]) * convolve(x, w[1]),
    "factored": lambda x, w, b: (convolve(x, w[0]) + constant(b[0])) * (convolve(x, w[1]) + constant(b[1])),
    "fan": lambda x, w, b: (
        (convolve(x, w[0]) + constant(b[0])) * (convolve(x, w[1]) + constant(b[1]))
        + convolve(x**2, w[2])
        + constant(b[2])
    ),
    "compact": lambda x, w, b: convolve(x, w[0]) + constant(b[0]) + convolve(x**2, w[1]) + constant(b[1]),
}
# what of the biases above the function is given with its convolutions; compact's two are one constant
GIVEN: dict[str, Callable[[list[Tensor]], list[Tensor | None]]] = {
    "quadranet": lambda b: [None, None, None],
    "linear": lambda b: [b[0]],
    "type2": lambda b: [None],
    "type3": lambda b: [None],
    "type4": lambda b: [None, None],
    "factored": lambda b: [*b],
    "fan": lambda b: [*b],
    "compact": lambda b: [b[0] + b[1], None],
}


def arguments(neuron: str, kernel: int, channels: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    count = len(NEURONS[neuron].roles)
    weights = [drawn(channels, 1, kernel, kernel, seed=1 + i) for i in range(count)]
    return weights, [drawn(channels, seed=10 + i) for i in range(3)]


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 2, 2)])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_neuron_is_its_formula(neuron: str, shape: tuple[int, ...], kernel: int) -> None:
    x = drawn(*shape)
    weights, biases = arguments(neuron, kernel)
    given = list(zip(weights, GIVEN[neuron](biases[: max(2, len(weights))]), strict=True))
    expected = FORMULAS[neuron](x, weights, biases)
    torch.testing.assert_close(run_neuron(neuron, x, given), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_neuron_works_in_blocks_and_files_and_starts_as_it_says(neuron: str, tmp_path: Path) -> None:
    check_neuron(neuron, tmp_path)


@pytest.mark.usefixtures("_registries")
def test_a_neuron_of_the_user_works_as_the_shipped_ones_do(tmp_path: Path) -> None:
    def bent(x, a, b, c):  # type: ignore[no-untyped-def]  # as a user writes it
        return a(x).relu() * b(x) + c(x)

    layers = {"conv_a": "dwconv", "bend": "relu", "conv_b": "dwconv", "product": "mul"}
    layers |= {"conv_c": "dwconv", "sum": "add"}
    register_neuron("bent", layers, zeros=("conv_b",), constant="conv_c")(bent)
    candidate = Candidate(block="quadra", kernel=3, expansion=2, neuron="bent")
    assert candidate.name == "quadra_k3_e2_bent"
    check_neuron("bent", tmp_path)


@pytest.mark.parametrize(
    ("name", "layers", "properties", "problem"),
    [
        ("fan", {"conv_a": "dwconv"}, {}, "neuron fan: the name is taken"),
        ("My", {"conv_a": "dwconv"}, {}, "neuron 'My': the name must be lower-case letters and digits"),
        ("relu6", {"conv_a": "dwconv"}, {}, "neuron relu6: a norm or an activation has this name"),
        ("my", {"a": "dwconv", "s": "softmax"}, {}, "neuron my: unknown operator softmax, expected dwconv, "),
        ("my", {"a": "dwconv", "act": "relu"}, {}, "neuron my: the block has a layer act already"),
        ("my", {"s": "square"}, {}, "neuron my: its layers have no dwconv; the formula takes 2 arguments"),
        ("my", {"a": "dwconv"}, {"folds": ("b",)}, "neuron my: no convolution b among a"),
        (
            "my",
            {"a": "dwconv", "b": "dwconv", "sum": "add"},
            {},
            "neuron my: the formula takes 2 arguments, expected x and its 2 convolutions",
        ),
    ],
)
@pytest.mark.usefixtures("_registries")
def test_a_neuron_whose_parts_do_not_fit_is_refused(
    name: str, layers: dict[str, str], properties: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpaceError) as error:
        register_neuron(name, layers, **properties)(lambda x, a: a(x))
    assert str(error.value).startswith(problem)


def test_every_neuron_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(NEURONS)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("kernel", [3, 5])  # torch's own gradient, and ours
def test_gradients_are_those_of_finite_differences(neuron: str, kernel: int) -> None:
    weights, biases = arguments(neuron, kernel, channels=2)
    with_bias = [bias is not None for bias in GIVEN[neuron](biases[: max(2, len(weights))])]
    inputs = [drawn(2, 2, 4, 3), *weights, *itertools.compress(biases, with_bias)]

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors[len(weights) :])
        pairs: list[Convolution] = [
            (weight, next(left) if has else None)
            for weight, has in zip(tensors[: len(weights)], with_bias, strict=True)
        ]
        return run_neuron(neuron, x, pairs)

    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("neuron", NEURONS)
def test_torchs_transforms_see_through_a_neuron(neuron: str) -> None:
    weights, _ = arguments(neuron, 3)
    x, direction = drawn(2, 3, 5, 5), drawn(2, 3, 5, 5, seed=5)

    def run(x: Tensor) -> Tensor:
        return run_neuron(neuron, x, [(weight, None) for weight in weights])

    # forward differentiation, which no function with a backward pass of its own has
    slope = torch.func.jvp(run, (x,), (direction,))[1]
    # a neuron is a polynomial of degree 2, whose central difference is its slope at any step
    torch.testing.assert_close(slope, (run(x + direction) - run(x - direction)) / 2)


@pytest.mark.parametrize(
    ("name", "layers", "properties", "formula", "problem"),
    [
        (3, {"a": "dwconv"}, {}, None, "`name=3`: expected text"),
        ("my", ["a"], {}, None, "`layers=['a']`: expected a mapping"),
        (
            "my",
            {"a": "dwconv"},
            {"fold": ()},
            None,
            "`fold`: no property of a neuron: did you mean folds or formula?",
        ),
        ("my", {"a": ["dwconv"]}, {}, None, "neuron my: "),
        ("my", {"a": "dwconv"}, {"start": 3}, None, "neuron my: "),
        ("my", {"a": "dwconv"}, {}, 3, "neuron my: 3 is no function"),
        ("my", {"a": "dwconv"}, {}, max, "neuron my: "),
        ("\x1b[2J" + 5000 * "x", {"a": "dwconv"}, {}, None, "neuron '\\x1b[2Jxxx"),
    ],
)
@pytest.mark.usefixtures("_registries")
def test_a_neuron_of_other_things_is_refused_in_one_line(
    name: Any, layers: Any, properties: dict[str, Any], formula: Any, problem: str
) -> None:
    before = dict(NEURONS)
    with pytest.raises((SpaceError, UsageError)) as error:
        register_neuron(name, layers, **properties)(formula or (lambda x, a: a(x)))
    assert str(error.value).startswith(problem)
    check_refusal(error.value)
    assert before == NEURONS
