import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.mutants import check_refusal

from qnas.common.errors import TableError
from qnas.common.resources import shipped
from qnas.latency import device as device_module
from qnas.latency.device import Device, device_names, load_device, parse_device
from qnas.latency.device_table import load_table
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel
from qnas.spaces.space import load_space

DEVICES = list(device_names())
KINDS = [(device, kind) for device in DEVICES for kind in load_device(device).model]
TIMM = ("rtx3090", "rtx4090", "rtx4090-compiled", "rtx5090", "i7-12700h")  # fitted to timm's networks
OWN: dict[str, Any] = {
    "schema": "qnas.device/1",
    "name": "mine",
    "title": "my device",
    "runtime": "some runtime",
    "precision": "float32",
    "batch": 1,
    "unit": "ms",
    "kind": "measured",
    "source": "measured here",
    "date": "2026-01-01",
}


def test_devices_are_found_by_name_and_by_alias() -> None:
    assert {"cortex-a76", "myriad-vpu", "a100"} <= set(DEVICES)
    for alias, name in (("cpu", "cortex-a76"), ("vpu", "myriad-vpu"), ("gpu", "a100")):
        assert load_device(alias) == load_device(name)
        assert load_device(alias).name == name


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_file_is_named_as_its_device_and_reads_back(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert parse_device(device.to_json(), name).model_dump() == device.model_dump()
    assert device.source
    assert device.accuracy


def test_an_unknown_device_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(TableError, match=r"unknown device 'vpo': did you mean vpu\? known: a100, .*cpu, "):
        load_device("vpo")
    with pytest.raises(TableError, match=r"device nowhere\.json: no such file"):
        load_device("nowhere.json")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_kernel_costs_more_than_zero(name: str, kind: str) -> None:
    assert load_device(name).kernel_ms(Kernel(kind, 1, 1, 1)) > 0


def resized(kernel: Kernel, field: str, size: int) -> Kernel:
    return Kernel(**{**dataclasses.asdict(kernel), field: size})


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize(
    ("field", "sizes"),
    [
        ("c_in", range(1, 200, 7)),
        ("c_out", range(1, 700, 7)),
        ("kernel", (1, 3, 5, 7, 9)),
        ("resolution_px", (7, 14, 28, 32, 56, 112)),
    ],
)
def test_latency_does_not_fall_as_a_kernel_grows(
    name: str, kind: str, field: str, sizes: tuple[int, ...]
) -> None:
    device = load_device(name)
    for px, channels, stride in itertools.product((7, 56), (16, 320), (1, 2)):
        kernel = Kernel(kind, px, channels, channels, 3, stride)
        times = [device.kernel_ms(resized(kernel, field, size)) for size in sizes]
        assert times == sorted(times), kernel


@pytest.mark.parametrize("name", DEVICES)
def test_a_larger_depthwise_kernel_takes_longer(name: str) -> None:
    device = load_device(name)
    for px, channels in itertools.product((7, 14, 28, 56, 112), (16, 96, 960)):
        times = [device.kernel_ms(Kernel("dwconv", px, channels, channels, k)) for k in (3, 5, 7)]
        assert times[0] < times[1] < times[2]


@pytest.mark.parametrize("name", DEVICES)
def test_what_was_never_timed_is_marked_with_how_it_was_estimated(name: str) -> None:
    for kind, model in load_device(name).model.items():
        assert model.kind in ("fitted", "estimated")
        if model.kind == "estimated":
            assert model.note.startswith(("not in the measured networks", "not timed")), kind
    # of the A100 only operators were timed, no depthwise ones; timm's networks have a layer normalisation
    unknown = (
        "dwconv" if name in ("a100-eager", "a100-throughput") else "clip" if name in TIMM else "layernorm"
    )
    assert load_device(name).model[unknown].kind == "estimated"


@pytest.mark.parametrize("name", DEVICES)
def test_a_clip_is_estimated_as_one_pass_over_a_map(name: str) -> None:
    device = load_device(name)
    assert device.model["clip"].kind == "estimated"
    for px, channels in ((1, 8), (7, 320), (112, 96)):
        clip, relu = (device.kernel_ms(Kernel(kind, px, channels, channels)) for kind in ("clip", "relu"))
        assert clip == relu


def test_an_unknown_kind_of_kernel_is_an_error_not_zero() -> None:
    with pytest.raises(TableError, match=r"device cortex-a76 has no cost for 'convv' kernels: did you mean"):
        load_device("cpu").kernel_ms(Kernel("convv", 7, 8, 8))


def test_a_device_of_throughput_says_what_its_milliseconds_are_of() -> None:
    throughput = parse_device(json.dumps({**OWN, "quantity": "throughput", "batch": 256}), "mine")
    assert throughput.per_image == "an image at batch 256"
    assert parse_device(json.dumps(OWN), "mine").quantity == "latency"
    assert parse_device(json.dumps(OWN), "mine").per_image == ""
    with pytest.raises(TableError, match="quantity: expected 'latency' or 'throughput', got 'speed'"):
        parse_device(json.dumps({**OWN, "quantity": "speed"}), "mine")


def test_all_problems_of_a_device_file_come_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    bad = {
        **OWN,
        "unit": "s",
        "typo": 1,
        "batch": 0,
        "model": {"add": {"kind": "fitted", "terms": {"lunch": 1.0}}, "mul": {"kind": "fitted", "terms": {}}},
    }
    path.write_text(json.dumps(bad))
    with pytest.raises(TableError) as error:
        load_device(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for part in (
        "unit: expected 'ms', got 's'",
        "typo: ",
        "batch: expected at least 1, got 0",
        "model.add: unknown feature 'lunch': did you mean launch?",
        "model.mul: launch must be above 0",
    ):
        assert part in message


@pytest.mark.parametrize("bad", ["[1]", "{", '{"schema": "qnas.device/9"}'])
def test_a_file_that_is_no_device_is_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(bad)
    with pytest.raises(TableError, match=r"mine\.json: "):
        load_device(path)


def test_a_negative_or_infinite_weight_is_refused() -> None:
    for weight in (-1.0, float("inf"), float("nan")):
        bad = {**OWN, "model": {"add": {"kind": "fitted", "terms": {"launch": 1.0, "mmacs": weight}}}}
        with pytest.raises(TableError, match=r"model\.add\.terms\.mmacs"):
            parse_device(json.dumps(bad), "mine")


GRID = {"knots": {"rows": [1, 4], "channels": [1, 2, 8]}, "ms": [[1, 2, 3], [1, 2.5, 4]]}


def with_model(**model: dict[str, Any]) -> str:
    return json.dumps({**OWN, "model": model})


def test_a_kind_like_another_costs_what_the_other_costs() -> None:
    # two terms, so that a kernel's own kind and shape must reach the other kind's formula
    add = {"kind": "fitted", "terms": {"launch": 0.5, "kelements_in": 2.0}}
    device = parse_device(with_model(add=add, sub={"kind": "estimated", "like": "add"}), "mine")
    assert device.kernel_ms(Kernel("sub", 10, 20, 20)) == 0.5 + 2.0 * 10 * 10 * 20 / 1e3
    assert device.kernel_source(Kernel("sub", 10, 20, 20)) == "estimated"


def test_a_kind_is_like_one_that_has_a_cost() -> None:
    like = {name: {"kind": "estimated", "like": other} for name, other in (("sub", "mul"), ("mul", "sub"))}
    add = {"kind": "fitted", "terms": {"launch": 1.0}}
    with pytest.raises(TableError, match=r"model\.sub: no kind 'mul' with a cost of its own: known: add$"):
        parse_device(with_model(add=add, **like), "mine")
    with pytest.raises(TableError, match=r"no kind 'ad' with a cost of its own: did you mean add\?"):
        parse_device(with_model(add=add, sub={"kind": "estimated", "like": "ad"}), "mine")


def test_a_kind_has_exactly_one_form_of_cost() -> None:
    for forms in ({}, {"terms": {"launch": 1.0}, "grid": GRID}, {"grid": GRID, "like": "add"}):
        with pytest.raises(TableError, match=r"model\.add: expected one of terms, grid and like"):
            parse_device(with_model(add={"kind": "fitted", **forms}), "mine")


def test_a_grid_is_interpolated_from_the_file() -> None:
    device = parse_device(with_model(add={"kind": "fitted", "grid": GRID}), "mine")
    # rows 4 = 2 px squared, channels 4: half of the way from 2 to 8 in logs
    assert device.kernel_ms(Kernel("add", 2, 4, 4)) == pytest.approx((2.5 * 4) ** 0.5)
    again = parse_device(device.to_json(), "again")
    assert again.model_dump() == device.model_dump()
    assert "[1.0, 2.5, 4.0]" in device.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knots": {"row": [1, 4], "channels": [1, 2, 8]}}, "unknown axis 'row': did you mean rows"),
        ({"knots": {}}, "knots: expected one axis or more"),
        (
            {"knots": {"rows": [4, 1], "channels": [1, 2, 8]}},
            r"knots\.rows: expected two or more, each above",
        ),
        ({"knots": {"rows": [1, 4], "channels": [1]}}, r"knots\.channels: expected two or more, each above"),
        ({"knots": {"rows": [0, 4], "channels": [1, 2, 8]}}, r"\.knots\.rows\[0\]: "),
        ({"ms": [[1, 2, 3]]}, "ms: expected 2 rows of 3 values, as there are knots, got 1 rows of 3"),
        ({"ms": []}, "ms: expected 2 rows of 3 values, as there are knots, got 0 rows of none"),
        ({"ms": [[1, 2, 3], [1, 2]]}, "ms: expected 2 rows of 3 values, .* got 2 rows of 2 and 3"),
        ({"ms": [[1, 2, 1.5], [1, 2, 3]]}, r"ms: falls along channels, from 2 to 1\.5"),
        ({"ms": [[1, 2, 3], [0.5, 2, 3]]}, r"ms: falls along rows, from 1 to 0\.5"),
        ({"ms": [[0, 2, 3], [1, 2, 3]]}, r"\.ms\[0\]\[0\]: "),
        ({"ms": 3}, r"\.ms: expected a list, got 3"),
        (
            {"beyond": {"rows*fan_in": 1}},
            r"beyond: expected a product of axes as rows\*channels, got 'rows\*fan_in",
        ),
        (
            {"beyond": {"rows*rows": 1}},
            r"beyond: expected a product of axes as rows\*channels, got 'rows\*rows'",
        ),
        ({"beyond": {"rows": -1}}, r"\.beyond\.rows: expected at least 0.*, got -1"),
    ],
)
def test_a_malformed_grid_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=rf"^mine: model\.add\.grid.*{message}"):
        parse_device(with_model(add={"kind": "fitted", "grid": {**GRID, **change}}), "mine")


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_file_is_at_most_a_megabyte(name: str) -> None:
    assert len(load_device(name).to_json().encode()) <= 2**20


