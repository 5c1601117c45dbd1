import io
import json
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mutants import check_refusal

from qnas.common.errors import TableError
from qnas.latency.device import Device, parse_device
from qnas.latency.evaluation import (
    OPERATOR_COLUMNS,
    Networks,
    evaluate_networks,
    figures,
    predict_networks,
    read_networks,
)

# conv 8px 3 -> 16 k3 s2, its bn and relu, add, a product of two maps, a broadcast product
OPS = [
    (0, 8, 3, 4, 16, 3, 2, 0),
    (1, 4, 16, 4, 16, 1, 1, 0),
    (2, 4, 16, 4, 16, 1, 1, 0),
    (3, 4, 16, 4, 16, 1, 1, 0),
    (4, 4, 16, 4, 16, 1, 1, 0),
    (4, 4, 16, 4, 16, 1, 1, 1),
]
CONTENT: dict[str, Any] = {
    "devices": np.array(["board", "other"]),
    "latency_ms": np.array([[3.0, 1.0], [np.nan, 2.0], [8.0, np.nan]], dtype=np.float32),
    "name": np.array(["a_0", "b_0", "b_1"]),
    "family": np.array(["a", "b", "b"]),
    "ops": np.array(OPS, dtype=np.int32),
    "op_names": np.array(["conv", "bn", "relu", "add", "mul"]),
    "op_columns": np.array(OPERATOR_COLUMNS),
    "indptr": np.array([0, 4, 5, 9]),
    "indices": np.array([0, 1, 2, 3, 3, 0, 1, 4, 5]),
}
# milliseconds by kind: conv 2, add 0.5, mul 1, scale 4
COSTS = {"conv": 2.0, "add": 0.5, "mul": 1.0, "scale": 4.0}


def write(path: Path, **changed: Any) -> Path:
    content = {k: v for k, v in {**CONTENT, **changed}.items() if v is not None}
    np.savez(path, **content)
    return path


def board(name: str = "board", **changed: Any) -> Device:
    model = {kind: {"kind": "fitted", "terms": {"launch": ms}} for kind, ms in COSTS.items()}
    content = {
        "schema": "qnas.device/1",
        "name": name,
        "title": "a board",
        "runtime": "mine",
        "precision": "float32",
        "batch": 1,
        "unit": "ms",
        "kind": "measured",
        "source": "made up",
        "date": "2026-01-01",
        "fixed_ms": 0.25,
        "model": model,
        **changed,
    }
    return parse_device(json.dumps(content), "test")


@pytest.fixture
def networks(tmp_path: Path) -> Networks:
    return read_networks(write(tmp_path / "nets.npz"))


def test_operators_fuse_into_the_kernels_of_each_network(networks: Networks) -> None:
    kernels, counts = networks.fused("edge")
    dense = counts.toarray()
    found = [{kernels[j].kind: int(row[j]) for j in np.flatnonzero(row)} for row in dense]
    assert found == [{"conv": 1, "add": 1}, {"add": 1}, {"conv": 1, "mul": 1, "scale": 1}]
    assert {(k.resolution_px, k.c_in, k.c_out, k.stride) for k in kernels if k.kind == "conv"} == {
        (8, 3, 16, 2)
    }
    eager = networks.fused("eager")[0]
    assert "relu" in {kernel.kind for kernel in eager}


def test_a_prediction_is_the_fixed_part_and_the_sum_over_kernels(networks: Networks) -> None:
    assert predict_networks(board(), networks).tolist() == [2.75, 0.75, 7.25]


def test_a_prediction_is_calibrated_as_the_device_says(networks: Networks) -> None:
    calibration = {
        "scale": 2.0,
        "offset_ms": 1.0,
        "margin": 0.1,
        "level": 0.9,
        "n": 20,
        "date": "2026-01-01",
        "source": "here",
    }
    found = predict_networks(board(calibration=calibration), networks)
    assert found.tolist() == pytest.approx([2 * 2.75 + 1, 2 * 0.75 + 1, 2 * 7.25 + 1])


