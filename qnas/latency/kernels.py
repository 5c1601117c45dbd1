"""Kernels, the units that a runtime executes: fused layers, or fused operators of an imported graph.

A runtime folds batch normalisation into the convolution before it and applies a ReLU while the
result is still in registers, so the unit of latency is the fused kernel. FUSIONS has the sequences that
fuse for each kind of runtime; an operator in none of them is its own kernel, under its own name.
Operators come in the order in which they run.

Fusion never crosses the border of a block: in our spaces, no block ends with a convolution whose norm is in
the next block. Latency is therefore a sum over positions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from qnas.spaces.layer import LayerSpec


@dataclass(frozen=True)
class Kernel:
    """A kernel that runs on square maps of `batch` images; `resolution_px` is that of its input.

    `kind` is the kind of a convolution (`conv1x1`: a matrix product at every pixel; `patch`: kernel =
    stride; `conv`: any other; `dwconv`; `gconv`: in groups), or the name of the operator.
    """

    kind: str
    resolution_px: int
    c_in: int
    c_out: int
    kernel: int = 1
    stride: int = 1
    batch: int = 1
    groups: int = 1  # of a grouped convolution; a depthwise one is a kind of its own

    @property
    def out_px(self) -> int:
        """Height and width of the output."""
        if self.kind in ("gap", "linear"):
            return 1
        if self.kernel == self.stride:
            return max(1, self.resolution_px // self.stride)
        return -(-self.resolution_px // self.stride)

    @property
    def rows(self) -> int:
        """Output pixels of all images: the rows of the matrix product that a convolution is."""
        return self.batch * self.out_px**2


GROUPED = "gconv"  # a grouped convolution, which few devices know

# Names of operators that runtimes do not distinguish, or that other graphs name differently.
SAME_AS = {
    "relu6": "relu",
    "bn": "batchnorm",
    "ln": "layernorm",
    "gn": "groupnorm",
    "fc": "linear",
    "silu": "swish",
    "permute": "transpose",
    "other": "elementwise",
}

_FOLDS: dict[tuple[str, ...], str] = {
    **{(kind, "batchnorm"): kind for kind in ("conv", "dwconv", "gconv")},
    # a learned scale folds likewise; behind what cannot take it up, it is a product with a constant
    **{(kind, "layerscale"): kind for kind in ("conv", "dwconv")},
    ("layerscale",): "scale",
}
_CHAINS: dict[tuple[str, ...], str] = {
    **{(*fold, "relu"): kind for fold, kind in _FOLDS.items()},  # also of a layerscale alone
    **{(kind, "relu"): kind for kind in ("conv", "dwconv", "gconv", "linear", "batchnorm", "mul", "scale")},
    ("add", "relu"): "addrelu",
    ("add_scalar", "relu", "mul", "mul_scalar"): "hswish",
    ("add_scalar", "relu", "mul_scalar"): "hsigmoid",
    ("reshape", "transpose", "reshape"): "shuffle",
}

# Kind of runtime -> sequence of operators -> kind of their kernel, which has the shape of the first
# operator. The longest sequence that fits is taken.
FUSIONS: dict[str, dict[tuple[str, ...], str]] = {
    "edge": {**_FOLDS, **_CHAINS},  # TFLite, OpenVINO
    # PyTorch without a compiler: batch normalisation folded by hand, nothing else. Where it is not folded,
    # it passes over the map as the bias of a convolution without one does, and costs as much.
    "eager": _FOLDS,
    "cuda": _FOLDS,  # the same with the tensor cores of a GPU, whose kinds _on_tensor_cores names
    "inductor": _FOLDS,  # torch.compile on a CPU: after folding, chains of elementwise operators (POINTWISE)
    # torch.compile on a GPU: the same, but a batch normalisation is elementwise, too, unless it is that of a
    # shortcut, which joins the addition; an activation joins the layer or group normalisation before it
    "triton": _FOLDS,
}
_COMPILED = ("inductor", "triton")  # with chains of elementwise operators

# Elementwise operators that torch.compile fuses with their neighbours into one pass -> maps that each reads
# besides the one before it. A chain ends after additions and the activation that follows them, so that it
# does not depend on the next block; a pooling of the whole map joins a chain without additions.
POINTWISE: dict[str, int] = {
    **dict.fromkeys(("batchnorm", "relu", "leakyrelu", "clip", "sigmoid", "hsigmoid", "elementwise"), 0),
    **dict.fromkeys(("swish", "hswish", "gelu", "square", "scale", "shift", "add_scalar", "mul_scalar"), 0),
    "layerscale": 0,
    **dict.fromkeys(("add", "mul", "sub"), 1),
}
_ACTIVATIONS = ("relu", "leakyrelu", "clip", "sigmoid", "hsigmoid", "swish", "hswish", "gelu")
_NORMS = ("layernorm", "groupnorm")
# Operators that do not compute their input anew from a convolution and its norm: that map is written.
_READERS = ("conv", "dwconv", GROUPED, "linear", "maxpool", "avgpool", "reflect_pad", "pad", "split", "gap")
LEAST_CHANNELS = 8  # that fill the reads of a matrix unit
MOST_MAPS = 3  # that the name of a chain counts


def fuse(layers: Iterable[LayerSpec], fusion: str = "edge") -> tuple[Kernel, ...]:
    """Return the kernels that the layers of one block become, in order.

    A pooling whose map a `scale` reads again is not fused with what computes the map, which has two readers.
    Batch normalisations behind a convolution fold into it, as in every file that is exported.

    >>> px28 = {"resolution_px": 28, "c_in": 40, "c_out": 40}
    >>> [k.kind for k in fuse([LayerSpec("a", "dwconv", kernel=5, **px28), LayerSpec("b", "relu", **px28)])]
    ['dwconv']
    """
    operators = [Kernel(s.op, s.resolution_px, s.c_in, s.c_out, s.kernel, s.stride) for s in layers]
    names = [operator.kind for operator in operators]
    cut = names.index("gap") if "gap" in names and "scale" in names else 0
    parts = chain(*(fused_parts(some, fusion, folded=True) for some in (operators[:cut], operators[cut:])))
    return tuple(kernel for _, kernel in parts)


def fuse_operators(operators: Sequence[Kernel], fusion: str = "edge") -> tuple[Kernel, ...]:
    """Return the kernels of a sequence of single operators, each given as a kernel of its own name."""
    return tuple(kernel for _, kernel in fused_parts(operators, fusion))


def fused_parts(
    operators: Sequence[Kernel], fusion: str, *, folded: bool = False
) -> Iterator[tuple[slice, Kernel]]:
    """Yield the kernels of `fuse_operators`, each with the part of the operators that it stands for.

    `folded`: every batch normalisation behind a convolution folds into it.
    """
    rules = FUSIONS[fusion]
    longest = max(map(len, rules), default=1)
    names = [SAME_AS.get(op.kind, op.kind) for op in operators]
    i = 0
    while i < len(names):
        if fusion in _COMPILED and names[i] in POINTWISE:
            length = _chain_length(names, i)
            yield slice(i, i + length), replace(operators[i], kind=chain_kind(names[i : i + length]))
            i += length
            continue
        for length in range(min(longest, len(names) - i), 0, -1):
            sequence = tuple(names[i : i + length])
            if fusion == "triton" and length == 2 and not folded and _is_written(operators, names, i + 1):
                continue
            kind = rules.get(sequence, names[i] if length == 1 else None)
            if kind is not None:
                first = operators[i]
                kind = _convolution_kind(first) if kind == "conv" else kind
                if fusion in ("cuda", *_COMPILED):
                    kind = _on_tensor_cores(kind, first)
                if fusion == "triton" and kind in _NORMS:
                    length += i + 1 < len(names) and names[i + 1] in _ACTIVATIONS
                yield slice(i, i + length), replace(first, kind=kind)
                i += length
                break


def operators_ahead(fusion: str) -> int | None:
    """Return how many operators decide what the first of them fuses with; None where all may."""
    return None if fusion in _COMPILED else max(map(len, FUSIONS[fusion]))


def _is_written(operators: Sequence[Kernel], names: Sequence[str], norm: int) -> bool:
    """Whether the next operator reads the map of a batch normalisation.

    The next convolution of another map begins a shortcut: the map before it waits for the addition.
    """
    if norm + 1 == len(names):
        return False
    this, following = operators[norm], operators[norm + 1]
    same = (following.resolution_px, following.c_in) == (this.resolution_px, this.c_out)
    return names[norm + 1] in _READERS and same


def _convolution_kind(kernel: Kernel) -> str:
    if kernel.kernel != kernel.stride:
        return "conv"
    return "conv1x1" if kernel.kernel == 1 else "patch"


def of_one_group(kernel: Kernel) -> Kernel:
    """Return a grouped convolution as one with the input channels of one group.

    It has the multiply-adds and weights of all groups together, and one launch; reads of the other groups'
    input channels are not counted.
    """
    return replace(kernel, kind=_convolution_kind(kernel), c_in=kernel.c_in // kernel.groups, groups=1)


def _on_tensor_cores(kind: str, first: Kernel) -> str:
    """Name the kinds that matrix units treat differently: channels of images, and one row for each image."""
    if kind in ("conv", "patch") and first.c_in < LEAST_CHANNELS:
        return "stem"
    return "vector" if kind in ("conv1x1", "linear") and first.rows == 1 else kind


def _chain_length(names: Sequence[str], start: int) -> int:
    """Return how many operators from `start` on are one pass."""
    end, added = start, False
    while end < len(names) and names[end] in POINTWISE:
        if end > start and names[end] == "square":  # in a neuron it squares another map
            break
        if added and names[end] != "add" and names[end] not in _ACTIVATIONS:
            break
        end += 1
        if added and names[end - 1] in _ACTIVATIONS:
            break
        added = added or names[end - 1] == "add"
    return end + (not added and end < len(names) and names[end] == "gap") - start


def chain_kind(names: Sequence[str]) -> str:
    """Name a chain by what its cost depends on: further maps, the dearest function, a pooling at its end.

    >>> chain_kind(["batchnorm", "add", "relu"]), chain_kind(["batchnorm", "swish", "gap"])
    ('pass+1', 'pass-swish-gap')
    """
    maps = min(MOST_MAPS, sum(POINTWISE.get(name, 0) for name in names))
    function = "-gelu" if "gelu" in names else "-swish" if {"swish", "hswish"} & set(names) else ""
    return f"pass{f'+{maps}' if maps else ''}{function}{'-gap' if names[-1] == 'gap' else ''}"