def test_a_device_of_ones_own_needs_no_model(tmp_path: Path) -> None:
    space = load_space("quadranet-small")
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(OWN))
    device = load_device(path)
    assert isinstance(device, Device)
    with pytest.raises(
        TableError, match=r"device mine has no latency table for space quadranet-small .*no model"
    ):
        load_table(device, space)
    with pytest.raises(TableError, match="device mine has no model, only tables"):
        device.kernel_ms(Kernel("add", 7, 8, 8))
    (tmp_path / "bench").mkdir()
    table = shipped("latency_tables").joinpath("cortex-a76").joinpath("quadranet-small.csv")
    (tmp_path / "bench" / "quadranet-small.csv").write_text(table.read_text())
    assert load_table(device, space).device == "mine"
    assert load_table(device, space).ms == load_table(load_device("cpu"), space).ms


def test_a_shipped_device_file_works_from_elsewhere(tmp_path: Path) -> None:
    space = load_space("quadranet-small")
    file = shipped("latency_tables").joinpath("a100.json")
    path = tmp_path / "copy.json"
    path.write_text(file.read_text())
    assert load_table(load_device(path), space) == load_table(load_device("gpu"), space)


def test_a_file_is_parsed_once_until_its_text_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = device_module.parse_device

    def count(text: str, where: str) -> Device:
        parsed.append(where)
        return parse(text, where)

    monkeypatch.setattr(device_module, "parse_device", count)
    device_module._load_shipped.cache_clear()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(OWN))
    for _ in range(3):
        assert load_device("vpu").name == "myriad-vpu"
        assert load_device(path).title == "my device"
        device_names()
    assert sorted(parsed) == sorted([*(f"device {name}" for name in DEVICES), str(path)])
    path.write_text(json.dumps(OWN | {"title": "my board"}))  # at once, of the same length
    assert load_device(path).title == "my board"