def test_an_operator_without_a_cost_is_an_error_not_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "nets.npz", op_names=np.array(["conv", "bn", "relu", "add", "warp"]))
    with pytest.raises(TableError, match="no cost for 'warp' kernels"):
        predict_networks(board(), read_networks(path))


def test_all_come_first_then_each_family_and_unmeasured_networks_are_passed_over(networks: Networks) -> None:
    found = evaluate_networks(board(), networks)
    assert list(found) == ["all", "a", "b"]
    assert [f.n for f in found.values()] == [2, 1, 1]
    assert found["a"].bias_pct == pytest.approx(100 * (2.75 / 3 - 1), abs=0.01)
    assert found["b"].bias_pct == pytest.approx(100 * (7.25 / 8 - 1), abs=0.01)
    assert found["all"].spearman == 1.0


def test_a_family_of_one_network_has_no_rank_correlation(networks: Networks) -> None:
    found = evaluate_networks(board(), networks)
    assert found["a"].spearman is None
    assert "NaN" not in found["a"].model_dump_json()
    with warnings.catch_warnings(action="error"):
        assert figures([1.0, 1.0], [1.0, 2.0]).spearman is None


def test_a_device_is_looked_up_by_name_or_alias(networks: Networks) -> None:
    assert evaluate_networks(board("mine", aliases=["other"]), networks)["all"].n == 2
    with pytest.raises(TableError, match="device mine is not among those of the file: board, other"):
        evaluate_networks(board("mine"), networks)


def test_a_device_on_which_nothing_was_measured_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "nets.npz", latency_ms=np.full((3, 2), np.nan))
    with pytest.raises(TableError, match="none of the 3 networks was measured on board"):
        evaluate_networks(board(), read_networks(path))


def test_only_takes_the_chosen_networks(networks: Networks) -> None:
    some = networks.only(np.array([True, False, True]))
    assert len(some) == 2
    assert predict_networks(board(), some).tolist() == [2.75, 7.25]
    assert some.latency_ms["board"].tolist() == [3.0, 8.0]
    last = networks.only(np.array([False, True, True]))
    assert predict_networks(board(), last).tolist() == [0.75, 7.25]
    assert len(networks.only(np.zeros(3, bool))) == 0


def test_figures_are_those_of_their_definitions() -> None:
    found = figures([1.04, 1.08, 0.8, 4.0], [1.0, 1.0, 1.0, 4.0])
    assert (found.n, found.within_5_pct, found.within_10_pct) == (4, 50.0, 75.0)
    assert found.bias_pct == -2.0
    assert found.rmspe_pct == pytest.approx(100 * np.sqrt((0.04**2 + 0.08**2 + 0.2**2) / 4), abs=0.01)


@pytest.mark.parametrize("name", [n for n in CONTENT if n not in ("name", "op_columns")])
def test_a_missing_array_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(TableError, match=rf"nets\.npz: .*no array {name} in it; expected devices"):
        read_networks(write(tmp_path / "nets.npz", **{name: None}))


