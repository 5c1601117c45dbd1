"""The public convolutional networks that ship with qnas: operators, sizes and accuracy on ImageNet.

`public_networks/timm.npz` has the operators of each network in running order, without weights, and the
accuracy that the source publishes; `public_networks/pack.py` writes it. Here they become the operators of
`qnas.latency.onnx`, so that a network costs what it costs as a file: a grouped convolution is a stand-in with
the input channels of one group; padding, resizing, group norms and other activations are uncovered, each a
pass over its larger map. Which output an operator reads is not recorded: a sequence fuses as a chain.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse

from qnas.common.arrays import open_arrays
from qnas.common.resources import shipped
from qnas.latency.kernels import GROUPED, Kernel, fuse_operators, fused_parts, operators_ahead
from qnas.latency.onnx.onnx_operator import OnnxOperator, Status

FILE = "timm.npz"
_MOST_BYTES = 20_000_000  # of all arrays; those that ship have 4 million

# array -> numpy's kinds of its values, number of dimensions
ARRAYS: dict[str, tuple[str, int]] = {
    "source": ("U", 1),  # one sentence
    "name": ("U", 1),
    "family": ("U", 1),
    "resolution_px": ("iu", 1),
    "top1_pct": ("f", 1),  # of ImageNet at that resolution, NaN where it is not published
    "macs": ("iu", 1),
    "params": ("iu", 1),
    "op_names": ("U", 1),
    "op_columns": ("U", 1),  # COLUMNS
    "ops": ("iu", 2),  # the different operators
    "indptr": ("iu", 1),
    "indices": ("iu", 1),  # network i runs ops[indices[indptr[i]:indptr[i + 1]]]
}
COLUMNS = ("op", "h_in", "c_in", "h_out", "c_out", "kernel", "stride", "groups")

PRODUCTS = ("conv", "dwconv", "gconv", "linear")
_POOLS = ("maxpool", "avgpool")
# Operators that few devices know -> kinds of kernels.
_UNCOVERED = {"gn": "groupnorm", "leakyrelu": "leakyrelu", "pad": "pad", "upsample": "upsample"}


@dataclass(frozen=True)
class PublicNetwork:
    """A network at one resolution.

    `params` counts the weights of convolutions and linear layers, biases (none where a batch norm follows),
    and the scale and shift of norms and of layer scales.
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
        column: dict[tuple[int, ...], int] = {}  # by the operators that fuse
        alike: dict[tuple[Kernel, Status, bool], int] = {}
        parts: list[tuple[tuple[OnnxOperator, ...], Kernel]] = []
        rows, columns = [], []
        for row, numbers in self._parts(fusion):
            if numbers not in column:
                part = tuple(self.operators[i] for i in numbers)
                (kernel,) = fuse_operators([operator.kernel for operator in part], fusion)
                # all that a price depends on
                key = kernel, part[0].status, any(operator.macs for operator in part)
                column[numbers] = alike.setdefault(key, len(parts))
                if alike[key] == len(parts):
                    parts.append((part, kernel))
            rows.append(row)
            columns.append(column[numbers])
        shape = len(self.networks), len(parts)
        return FusedNetworks(tuple(parts), sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape))

    def _parts(self, fusion: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield each network's position with the positions of operators that become one kernel."""
        ahead = operators_ahead(fusion)
        lengths: dict[tuple[int, ...], int] = {}  # by the operators that decide it
        for row, indices in enumerate(self.of_network):
            numbers, at = tuple(indices.tolist()), 0
            if ahead is None:
                kernels = [self.operators[i].kernel for i in numbers]
                yield from ((row, numbers[part]) for part, _ in fused_parts(kernels, fusion))
                continue
            while at < len(numbers):
                window = numbers[at : at + ahead]
                if window not in lengths:
                    kernels = [self.operators[i].kernel for i in window]
                    lengths[window] = next(fused_parts(kernels, fusion))[0].stop
                yield row, window[: lengths[window]]
                at += lengths[window]


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
    operators = tuple(_Recorded(names[op], *sizes).operator() for op, *sizes in arrays["ops"].tolist())
    about = [
        arrays[key].tolist() for key in ("name", "family", "resolution_px", "top1_pct", "macs", "params")
    ]
    networks = tuple(
        PublicNetwork(name, family, px, None if math.isnan(pct) else round(pct / 100, 6), macs, params)
        for name, family, px, pct, macs, params in zip(*about, strict=True)
    )
    of_network = tuple(np.split(arrays["indices"].astype(np.int64), arrays["indptr"][1:-1]))
    if len(of_network) != len(networks):
        raise ValueError(f"{path}: indptr: expected the beginnings of {len(networks)} networks")
    return PublicNetworks(networks, operators, of_network, str(arrays["source"][0]))


@dataclass(frozen=True)
class _Recorded:
    """An operator of the file, on square maps."""

    op: str
    h_in: int
    c_in: int
    h_out: int
    c_out: int
    kernel: int
    stride: int
    groups: int

    def operator(self) -> OnnxOperator:
        """Return the operator that latency models know, as of the same node of an ONNX file."""
        if self.op in PRODUCTS:
            return self._product()
        if self.op in _POOLS:
            return OnnxOperator(self.op, self.op, self._windowed(self.op, self.c_in))
        if self.op in _UNCOVERED:
            larger = max((self.h_in, self.c_in), (self.h_out, self.c_out), key=lambda m: m[0] ** 2 * m[1])
            return OnnxOperator(self.op, self.op, _pass(_UNCOVERED[self.op], *larger), status="uncovered")
        return OnnxOperator(self.op, self.op, _pass(self.op, self.h_in, self.c_in))

    def _product(self) -> OnnxOperator:
        macs = self.h_out**2 * self.kernel**2 * (self.c_in // self.groups) * self.c_out
        is_grouped = 1 < self.groups < self.c_in
        if self.op == "linear" and self.h_out == 1:
            kernel = Kernel("linear", 1, self.c_in, self.c_out)
        else:
            kind = GROUPED if is_grouped else "dwconv" if self.groups > 1 else "conv"
            kernel = replace(self._windowed(kind, self.c_in), groups=self.groups if is_grouped else 1)
        status: Status = "stand-in" if is_grouped else "direct"
        return OnnxOperator(self.op, self.op, kernel, macs, status)

    def _windowed(self, kind: str, c_in: int) -> Kernel:
        """Return a kernel of windows with the resolution that gives its output for any padding."""
        kernel = Kernel(kind, self.h_in, c_in, self.c_out, self.kernel, self.stride)
        fits = kernel.out_px == self.h_out
        return kernel if fits else replace(kernel, resolution_px=self.h_out * kernel.stride)


def _pass(kind: str, resolution_px: int, channels: int) -> Kernel:
    return Kernel(kind, resolution_px, channels, channels)
