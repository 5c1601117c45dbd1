"""Write timm.npz, the public networks that ship with qnas, from the data folder.

    python public_networks/pack.py --data PATH/TO/latency_data

`zoo_networks.npz` there has the operators that timm's models run in PyTorch, as they follow one another. The
file that ships has those that take time of their own on a device, as the same network in a file has them:

- A permutation that keeps the sizes of its map changes the layout only. The two around a product over the
  pixels (mixers) move data; they were not recorded, and are put in.
- Standardised weights are computed once, when a network is loaded.
- A product or a sum with constants directly after an operator with its own scale and bias is absorbed by it.
- A product that was recorded with a number is a `mul_scalar`, one with the factors of a squeeze-excitation a
  `scale`, one with a map a `mul`.

The same data give the same bytes: arrays in a fixed order, the smallest integers that hold them, fixed dates.
"""

import argparse
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qnas.latency.onnx.onnx_operator import side
from qnas.latency.public_networks import COLUMNS, FILE, PRODUCTS

HERE = Path(__file__).resolve().parent
SOURCE = (
    "operators and ImageNet top-1 as published with timm "
    "(github.com/huggingface/pytorch-image-models, Apache-2.0)"
)
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a ZIP archive can have

_KINDS = {"bn": "batchnorm", "ln": "layernorm", "silu": "swish", "permute": "transpose"}
_NORMS = ("bn", "ln", "gn")
_AFFINE = (*PRODUCTS, "bn", "ln")  # have a scale and a bias of their own
_GATES = ("sigmoid", "hsigmoid")  # the end of a squeeze-excitation
# Pooling windows were not recorded: those of one that halves its map, in stems and in shortcuts.
_POOLS = {"maxpool": 3, "avgpool": 2}
# The sums of branches of this family begin with zero, to which the first is added.
_SUMS_FROM_ZERO = ("mobileone",)


