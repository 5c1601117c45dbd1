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
from qnas.nn.kernels import lean_quadratic
from qnas.nn.neurons import Convolution, depthwise_conv2d, run_neuron
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


SHAPES = [
    (2, 17, 8, 8, 5),
    (2, 16, 14, 13, 7),
    (2, 5, 2, 2, 7),
    (1, 4, 1, 1, 5),
    (3, 6, 9, 7, 3),
    (2, 8, 6, 6, 1),
]


def gradients(
    run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = run(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_convolution_and_its_gradients_are_torchs(
    shape: tuple[int, int, int, int, int], memory: torch.memory_format
) -> None:
    batch, channels, height, width, kernel = shape
    x = drawn(batch, channels, height, width).float().contiguous(memory_format=memory)
    weight, bias = drawn(channels, 1, kernel, kernel, seed=1).float(), drawn(channels, seed=2).float()
    grad = drawn(*x.shape, seed=3).float()

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=kernel // 2, groups=channels)

    for got, want in zip(
        gradients(depthwise_conv2d, x, weight, bias, grad),
        gradients(stock, x, weight, bias, grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_gradient_is_computed_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    form = lean_quadratic.weight_gradient_form

    def counted(*arguments: object) -> object:
        calls.append("weights")
        return form(*arguments)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(lean_quadratic, "weight_gradient_form", counted)
    x, weight, bias = drawn(2, 3, 8, 8), drawn(3, 1, 5, 5, seed=1), drawn(3, seed=2)
    depthwise_conv2d(x.requires_grad_(), weight, bias).sum().backward()  # type: ignore[no-untyped-call]
    assert not calls
    depthwise_conv2d(x.detach(), weight.requires_grad_(), bias).sum().backward()  # type: ignore[no-untyped-call]
    assert calls == ["weights"]


def test_under_autocast_it_runs_in_autocasts_type() -> None:
    x, weight = drawn(2, 3, 8, 8).float(), drawn(3, 1, 5, 5, seed=1).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_backward_pass_under_autocast_keeps_the_types_of_the_forward_pass() -> None:
    x, weight = drawn(2, 3, 8, 8).float().requires_grad_(), drawn(3, 1, 5, 5, seed=1).float().requires_grad_()
    y = depthwise_conv2d(x, weight)
    expected = torch.autograd.grad(y.sum(), [x, weight], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), [x, weight])
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


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