def test_a_device_is_taken_where_a_name_is() -> None:
    device = load_device("vpu")
    assert load_device(device) is device


def test_tables_need_no_torch() -> None:
    code = (
        "import sys; from qnas.latency.device import load_device; "
        "from qnas.latency.device_table import load_table, compute_table; "
        "from qnas.spaces.space import load_space; s = load_space('quadranet-mobile'); "
        "compute_table(load_device('vpu'), s); load_table(load_device('vpu'), s); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SQUARE = {"knots": {"rows": [1.0, 2.0], "channels": [1.0, 2.0]}, "ms": [[1.0, 2.0], [2.0, 3.0]]}
TERMS = {"kind": "fitted", "terms": {"launch": 1.0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fixed_ms": math.inf}, "fixed_ms: "),
        ({"fixed_ms": 1e308}, "fixed_ms: expected at most 1e+09"),
        ({"fixed_ms": 10**39}, "fixed_ms: "),
        ({"name": 101 * "a"}, "name: expected at most 100 characters"),
        ({"date": "\u0662\u0660\u0662\u0664-01-01"}, "date: expected the form"),
        ({"fusion": "x" * 5000}, "unknown fusion 'xxx"),
        ({"model": {"add": {"kind": "fitted", "terms": {"launch": 1e300}}}}, "model.add.terms.launch: "),
        (
            {"model": {"add": {"kind": "fitted", "terms": {"x" * 5000: 1.0}}}},
            "model.add: unknown feature 'xxx",
        ),
        ({"model": {"add": {"kind": "fitted", "like": "x" * 5000}}}, "model.add: no kind 'xxx"),
        ({"model": {f"k{i}": TERMS for i in range(1001)}}, "model: expected at most 1000, got "),
        ({"model": {"x" * 5000: 3}}, "model.xxx"),
        (
            {"model": {"add": {"kind": "fitted", "grid": {**SQUARE, "ms": [[1e-300, 2.0], [2.0, 3.0]]}}}},
            "model.add.",
        ),
        (
            {"model": {"add": {"kind": "fitted", "grid": {**SQUARE, "beyond": {"x" * 5000: 1.0}}}}},
            "model.add.grid: ",
        ),
        (
            {
                "model": {
                    "add": {"kind": "fitted", "grid": {**SQUARE, "knots": {"y" * 5000: [1.0], "z": [2.0]}}}
                }
            },
            "model.add.grid: unknown axis 'yyy",
        ),
        ({"accuracy": {"all": {"all": {"n": 1, "rmspe_pct": math.nan}}}}, "accuracy.all.all"),
        ({"x" * 5000: 1}, "xxx"),
        ({"source": "\ud800"}, "not JSON: text with half of a surrogate pair"),
        ({"\ud800": 1}, "not JSON: text with half of a surrogate pair"),
    ],
)
def test_what_a_device_file_may_not_hold_is_one_short_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**OWN, **changes}))
    with pytest.raises(TableError) as error:
        load_device(path)
    assert str(error.value).startswith(f"{path}: {message}")
    check_refusal(error.value, path)


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"a":' * 5000, '{"batch": ' + "9" * 5000 + "}", "\ufffe", "{}x"]
)
def test_a_text_that_is_no_device_is_one_short_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(TableError) as error:
        load_device(path)
    check_refusal(error.value, path)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "b" * 5000, "x\n\x1b[2J", "\0", "a/\0.json"])
def test_a_name_that_no_device_has_is_one_line(name: str) -> None:
    with pytest.raises(TableError) as error:
        load_device(name)
    check_refusal(error.value)


def test_a_device_file_is_read_up_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(OWN))
    assert load_device(path).name == "mine"
    monkeypatch.setattr(device_module, "FILE_BYTES", 10)
    with pytest.raises(TableError, match="larger than 10 bytes"):
        load_device(path)


def test_the_largest_latencies_of_a_file_add_up_to_a_number(tmp_path: Path) -> None:
    terms = dict.fromkeys(FEATURES, 1e9)
    content = {**OWN, "fixed_ms": 1e9, "model": {"conv": {"kind": "fitted", "terms": terms}}}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    assert math.isfinite(load_device(path).kernel_ms(Kernel("conv", 65536, 65536, 65536, 31)))
