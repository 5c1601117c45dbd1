"""Nodes of a graph, and what some of them compute on small tensors.

Only operators of which shapes are computed, and those of compositions, are evaluated, on tensors of at most
LARGEST_VALUE elements. All others, and those on text, are unknown: a file must not decide what runs here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

LARGEST_VALUE = 1024  # elements of a tensor that is followed: shapes and scalars, not weights
NUMBERS = "biuf"  # kinds of numpy: truth values and numbers
# What numpy and onnx raise for operands that do not fit an operator.
_MISFITS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Node:
    """A node of a graph. An input that is left out is an empty string, an output that is left out is none."""

    name: str
    op: str  # with its domain where that is not the standard one: "com.microsoft.FusedConv"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    proto: onnx.NodeProto

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value, text as str."""
        values = {a.name: helper.get_attribute_value(a) for a in self.proto.attribute if a.name == name}
        value = values.get(name, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else value


def is_mean(weights: Array) -> bool:
    """Whether a convolution with these weights (O, I, H, W) takes a mean over channels, to half a percent."""
    channels = weights.size
    if weights.ndim != 4 or channels < 2 or weights.shape != (1, channels, 1, 1):
        return False
    return bool(np.allclose(weights.astype(np.float64) * channels, 1, atol=0.005))


def evaluate(node: Node, inputs: Sequence[Array | None]) -> Array | None:
    """Return a node's only output for these inputs, None where it is unknown or large.

    An input that is left out is None.
    """
    apply = _APPLY.get(node.op)
    given = [value for value in inputs if value is not None]
    if apply is None or sum(v.size for v in given) > 4 * LARGEST_VALUE:
        return None
    if any(v.dtype.kind not in NUMBERS or v.size > LARGEST_VALUE for v in given):
        return None
    try:
        with np.errstate(all="ignore"):
            value = np.asarray(apply(node, *inputs))
    except _MISFITS:  # not a value that the operator takes, so that there is no result to follow
        return None
    return value if value.dtype.kind in NUMBERS and value.size <= LARGEST_VALUE else None


def _checked(sizes: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape. Raises ValueError for one that is large or negative."""
    shape = tuple(map(int, sizes))
    if min(shape, default=0) < 0 or math.prod(shape) > LARGEST_VALUE:
        raise ValueError(f"shape {shape}")
    return shape


def _axes(node: Node, given: Array | None) -> tuple[int, ...] | None:
    """Return the axes of an input, or in older versions of an attribute; None for none."""
    axes = node.attribute("axes") if given is None else given.reshape(-1).tolist()
    return tuple(axes) if axes is not None else None


def _divide(_: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), dtype=a.dtype)


def _reshape(node: Node, x: Array, shape: Array | None = None) -> Array:
    sizes: list[int] = node.attribute("shape") if shape is None else shape.tolist()
    copies = not node.attribute("allowzero", 0)
    return x.reshape([x.shape[i] if not n and copies else n for i, n in enumerate(sizes)])


def _slice(node: Node, x: Array, *given: Array | None) -> Array:
    parts = [None if v is None else v.tolist() for v in given]
    if not given:
        parts = [node.attribute("starts"), node.attribute("ends"), node.attribute("axes")]
    starts, ends, axes, steps, *_ = (*parts, None, None)
    cuts: list[Any] = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts or (), ends or (), strict=True)):
        cuts[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
    return np.asarray(x[tuple(cuts)])


def _range(_: Node, start: Array, limit: Array, delta: Array) -> Array:
    first, step = start.item(), delta.item()
    (count,) = _checked([max(0, math.ceil((limit.item() - first) / step))])
    return np.asarray(first + step * np.arange(count), dtype=start.dtype)


def _filled(node: Node, shape: Array) -> Array:
    value = node.attribute("value")
    content = np.float32(0) if value is None else numpy_helper.to_array(value).reshape(())
    return np.full(_checked(shape.tolist()), content)


def _scatter(_: Node, x: Array, indices: Array, updates: Array) -> Array:
    changed = x.copy()
    changed[tuple(np.moveaxis(indices, -1, 0))] = updates
    return changed


def _clip(node: Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    bounds = [node.attribute(name) if v is None else v for name, v in (("min", low), ("max", high))]
    return np.asarray(np.clip(x, *bounds) if bounds != [None, None] else x)


def _reduced(reduce: Callable[..., Array]) -> Callable[..., Array]:
    def apply(node: Node, x: Array, axes: Array | None = None) -> Array:
        along = _axes(node, axes)
        if not along:
            along = () if node.attribute("noop_with_empty_axes", 0) else None
        result = reduce(x, axis=along, keepdims=bool(node.attribute("keepdims", 1)))
        return np.asarray(result, dtype=x.dtype)

    return apply


def _of(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of numpy as an operator without attributes."""
    return lambda _, *inputs: apply(*inputs)


def _of_all(apply: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """Return a function of two tensors as an operator of any number of them."""

    def apply_all(_: Node, first: Array, *others: Array) -> Array:
        for other in others:
            first = apply(first, other)
        return first

    return apply_all


_erf = np.vectorize(math.erf, otypes=[np.float32])

_APPLY: dict[str, Callable[..., Any]] = {
    # shapes
    "Identity": _of(lambda x: x),
    "Cast": lambda n, x: x.astype(helper.tensor_dtype_to_np_dtype(n.attribute("to"))),
    "CastLike": _of(lambda x, like: x.astype(like.dtype)),
    "Concat": lambda n, *xs: np.concatenate(xs, axis=n.attribute("axis", 1)),
    "Gather": lambda n, x, i: np.take(x, i, axis=n.attribute("axis", 0)),
    "Slice": _slice,
    "Squeeze": lambda n, x, axes=None: np.squeeze(x, _axes(n, axes)),
    "Unsqueeze": lambda n, x, axes=None: np.expand_dims(x, _axes(n, axes) or ()),
    "Reshape": _reshape,
    "Transpose": lambda n, x: np.transpose(x, n.attribute("perm")),
    "Expand": _of(lambda x, shape: np.broadcast_to(x, _checked(np.broadcast_shapes(x.shape, tuple(shape))))),
    "Range": _range,
    "ConstantOfShape": _filled,
    "ScatterND": _scatter,
    "Where": _of(np.where),
    # truth values
    "Equal": _of(np.equal),
    "Less": _of(np.less),
    "LessOrEqual": _of(np.less_equal),
    "Greater": _of(np.greater),
    "GreaterOrEqual": _of(np.greater_equal),
    "And": _of(np.logical_and),
    "Or": _of(np.logical_or),
    "Not": _of(np.logical_not),
    # numbers
    "Add": _of(np.add),
    "Sub": _of(np.subtract),
    "Mul": _of(np.multiply),
    "Div": _divide,
    "Mod": lambda n, a, b: (np.fmod if n.attribute("fmod", 0) else np.mod)(a, b),
    "Pow": lambda _, a, b: np.power(a, b).astype(a.dtype),
    "Min": _of_all(np.minimum),
    "Max": _of_all(np.maximum),
    "Neg": _of(np.negative),
    "Abs": _of(np.abs),
    "Floor": _of(np.floor),
    "Ceil": _of(np.ceil),
    "Round": _of(np.round),
    "Sqrt": _of(np.sqrt),
    "Reciprocal": _of(np.reciprocal),
    "ReduceSum": _reduced(np.sum),
    "ReduceProd": _reduced(np.prod),
    "ReduceMin": _reduced(np.min),
    "ReduceMax": _reduced(np.max),
    "ReduceMean": _reduced(np.mean),
    # activations
    "Exp": _of(np.exp),
    "Erf": _of(_erf),
    "Tanh": _of(np.tanh),
    "Sigmoid": _of(lambda x: 1 / (1 + np.exp(-x))),
    "HardSigmoid": lambda n, x: np.clip(n.attribute("alpha", 0.2) * x + n.attribute("beta", 0.5), 0, 1),
    "Clip": _clip,
    "Relu": _of(lambda x: np.maximum(x, 0)),
}
