"""Predictions add up, and agree with the table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny import TINY_SPACE

from qnas.common.errors import TableError
from qnas.latency.device import Device, device_names, load_device, parse_device
from qnas.latency.device_table import compute_table, load_table, predict_blocks
from qnas.latency.prediction import DEVICE, estimated_ms, predict_arch
from qnas.latency.table import write_table
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import lower, smallest_and_largest
from qnas.spaces.space import SearchSpace, load_space, parse_space

OWN = """{"schema": "qnas.device/1", "name": "board", "title": "t", "runtime": "r", "precision": "float32",
 "batch": 1, "unit": "ms", "kind": "measured", "source": "s", "date": "2026-01-01"%s}"""


def with_candidates(candidates: list[dict[str, Any]], **changes: Any) -> SearchSpace:
    content = yaml.safe_load(TINY_SPACE) | {"candidates": candidates, **changes}
    return parse_space(json.dumps(content), "tiny.yaml")


def calibrated(device: Device, scale: float, offset_ms: float, margin: float) -> Device:
    content = device.model_dump(mode="json", by_alias=True)
    content["calibration"] = {
        "scale": scale,
        "offset_ms": offset_ms,
        "margin": margin,
        "level": 0.9,
        "n": 20,
        "date": "2026-01-01",
        "source": "test",
    }
    return Device.model_validate(content)


@pytest.mark.parametrize("name", device_names())
@pytest.mark.parametrize("space_name", ["quadranet-small", "quadranet-mobile-bn", "proxyless-mobile"])
def test_the_layers_of_a_prediction_add_up_to_the_tables_latency(name: str, space_name: str) -> None:
    space, device = load_space(space_name), load_device(name)
    arch = arch_from_indices(space, tuple(i % len(p.candidates) for i, p in enumerate(space.positions)))
    table = load_table(device, space)
    prediction = predict_arch(DEVICE, device, space, arch)
    assert prediction.latency_ms == table.latency_ms(arch.indices(space))
    total = math.fsum([device.network_ms, *(layer.latency_ms for layer in prediction.layers)])
    # cells are rounded to a nanosecond, which counts where an image takes a few microseconds
    assert total == pytest.approx(prediction.latency_ms, rel=1e-4, abs=5e-7 * len(prediction.parts))
    assert sum(len(layer.where) for layer in prediction.layers) == len(prediction.parts)
    dearest = [layer.latency_ms for layer in prediction.layers]
    assert dearest == sorted(dearest, reverse=True)
    estimated = math.fsum(p.latency_ms for p in prediction.parts if p.kind == "estimated")
    rounding = 1e-6 * len(prediction.parts) / total
    assert prediction.coverage == pytest.approx(1 - estimated / total, abs=1e-3 + rounding)


@pytest.mark.parametrize("name", device_names())
def test_batch_norm_is_shown_to_be_cheaper_where_layer_norm_is_not_free(name: str) -> None:
    space, device = load_space("quadranet-mobile"), load_device(name)
    arch = arch_from_indices(space, (0,) * len(space.positions))
    prediction = predict_arch(DEVICE, device, space, arch)
    assert prediction.batchnorm_ms is not None
    assert prediction.batchnorm_ms < prediction.latency_ms
    with_bn = load_space("quadranet-mobile-bn")
    assert prediction.batchnorm_ms == pytest.approx(
        load_table(device, with_bn).latency_ms(arch.indices(with_bn)), rel=1e-6
    )
    already = predict_arch(DEVICE, device, with_bn, arch)
    assert already.batchnorm_ms is None


@pytest.mark.parametrize("name", device_names())
def test_batch_norms_take_the_place_of_the_layer_norms_that_candidates_chose(name: str) -> None:
    quadra: dict[str, Any] = {"block": "quadra", "kernel": 3, "expansion": 2}
    stages = {"stages": [{"channels": 8, "positions": 3, "stride": 1}]}
    device = load_device(name)
    plain = load_table(device, with_candidates([quadra], norm="batchnorm", **stages))
    chosen: list[dict[str, Any]] = [
        {**quadra, "norm": ["space", "batchnorm", "scale"]},
        {"block": "identity"},
    ]
    arch = Arch(("quadra_k3_e2", "quadra_k3_e2_batchnorm", "identity"))
    prediction = predict_arch(DEVICE, device, with_candidates(chosen, **stages), arch)
    assert prediction.batchnorm_ms == pytest.approx(plain.fixed_ms + 2 * plain.ms[0][0], abs=3e-6)
    # in a space of batch norms, where layer norms are those of candidates alone
    space = with_candidates([{**quadra, "norm": ["layernorm", "scale"]}], norm="batchnorm", **stages)
    layer_norm, scale = "quadra_k3_e2_layernorm", "quadra_k3_e2_scale"
    prediction = predict_arch(DEVICE, device, space, Arch((layer_norm, scale, scale)))
    scales_ms = 2 * load_table(device, space).ms[0][1]
    assert prediction.batchnorm_ms == pytest.approx(plain.fixed_ms + plain.ms[0][0] + scales_ms, abs=3e-6)
    assert predict_arch(DEVICE, device, space, Arch((scale,) * 3)).batchnorm_ms is None


@pytest.mark.parametrize("name", device_names())
def test_estimated_kernels_are_named_with_what_coverage_leaves_to_them(name: str) -> None:
    space, device = load_space("quadranet-mobile"), load_device(name)
    arch = arch_from_indices(space, (0,) * len(space.positions))
    prediction = predict_arch(DEVICE, device, space, arch)
    found = estimated_ms(prediction.parts)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    unknown = (1 - prediction.coverage) * prediction.latency_ms
    assert sum(found.values()) == pytest.approx(unknown, abs=1e-6 * len(prediction.parts))
    kinds = {row.kernel.kind for row in predict_blocks(device, lower(space, arch)) if row.kind == "estimated"}
    assert found.keys() == kinds


def test_a_device_without_a_model_shows_the_blocks_of_its_table(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    path = tmp_path / "board.json"
    path.write_text(OWN % "", encoding="utf-8")
    (tmp_path / "board").mkdir()
    write_table(compute_table(load_device("cpu"), tiny_space), tiny_space, tmp_path / "board" / "tiny.csv")
    device = load_device(path)
    arch = arch_from_indices(tiny_space, (0,) * len(tiny_space.positions))
    prediction = predict_arch(DEVICE, device, tiny_space, arch)
    assert prediction.batchnorm_ms is None
    assert math.fsum(p.latency_ms for p in prediction.parts) == pytest.approx(prediction.latency_ms)
    assert {"stem", "1.1"} <= {p.name for p in prediction.parts}
    assert {"stem", "head"} <= {layer.what for layer in prediction.layers}
    assert all(layer.what for layer in prediction.layers)


def test_a_calibration_scales_every_cell_and_shifts_the_network_once(tiny_space: SearchSpace) -> None:
    raw = load_device("cpu")
    device = calibrated(raw, 1.5, 0.25, 0.1)
    before, after = compute_table(raw, tiny_space), compute_table(device, tiny_space)
    for indices in ((0, 0, 0, 0), (4, 4, 1, 1), (3, 2, 0, 1)):
        expected = 1.5 * before.latency_ms(indices) + 0.25
        assert after.latency_ms(indices) == pytest.approx(expected, abs=1e-4)
    first = (0, 0, 0, 0)
    estimated = 1.5 * (1 - before.coverage(first)) * before.latency_ms(first)
    assert after.coverage(first) == pytest.approx(1 - estimated / after.latency_ms(first), abs=1e-4)
    assert after.margin == 0.1
    assert after.limit_ms(11.0) == pytest.approx(10.0)
    assert after.digest != before.digest


def test_a_measured_table_is_calibrated_as_a_model_is(tiny_space: SearchSpace, tmp_path: Path) -> None:
    device = calibrated(parse_device(OWN % "", "own"), 2.0, 0.5, 0.2)
    path = tmp_path / "board.json"
    path.write_text(device.to_json(), encoding="utf-8")
    raw = compute_table(load_device("cpu"), tiny_space)
    (tmp_path / "board").mkdir()
    write_table(raw, tiny_space, tmp_path / "board" / "tiny.csv")
    table = load_table(load_device(path), tiny_space)
    assert table.latency_ms((0, 0, 0, 0)) == pytest.approx(2 * raw.latency_ms((0, 0, 0, 0)) + 0.5)
    assert table.margin == 0.2


def test_a_calibration_below_zero_is_refused() -> None:
    content = calibrated(load_device("cpu"), 1.0, 0.0, 0.0).to_json()
    with pytest.raises(TableError, match="below zero"):
        parse_device(content.replace('"offset_ms": 0.0', '"offset_ms": -1000.0'), "mine.json")


def test_facts_of_a_throughput_device_have_its_rate(tiny_space: SearchSpace) -> None:
    arch = smallest_and_largest(tiny_space)[1]
    prediction = predict_arch("device", load_device("rtx4090"), tiny_space, arch)
    assert prediction.facts(1)["images_per_s"] == pytest.approx(1e3 / prediction.latency_ms)
    assert predict_arch("device", load_device("vpu"), tiny_space, arch).facts(1)["images_per_s"] is None
