"""The neurons of a QuadraBlock's mixer: depthwise convolutions of its input X, combined by a formula.

In the docstrings of the formulas `*` is a depthwise convolution at stride 1, padded to keep the size; `.`
and `^2` are elementwise. Types 2 to 4 are numbered as in QuadraLib (MLSys 2022, arXiv 2204.01701).

A formula only calls its convolutions and uses operators and methods of tensors: it is defined without torch,
and the stand-alone export copies its source.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qnas.common.arguments import check_arguments, quoted
from qnas.common.errors import SpaceError, UsageError, abbreviate, nearest, one_line
from qnas.spaces.layer import ACTIVATIONS, NORMS, OPS

Formula = Callable[..., Any]  # (x, *convolutions) -> y, all maps (B, C, H, W)
CONVOLUTION = "dwconv"
NAME = re.compile(r"[a-z][a-z0-9]{0,39}")  # of neurons, blocks, and words as values of a block's parameter
_ELEMENTWISE = {op for op, costs in OPS.items() if not (costs.changes_channels or costs.scales_and_shifts)}
_ELEMENTWISE -= {CONVOLUTION, "gap", "scale", "layerscale"}
# the layers of a QuadraBlock besides those of its neuron
_TAKEN_ROLES = {"norm1", "norm2", "clip", "residual1", "residual2", "expand", "act", "project", "mixer"}
_TAKEN_ROLES |= {"scale1", "scale2"}
SPACES_OWN = "space"  # as a candidate's norm or activation: that of the space
SCALE = "scale"  # as a candidate's norm: a learned scale of each channel, without statistics
_TAKEN_NAMES = {SPACES_OWN, SCALE, *NORMS, *ACTIVATIONS}  # words of a QuadraBlock's other parameters


@dataclass(frozen=True)
class Neuron:
    """A neuron: its formula, layers, biases and start. Convolutions are named by their layers' roles."""

    name: str
    formula: Formula
    layers: Mapping[str, str]  # operator by role, in the order in which they run
    biases: tuple[str, ...] = ()  # convolutions with a bias inside the formula
    # the convolution whose bias is added to the result; it has none where a batch norm shifts the result
    constant: str | None = None
    # factors on the initial weights. Torch draws convolutions whose output has a third of the input's second
    # moment. With these factors, the same holds for a neuron that squares (a normal x^2 has a second moment
    # of 3) or is only a product.
    start: Mapping[str, float] = field(default_factory=dict)
    ones: tuple[str, ...] = ()  # convolutions whose bias starts at one
    # ReLinear (arXiv 2110.06081) starts these at zero, so that the neuron is linear; None: no linear part
    zeros: tuple[str, ...] | None = None
    # the weights of the quadratic terms, which ReLinear trains more slowly; None: the same as `zeros`
    quadratic: tuple[str, ...] | None = None
    # a batch norm folds into these, the shift as a bias into the last; without any, it stays
    folds: tuple[str, ...] = ()
    # a scale without a shift folds into these, with their biases; None: the same as `folds`
    scales: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise SpaceError(f"neuron {quoted(self.name)}: the name must be lower-case letters and digits")
        problems = []
        if self.name in _TAKEN_NAMES:
            problems.append("a norm or an activation has this name")
        if unknown := sorted({*self.layers.values()} - _ELEMENTWISE - {CONVOLUTION}):
            allowed = ", ".join([CONVOLUTION, *sorted(_ELEMENTWISE)])
            problems.append(f"unknown operator {', '.join(unknown)}, expected {allowed}")
        if taken := sorted(_TAKEN_ROLES & {*self.layers}):
            problems.append(f"the block has a layer {', '.join(taken)} already")
        roles = self.roles
        if not roles:
            problems.append(f"its layers have no {CONVOLUTION}")
        named = (*self.biases, *self.start, *self.ones, *(self.zeros or ()), *(self.quadratic or ()))
        named += (*self.folds, *(self.scales or ()), *([self.constant] if self.constant else []))
        if absent := sorted({*named} - {*roles}):
            problems.append(f"no convolution {', '.join(absent)} among {', '.join(roles)}")
        arguments = [p for p in inspect.signature(self.formula).parameters.values() if p.default is p.empty]
        if len(arguments) != 1 + len(roles):
            problems.append(
                f"the formula takes {len(arguments)} arguments, expected x and its {len(roles)} convolutions"
            )
        if problems:
            raise SpaceError(f"neuron {one_line(self.name, 40)}: {abbreviate(problems, '; ')}")

    @property
    def roles(self) -> tuple[str, ...]:
        """The convolutions, in the order in which the formula takes them."""
        return tuple(role for role, op in self.layers.items() if op == CONVOLUTION)

    @property
    def multiplies(self) -> bool:
        """Whether the neuron multiplies features, so that its output must be clipped behind a batch norm."""
        return not {"mul", "square"}.isdisjoint(self.layers.values())

    @property
    def scaled(self) -> tuple[str, ...]:
        """The convolutions that a scale of the result folds into; without any, it stays."""
        return self.folds if self.scales is None else self.scales

    def convolution_biases(self, norm: str) -> dict[str, bool]:
        """Return whether each convolution has a bias, in a block with this norm."""
        has_constant = norm != "batchnorm"
        return {r: r in self.biases or (has_constant and r == self.constant) for r in self.roles}


# Neurons by name: the shipped ones, and those registered by the user.
NEURONS: dict[str, Neuron] = {}
DEFAULT_NEURON = "quadranet"


