"""What of the recorded operators takes time of its own, and that the shipped file is what the data give."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers.places import LATENCY_DATA
from pack import Operator, packed, packed_network, write_arrays

from qnas.common.resources import shipped
from qnas.latency.public_networks import FILE, read_public_networks

DATA = LATENCY_DATA / "zoo_networks.npz"


def op(
    name: str, px: int, c: int, c_out: int = 0, *, kernel: int = 1, groups: int = 1, **other: int
) -> Operator:
    stride, broadcast = other.get("stride", 1), other.get("broadcast", 0)
    return Operator(name, px, c, other.get("h_out", px), c_out or c, kernel, stride, broadcast, groups)


def names(*recorded: Operator, family: str = "any") -> list[str]:
    return [o.op for o in packed_network(family, recorded).operators]


def test_changes_of_layout_are_free_and_moves_are_not() -> None:
    shuffle = op("permute", 28, 24, 48)
    assert names(op("conv", 56, 3, 24), op("permute", 56, 24), op("ln", 56, 24), shuffle) == [
        *("conv", "layernorm", "transpose"),
    ]


def test_a_layer_scale_is_absorbed_and_a_squeeze_excitation_is_not() -> None:
    scale = op("mul", 14, 96, broadcast=1)
    assert names(op("linear", 14, 384, 96), scale, op("add", 14, 96)) == ["linear", "add"]
    gate = (op("conv", 1, 8, 96), op("sigmoid", 1, 96))
    assert names(*gate, scale, op("mul", 14, 96)) == ["conv", "sigmoid", "scale", "mul"]


def test_standardised_weights_are_not_run() -> None:
    number, filters = op("mul", 1, 1), op("bn", 16, 576)  # 256 filters of 3x3 x 64
    conv = op("conv", 24, 64, 256, kernel=3)
    after = (op("gelu", 24, 256), op("mul", 24, 256))  # an activation times its gain
    found = packed_network("nfnet", (number, filters, conv, *after))
    assert [o.op for o in found.operators] == ["conv", "gelu", "mul_scalar"]
    assert found.params == 576 * 256 + 256 + 256  # weights, biases, gains
    # a batch norm before a convolution of its own map is one
    assert names(op("bn", 24, 64), conv) == ["batchnorm", "conv"]


def test_a_product_over_the_pixels_stands_between_transpositions() -> None:
    block = (op("ln", 14, 512), op("linear", 23, 196, 256), op("gelu", 23, 256), op("linear", 23, 256, 196))
    found = packed_network("mixer", (*block, op("add", 14, 512), op("linear", 14, 512, 64)))
    assert [o.op for o in found.operators] == [
        *("layernorm", "transpose", "linear", "gelu", "linear", "transpose", "add", "linear"),
    ]
    assert found.macs == 2 * 512 * 196 * 256 + 196 * 512 * 64


def test_biases_are_where_no_batch_norm_follows() -> None:
    conv = op("conv", 8, 4, 6, kernel=3, groups=2)
    assert packed_network("any", (conv, op("bn", 8, 6))).params == 9 * 2 * 6 + 2 * 6
    assert packed_network("any", (conv, op("relu", 8, 6))).params == 9 * 2 * 6 + 6


@pytest.mark.parametrize(
    ("pool", "h_in", "h_out", "expected"),
    [
        ("maxpool", 112, 56, (3, 2)),
        ("avgpool", 56, 28, (2, 2)),
        ("maxpool", 14, 14, (3, 1)),
        ("avgpool", 28, 7, (4, 4)),
    ],
)
def test_pools_have_the_windows_of_their_strides(
    pool: str, h_in: int, h_out: int, expected: tuple[int, int]
) -> None:
    (found,) = packed_network("any", (op(pool, h_in, 8, h_out=h_out),)).operators
    assert (found.kernel, found.stride) == expected


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5, dtype=np.uint8), "b": np.array(["x", "yz"])}
    for name in ("one", "two"):
        write_arrays(arrays, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with np.load(tmp_path / "one", allow_pickle=False) as read:
        assert {name: read[name].tolist() for name in read.files} == {"a": [0, 1, 2, 3, 4], "b": ["x", "yz"]}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="the data are not here")
def test_the_shipped_file_is_what_the_data_give(tmp_path: Path) -> None:
    with np.load(DATA, allow_pickle=False) as zoo:
        write_arrays(packed(zoo), tmp_path / FILE)
    ours = shipped("public_networks").joinpath(FILE).read_bytes()
    assert _contents(ours) == _contents((tmp_path / FILE).read_bytes())
    assert len(read_public_networks(tmp_path / FILE).networks) == 842


def _contents(file: bytes) -> dict[str, bytes]:
    """Return the arrays: zlib's versions pack them differently."""
    with np.load(io.BytesIO(file), allow_pickle=False) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}