@pytest.mark.parametrize("name", ["name", "op_columns"])
def test_arrays_that_are_not_needed_may_be_missing(tmp_path: Path, name: str) -> None:
    assert len(read_networks(write(tmp_path / "nets.npz", **{name: None}))) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"latency_ms": np.ones((3, 3))},
            r"latency_ms: expected shape \(3, 2\), got .* shape \(3, 3\)",
        ),
        ({"latency_ms": np.ones(3)}, "latency_ms: expected numbers in 2 dimensions, got float64"),
        ({"latency_ms": np.zeros((3, 2))}, "latency_ms: expected milliseconds above 0"),
        ({"latency_ms": np.full((3, 2), np.inf)}, "latency_ms: expected milliseconds above 0"),
        ({"devices": np.array(["board", "board"])}, "devices: expected each name once"),
        ({"devices": np.array([1, 2])}, "devices: expected text in 1 dimension, got int64"),
        ({"ops": np.array(OPS)[:, :7]}, "ops: expected 8 columns"),
        ({"ops": np.array(OPS) * 1.5}, "ops: expected integers in 2 dimensions, got float64"),
        ({"ops": np.array(OPS) + 9}, "ops: expected column op within 0 and 4"),
        ({"ops": np.array(OPS) * [1, 0, 1, 1, 1, 1, 1, 1]}, "ops: expected sizes, kernels and strides of 1"),
        ({"op_columns": np.array(OPERATOR_COLUMNS[::-1])}, "op_columns: expected op, h_in"),
        ({"indptr": np.array([0, 4, 9])}, r"indptr: expected shape \(4,\)"),
        ({"indptr": np.array([0, 5, 4, 9])}, "indptr: expected rising numbers from 0 to 9"),
        ({"indptr": np.array([0, 4, 5, 8])}, "indptr: expected rising numbers from 0 to 9"),
        ({"indices": np.arange(9)}, "indices: expected rows of ops, 0 to 5"),
        ({"indices": np.arange(9) - 1}, "indices: expected rows of ops, 0 to 5"),
        ({"latency_ms": np.full((3, 2), 1e300)}, "latency_ms: expected milliseconds above 0"),
        ({"latency_ms": np.full((3, 2), 1e-300)}, "latency_ms: expected milliseconds above 0"),
        (
            {"ops": np.add(OPS, [0, 2**40, 0, 0, 0, 0, 0, 0])},
            "ops: expected sizes, kernels and strides of 1",
        ),
        ({"family": np.array(["a", "b"])}, r"latency_ms: expected shape \(2, 2\)"),
        ({"family": np.array([["a"], ["b"]], dtype=object)}, "family: expected text in 1 dimension, got"),
    ],
)
def test_an_array_that_is_not_as_expected_is_named(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(TableError, match=message) as error:
        read_networks(write(tmp_path / "nets.npz", **changed))
    assert "nets.npz" in str(error.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file"):
        read_networks(tmp_path / "absent.npz")
    whole = write(tmp_path / "nets.npz").read_bytes()
    for name, content in (
        ("empty.npz", b""),
        ("text.npz", b"name,ms\n"),
        ("pickle.npz", b"\x80\x04]\x94."),
        ("half.npz", whole[: len(whole) // 2]),
        ("npy.npz", b"\x93NUMPY"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TableError, match=f"{name}: not an npz file of measured networks"):
            read_networks(tmp_path / name)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "nets.npz")
    content = bytearray(path.read_bytes())
    at = content.index(CONTENT["latency_ms"].tobytes())
    content[at] ^= 0xFF  # the checksum does not fit any more
    path.write_bytes(content)
    with pytest.raises(TableError, match="latency_ms: cannot be read"):
        read_networks(path)


def test_devices_and_operators_with_any_name_are_one_short_line(tmp_path: Path) -> None:
    strange = "\x1b[2J\n" + 5000 * "x"
    networks = read_networks(write(tmp_path / "nets.npz", devices=np.array([strange, "other"])))
    with pytest.raises(TableError, match="device board is not among those of the file") as error:
        evaluate_networks(board(), networks)
    check_refusal(error.value)
    names = np.array([strange, "bn", "relu", "add", "mul"])
    networks = read_networks(write(tmp_path / "nets.npz", op_names=names))
    with pytest.raises(TableError, match="device board has no cost for ") as error:
        evaluate_networks(board(), networks)
    check_refusal(error.value)


def test_a_file_that_unpacks_to_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "nets.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in CONTENT.items():
            content = io.BytesIO()
            np.save(content, array)
            if name == "indices":
                header = content.getvalue()[:128].replace(b"(9,), }" + 12 * b" ", b"(20000000,), }     ")
                assert b"20000000" in header
                content = io.BytesIO(header + bytes(160_000_000))
            archive.writestr(f"{name}.npy", content.getvalue())
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(TableError, match="indices: cannot be read: 160,000,128 bytes packed in"):
        read_networks(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