def register_neuron(name: str, layers: Mapping[str, str], **properties: Any) -> Callable[[Formula], Formula]:
    """Register the decorated formula as a neuron of QuadraBlocks.

    `layers` gives the operator of each layer by role, in the order in which they run; `properties` are the
    other fields of `Neuron`. Raises UsageError for an argument of another type, SpaceError where the name is
    taken or the parts do not fit.

    >>> @register_neuron("gate", {"conv_a": "dwconv", "relu": "relu", "conv_b": "dwconv", "product": "mul"})
    ... def gate(x, a, b):
    ...     return a(x).relu() * b(x)
    >>> NEURONS.pop("gate").roles
    ('conv_a', 'conv_b')
    """

    check_arguments(name=name, layers=layers)
    known = {each.name for each in fields(Neuron)}
    for given in properties:
        if given not in known:
            raise UsageError(f"`{one_line(given, 60)}`: no property of a neuron: {nearest(given, known)}")

    def register(formula: Formula) -> Formula:
        if not callable(formula):
            raise SpaceError(f"neuron {name}: {quoted(formula)} is no function")
        try:
            neuron = Neuron(name, formula, dict(layers), **properties)
        except (TypeError, ValueError) as error:  # properties of other types, a formula without a signature
            raise SpaceError(f"neuron {one_line(name, 40)}: {one_line(error)}") from error
        check_free(f"neuron {name}", getattr(NEURONS.get(name), "formula", None), formula)
        NEURONS[name] = neuron
        return formula

    return register


def check_free(what: str, before: Any, now: Any) -> None:
    """Raise SpaceError where a name has another definition; a notebook's cell may run again."""
    old, new = ((getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (before, now))
    if before is not None and (old != new or None in old):
        raise SpaceError(f"{what}: the name is taken")


@register_neuron(
    DEFAULT_NEURON,
    {"conv_a": "dwconv", "conv_b": "dwconv", "product": "mul", "conv_c": "dwconv", "sum": "add"},
    # its product keeps the second moment of 1.85 / 9 that torch's weights of both factors give it
    zeros=("conv_b",),
    quadratic=("conv_a", "conv_b"),  # W_a goes with W_b, since nothing else uses it
    folds=("conv_a", "conv_c"),
)
def quadranet(x: Any, a: Any, b: Any, c: Any) -> Any:
    """(W_a * x) . (W_b * x) + W_c * x: QuadraNet, arXiv 2311.17956, equation 6."""
    return a(x) * b(x) + c(x)


@register_neuron("linear", {"conv_c": "dwconv"}, constant="conv_c", zeros=(), folds=("conv_c",))
def linear(x: Any, c: Any) -> Any:
    """W_c * x + b: a depthwise convolution."""
    return c(x)


@register_neuron(
    "type2", {"square": "square", "conv_s": "dwconv"}, start={"conv_s": 3**-0.5}, folds=("conv_s",)
)
def type2(x: Any, s: Any) -> Any:
    """W_s * x^2: a depthwise convolution of the square."""
    return s(x * x)


@register_neuron("type3", {"conv_a": "dwconv", "square": "square"})
def type3(x: Any, a: Any) -> Any:
    """(W_a * x)^2: the square of a depthwise convolution."""
    y = a(x)
    return y * y


# a product of newly drawn convolutions has a second moment of 1.85 / 9: both are mostly their centres
_PRODUCT_START = (3 / 1.85) ** 0.25


@register_neuron(
    "type4",
    {"conv_a": "dwconv", "conv_b": "dwconv", "product": "mul"},
    start={"conv_a": _PRODUCT_START, "conv_b": _PRODUCT_START},
    scales=("conv_a",),
)
def type4(x: Any, a: Any, b: Any) -> Any:
    """(W_a * x) . (W_b * x): the product of two depthwise convolutions."""
    return a(x) * b(x)


@register_neuron(
    "factored",
    {"conv_a": "dwconv", "conv_b": "dwconv", "product": "mul"},
    biases=("conv_a", "conv_b"),
    # the linear part, 1/3 with b_b = 1, and the product, 1.85 / 9, are 1/3 together
    start={"conv_a": (1 + 1.85 / 3) ** -0.5},
    ones=("conv_b",),  # as in ReLinear: with b_b = 1, the product contains the linear part
    zeros=("conv_b",),
    scales=("conv_a",),
)
def factored(x: Any, a: Any, b: Any) -> Any:
    """(W_a * x + b_a) . (W_b * x + b_b): quadratic and linear in two convolutions."""
    return a(x) * b(x)


@register_neuron(
    "fan",
    {
        "conv_a": "dwconv",
        "conv_b": "dwconv",
        "product": "mul",
        "square": "square",
        "conv_s": "dwconv",
        "sum": "add",
    },
    biases=("conv_a", "conv_b"),
    constant="conv_s",
    start={"conv_s": 3**-0.5},
    ones=("conv_b",),  # as in ReLinear: with b_b = 1, the product contains the linear part
    zeros=("conv_b", "conv_s"),
    folds=("conv_a", "conv_s"),
)
def fan(x: Any, a: Any, b: Any, s: Any) -> Any:
    """(W_a * x + b_a) . (W_b * x + b_b) + W_s * x^2 + c: Fan et al., arXiv 1704.08362."""
    return a(x) * b(x) + s(x * x)


@register_neuron(
    "compact",
    {"conv_c": "dwconv", "square": "square", "conv_s": "dwconv", "sum": "add"},
    constant="conv_c",
    start={"conv_s": 3**-0.5},
    zeros=("conv_s",),
    folds=("conv_c", "conv_s"),
)
def compact(x: Any, c: Any, s: Any) -> Any:
    """W_c * x + W_s * x^2 + b, the two constants in one: ReLinear, arXiv 2110.06081."""
    return c(x) + s(x * x)
