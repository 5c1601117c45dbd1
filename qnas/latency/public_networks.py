"""The public convolutional networks that ship with qnas: operators, sizes and accuracy on ImageNet.

`public_networks/timm.npz` has their operators in running order, without weights, and the accuracy that the
source publishes. They become the operators of `qnas.latency.onnx`, so that a network costs the same here and
as a file:

- A permutation that keeps the sizes of its map changes the layout only, which is free.
- A product or a sum with one constant per channel directly after an operator with its own scale and bias is
  absorbed by it. The factors of a squeeze-excitation come after their sigmoid, so they are not.
- A grouped convolution is a stand-in: a convolution with the input channels of one group.
- Padding, resizing, group norms and other activations are uncovered: each is a pass over its larger map.

Which output an operator reads is not recorded, only their order. A sequence fuses as in a chain.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from qnas.common.arrays import open_arrays
from qnas.common.resources import shipped
from qnas.latency.kernels import FUSIONS, Kernel, fused_parts
from qnas.latency.onnx.networks import AFFINE
from qnas.latency.onnx.onnx_operator import UNCOVERED, OnnxOperator, Status

FILE = "timm.npz"
_MOST_BYTES = 20_000_000  # of all arrays; those that ship have 4 million

# array -> numpy's kinds of its values, number of dimensions
ARRAYS: dict[str, tuple[str, int]] = {
    "source": ("U", 1),  # one sentence
    "name": ("U", 1),
    "family": ("U", 1),
    "resolution_px": ("iu", 1),
    "top1_pct": ("f", 1),  # of ImageNet at that resolution, NaN where it is not published
    "op_names": ("U", 1),
    "op_columns": ("U", 1),
    "ops": ("iu", 2),  # the different operators, with the columns of COLUMNS
    "indptr": ("iu", 1),
    "indices": ("iu", 1),  # network i runs ops[indices[indptr[i]:indptr[i + 1]]]
}
COLUMNS = ("op", "h_in", "c_in", "h_out", "c_out", "kernel", "stride", "broadcast", "groups")

# Names of operators in the file -> kinds of kernels, where they differ.
_KINDS = {"bn": "batchnorm", "ln": "layernorm", "silu": "swish", "permute": "transpose"}
_PRODUCTS = ("conv", "dwconv", "gconv", "linear")
_POOLS = {"maxpool": 3, "avgpool": 2}  # the window of one that makes the map smaller: of stems, of shortcuts
_NORMS = ("bn", "ln", "gn")
# Passes that latency models know; other operators of the file are UNCOVERED.
_PASSES = (
    *("bn", "ln", "relu", "relu6", "gelu", "silu", "hswish", "sigmoid", "hsigmoid"),
    *("add", "mul", "gap", "concat", "split", "permute"),
)


@dataclass(frozen=True)
class PublicNetwork:
    """A network at one resolution.

    `params` counts the weights of convolutions and linear layers, their biases (a convolution directly
    before a batch norm has none), and the scale and shift of norms and of layer scales.
    """

    name: str  # as in timm.create_model(name)
    family: str
    resolution_px: int
    imagenet_top1: float | None  # share of ImageNet's validation images; None where it is not published
    macs: int  # for one image
    params: int


@dataclass(frozen=True)
class PublicNetworks:
    """Networks as sequences of operators that latency models know."""

    networks: tuple[PublicNetwork, ...]
    operators: tuple[OnnxOperator, ...]
    of_network: tuple[npt.NDArray[np.int64], ...]  # positions in `operators`, in running order
    source: str

    def sequence(self, network: int) -> tuple[OnnxOperator, ...]:
        """Return the operators of a network by its position."""
        return tuple(self.operators[i] for i in self.of_network[network].tolist())

    def fused(self, fusion: str) -> "FusedNetworks":
        """Return the kernels of all networks by a kind of runtime."""
        longest = max(map(len, FUSIONS[fusion]))
        found: dict[tuple[int, ...], tuple[int, int]] = {}  # operators -> how many fuse, column
        columns: dict[tuple[Kernel, Status, bool], int] = {}
        parts: list[tuple[tuple[OnnxOperator, ...], Kernel]] = []
        rows, kernels = [], []
        for row, indices in enumerate(self.of_network):
            numbers, at = tuple(indices.tolist()), 0
            while at < len(numbers):
                ahead = numbers[at : at + longest]
                if ahead not in found:
                    operators = [self.operators[i] for i in ahead]
                    part, kernel = next(fused_parts([o.kernel for o in operators], fusion))
                    # all that a price depends on
                    key = kernel, operators[0].status, any(o.macs for o in operators[part])
                    if key not in columns:
                        columns[key] = len(parts)
                        parts.append((tuple(operators[part]), kernel))
                    found[ahead] = part.stop, columns[key]
                length, column = found[ahead]
                rows.append(row)
                kernels.append(column)
                at += length
        shape = len(self.networks), len(parts)
        counts = sparse.csr_matrix((np.ones(len(rows)), (rows, kernels)), shape)
        return FusedNetworks(tuple(parts), counts)


@dataclass(frozen=True)
class FusedNetworks:
    """The distinct kernels of networks, each with operators that become it, and how often each occurs."""

    parts: tuple[tuple[tuple[OnnxOperator, ...], Kernel], ...]
    counts: sparse.csr_matrix  # (networks, kernels)


@cache
def public_networks() -> PublicNetworks:
    """Return the networks that ship with qnas."""
    with as_file(shipped("public_networks").joinpath(FILE)) as path:
        return read_public_networks(path)


@cache
def fused_networks(fusion: str) -> FusedNetworks:
    """Return the kernels of the networks that ship with qnas by a kind of runtime."""
    return public_networks().fused(fusion)


def read_public_networks(path: Path) -> PublicNetworks:
    """Read a file of the form of `public_networks/timm.npz`. Nothing in it is unpickled.

    Raises ValueError for a file of another form, and the `DAMAGE` of `qnas.common.arrays` for a damaged one.
    """
    with open_arrays(path, _MOST_BYTES) as content:
        arrays = {name: content.read(name, *form) for name, form in ARRAYS.items()}
    if tuple(arrays["op_columns"].tolist()) != COLUMNS or arrays["ops"].shape[1] != len(COLUMNS):
        raise ValueError(f"{path}: ops: expected the columns {', '.join(COLUMNS)}")
    names = arrays["op_names"].tolist()
    recorded = [_Recorded(names[op], *sizes) for op, *sizes in arrays["ops"].tolist()]
    start = arrays["indptr"].astype(np.int64)
    sequences = _Sequences.of(recorded, arrays["indices"].astype(np.int64), np.diff(start))
    about = [arrays[key].tolist() for key in ("name", "family", "resolution_px", "top1_pct")]
    networks = [
        PublicNetwork(name, family, px, None if math.isnan(pct) else round(pct / 100, 6), macs, params)
        for name, family, px, pct, macs, params in zip(
            *about, sequences.sum(sequences.macs), sequences.sum(sequences.params), strict=True
        )
    ]
    operators = tuple(each.operator() for each in recorded)
    return PublicNetworks(tuple(networks), operators, sequences.priced(), str(arrays["source"][0]))


@dataclass(frozen=True)
class _Recorded:
    """An operator of the file, on square maps."""

    name: str
    h_in: int
    c_in: int
    h_out: int
    c_out: int
    kernel: int
    stride: int
    broadcast: int  # 1: one operand has one value per channel
    groups: int

    @property
    def is_layout(self) -> bool:
        """Whether it only changes the layout of its map."""
        return self.name == "permute" and (self.h_in, self.c_in) == (self.h_out, self.c_out)

    @property
    def is_affine(self) -> bool:
        """Whether it has a scale and a bias of its own."""
        return self.name in _PRODUCTS or _KINDS.get(self.name, self.name) in AFFINE

    @property
    def weights(self) -> int:
        """The weights of a convolution or a linear layer, without a bias."""
        return self.kernel**2 * (self.c_in // self.groups) * self.c_out if self.name in _PRODUCTS else 0

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.h_out**2 * self.weights

    def operator(self) -> OnnxOperator:
        """Return the operator that latency models know, as of the same node of an ONNX file."""
        if self.name in _PRODUCTS:
            return self._product()
        if self.name in _POOLS:
            return OnnxOperator(self.name, self.name, self._pool())
        if self.name not in _PASSES:
            larger = max((self.h_in, self.c_in), (self.h_out, self.c_out), key=lambda m: m[0] ** 2 * m[1])
            return OnnxOperator(self.name, self.name, _pass(UNCOVERED, *larger), status="uncovered")
        kind = "scale" if self.name == "mul" and self.broadcast else _KINDS.get(self.name, self.name)
        is_joined = self.name in (
            "add",
            "mul",
            "concat",
        )  # the size of the output, as the other operands have
        size = (self.h_out, self.c_out) if is_joined else (self.h_in, self.c_in)
        return OnnxOperator(self.name, self.name, _pass(kind, *size))

    def _product(self) -> OnnxOperator:
        if self.name == "linear" and self.h_out == 1:
            return OnnxOperator(self.name, self.name, Kernel("linear", 1, self.c_in, self.c_out), self.macs)
        is_depthwise = self.groups == self.c_in > 1
        kind, c_in = ("dwconv", self.c_in) if is_depthwise else ("conv", self.c_in // self.groups)
        status: Status = "stand-in" if self.groups > 1 and not is_depthwise else "direct"
        kernel = self._windowed(Kernel(kind, self.h_in, c_in, self.c_out, self.kernel, self.stride))
        return OnnxOperator(self.name, self.name, kernel, self.macs, status)

    def _pool(self) -> Kernel:
        """Return a pooling, of which the sizes of the maps are recorded, but not the window."""
        stride = max(1, round(self.h_in / self.h_out))
        window = 3 if stride == 1 else _POOLS[self.name] if stride == 2 else stride
        return self._windowed(Kernel(self.name, self.h_in, self.c_in, self.c_out, window, stride))

    def _windowed(self, kernel: Kernel) -> Kernel:
        """Return a kernel of windows with the resolution that gives its output for any padding."""
        fits = kernel.out_px == self.h_out
        return kernel if fits else replace(kernel, resolution_px=self.h_out * kernel.stride)


def _pass(kind: str, resolution_px: int, channels: int) -> Kernel:
    return Kernel(kind, resolution_px, channels, channels)


@dataclass(frozen=True)
class _Sequences:
    """The operators of all networks one after the other, without changes of layout: arrays (operators,)."""

    recorded: npt.NDArray[np.int64]  # positions in the file
    network: npt.NDArray[np.int64]
    count: int  # of networks
    absorbed: npt.NDArray[np.bool_]  # whether the operator before does its work
    macs: npt.NDArray[np.int64]
    params: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, recorded: Sequence[_Recorded], indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> "_Sequences":
        """Return the sequences of networks of these lengths."""

        def each(function: Callable[[_Recorded], Any]) -> npt.NDArray[Any]:
            return np.array([function(r) for r in recorded])[run]

        run, network = indices, np.repeat(np.arange(len(lengths)), lengths)
        moves = ~each(lambda r: r.is_layout)
        run, network = indices[moves], network[moves]
        follows = np.r_[False, network[1:] == network[:-1]]  # the operator before it, in the same network
        is_factor = each(lambda r: r.name == "mul" and r.broadcast == 1)
        joins = follows & (is_factor | each(lambda r: r.name == "add" and r.broadcast == 1))
        affine = each(lambda r: r.is_affine)
        absorbed = joins & np.r_[False, affine[:-1]]
        # one after another, which is rare
        while np.any(more := joins & ~absorbed & np.r_[False, absorbed[:-1]]):
            absorbed |= more
        before_norm = np.r_[each(lambda r: r.name == "bn")[1:] & follows[1:], False]
        c_in, c_out = each(lambda r: r.c_in), each(lambda r: r.c_out)
        params = (
            each(lambda r: r.weights)
            + c_out * (each(lambda r: r.name in _PRODUCTS) & ~before_norm)
            + 2 * c_in * each(lambda r: r.name in _NORMS)
            + c_in * (absorbed & is_factor)
        )
        return cls(run, network, len(lengths), absorbed, each(lambda r: r.macs), params)

    def sum(self, of_operators: npt.NDArray[np.int64]) -> list[int]:
        """Return sums by network."""
        totals = np.zeros(self.count, np.int64)
        np.add.at(totals, self.network, of_operators)
        return [int(total) for total in totals]

    def priced(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the operators of each network that take time of their own."""
        network, run = self.network[~self.absorbed], self.recorded[~self.absorbed]
        return tuple(np.split(run, np.searchsorted(network, np.arange(1, self.count))))