@dataclass(frozen=True)
class Operator:
    """An operator of zoo_networks.npz, with the columns of its `ops`."""

    op: str
    h_in: int
    c_in: int
    h_out: int
    c_out: int
    kernel: int
    stride: int
    broadcast: int  # 1: one operand has one value per channel or per pixel
    groups: int

    @property
    def map_in(self) -> tuple[int, int]:
        """Pixels of a side, and channels."""
        return self.h_in, self.c_in

    @property
    def map_out(self) -> tuple[int, int]:
        """Pixels of a side, and channels."""
        return self.h_out, self.c_out

    @property
    def fan_in(self) -> int:
        """Inputs summed into one output of a product."""
        return self.kernel**2 * (self.c_in // self.groups)

    @property
    def row(self) -> tuple[Any, ...]:
        """The operator as it ships: name, sizes and groups."""
        return (self.op, *self.map_in, *self.map_out, self.kernel, self.stride, self.groups)

    def over_output(self, op: str) -> "Operator":
        """Return a pass of this name over the output."""
        return Operator(op, *self.map_out, *self.map_out, 1, 1, 0, 1)


@dataclass(frozen=True)
class Packed:
    """A network as it ships."""

    operators: tuple[Operator, ...]
    macs: int
    params: int


def packed_network(family: str, recorded: Sequence[Operator]) -> Packed:
    """Return the operators of a network that take time of their own, and its size."""
    run = [o for o in recorded if not (o.op == "permute" and o.map_in == o.map_out)]
    # gains of standardised weights; the activations of such networks are multiplied by constants, too
    scaled = any(map(_is_number, run))
    run = [o for o in run if not _is_number(o)]
    pairs = zip(run, [*run[1:], None], strict=True)
    run = [o for o, after in pairs if not _is_of_weights(o, after, scaled=scaled)]
    params = sum(o.c_out for o in run if o.op in PRODUCTS[:-1]) if scaled else 0  # the gains
    found: list[Operator] = []
    before, product, absorbing = "", "", False
    for operator, after in zip(run, [*run[1:], None], strict=True):
        absorbed = absorbing and _is_constant(operator, scaled=scaled)
        if family in _SUMS_FROM_ZERO and (product, before, operator.op) == ("conv", "bn", "add"):
            absorbed |= after is not None and after.op == "add"
        product = operator.op if operator.op in PRODUCTS else product
        if not absorbed:
            found.append(_named(operator, before, scaled=scaled))
        params += _params(operator, after, absorbed=absorbed)
        absorbing, before = absorbed or operator.op in _AFFINE, operator.op
    operators, macs = _with_transpositions(found)
    return Packed(operators, macs, params)


def _is_number(operator: Operator) -> bool:
    """Whether an operator is of a single number."""
    return operator.op == "mul" and operator.map_in == operator.map_out == (1, 1)


def _is_of_weights(operator: Operator, after: Operator | None, *, scaled: bool) -> bool:
    """Whether a batch norm standardises the filters of the convolution after it, as rows (c_out, fan_in)."""
    if operator.op != "bn" or after is None or after.op not in PRODUCTS:
        return False
    is_map = not scaled and operator.map_in == after.map_in
    return not is_map and operator.c_in == after.fan_in and abs(operator.h_in - after.c_out**0.5) < 1


def _is_constant(operator: Operator, *, scaled: bool) -> bool:
    """Whether an operator after one with its own scale and bias multiplies with, or adds, constants."""
    joins = operator.broadcast == 1 and operator.op in ("mul", "add")
    return joins or (scaled and operator.op == "mul")


def _params(operator: Operator, after: Operator | None, *, absorbed: bool) -> int:
    """Count weights, biases where no norm follows, and the scale and shift of norms and layer scales."""
    if operator.op in PRODUCTS:
        has_bias = after is None or after.op != "bn"
        return operator.fan_in * operator.c_out + (operator.c_out if has_bias else 0)
    if operator.op in _NORMS:
        return 2 * operator.c_in
    return operator.c_in if absorbed and operator.op == "mul" and operator.broadcast else 0


def _named(operator: Operator, before: str, *, scaled: bool) -> Operator:
    """Return an operator by the name of its kernel, given the name of the one that ran before it."""
    op = operator.op
    if op in _POOLS:
        return _pool(operator)
    if op == "mul":
        is_number = operator.map_in == (1, 1) or (scaled and before not in _GATES)
        is_factor = operator.broadcast and before != "gelu"  # after it, factors of pixels (FocalNet)
        return operator.over_output("mul_scalar" if is_number else "scale" if is_factor else "mul")
    if op == "add" and operator.broadcast:
        return operator.over_output("add_scalar")
    if op == "other":  # a square in StarReLU, else the difference of a pooling or a branch
        return operator.over_output("square" if before == "relu" else "sub")
    return operator.over_output(op) if op in ("add", "concat") else replace(operator, op=_KINDS.get(op, op))


def _pool(operator: Operator) -> Operator:
    stride = max(1, round(operator.h_in / operator.h_out))
    window = 3 if stride == 1 else _POOLS[operator.op] if stride == 2 else stride
    return replace(operator, kernel=window, stride=stride)


def _with_transpositions(operators: Sequence[Operator]) -> tuple[tuple[Operator, ...], int]:
    """Return operators with the transpositions around products over pixels, and the multiply-adds of all."""
    found: list[Operator] = []
    macs, turned = 0, None  # the map (px, channels) of which channels are the rows now
    for operator in operators:
        if found and operator.op == "linear" and operator.c_in == found[-1].h_out ** 2 != found[-1].c_out:
            turned = found[-1].map_out
            found.append(found[-1].over_output("transpose"))
        elif turned is not None and operator.map_in == turned:
            found.append(found[-1].over_output("transpose"))
            turned = None
        rows = operator.h_out**2
        if turned is not None:
            rows, px = turned[1], side(turned[1])
            operator = replace(operator, h_in=px, h_out=px)
        if operator.op in PRODUCTS:
            macs += rows * operator.fan_in * operator.c_out
        found.append(operator)
    return tuple(found), macs


def packed(zoo: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of zoo_networks.npz in the form that ships."""
    names = zoo["op_names"].tolist()
    recorded = [Operator(names[op], *sizes) for op, *sizes in zoo["ops"].tolist()]
    numbers: dict[tuple[Any, ...], int] = {}
    indices: list[int] = []
    start, macs, params = [0], [], []
    sequences = np.split(zoo["indices"], zoo["indptr"][1:-1])
    for family, sequence in zip(zoo["family"].tolist(), sequences, strict=True):
        network = packed_network(family, [recorded[i] for i in sequence.tolist()])
        indices += [numbers.setdefault(operator.row, len(numbers)) for operator in network.operators]
        start.append(len(indices))
        macs.append(network.macs)
        params.append(network.params)
    op_names = sorted({row[0] for row in numbers})
    arrays: dict[str, Any] = {
        "source": [SOURCE],
        "name": zoo["name"],
        "family": zoo["family"],
        "resolution_px": zoo["resolution"],
        "top1_pct": zoo["top1"].astype(np.float64),
        "macs": macs,
        "params": params,
        "op_names": op_names,
        "op_columns": COLUMNS,
        "ops": [[op_names.index(op), *sizes] for op, *sizes in numbers],
        "indptr": start,
        "indices": indices,
    }
    return {name: _smallest(np.asarray(array)) for name, array in sorted(arrays.items())}


def _smallest(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return whole numbers in the smallest type that holds them."""
    return array.astype(np.min_scalar_type(int(array.max()))) if array.dtype.kind in "iu" else array


def write_arrays(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write an npz file whose bytes depend on the arrays only."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getvalue(), compresslevel=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of zoo_networks.npz")
    with np.load(parser.parse_args().data / "zoo_networks.npz", allow_pickle=False) as zoo:
        write_arrays(packed(zoo), HERE / FILE)
