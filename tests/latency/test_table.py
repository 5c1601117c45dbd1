import csv
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mutants import check_refusal

from qnas.common.errors import TableError
from qnas.common.resources import shipped, stems
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import compute_table, load_table, predict_blocks
from qnas.latency.table import COLUMNS, Cell, LatencyTable, read_table, table_text, write_table
from qnas.spaces.arch import sample_arch
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space, parse_space

DEVICES = list(device_names())
SPACES = [name for name in stems("search_spaces", ".yaml") if not load_space(name).is_fixed]
EVERY = list(itertools.product(DEVICES, SPACES))


@pytest.fixture
def small() -> SearchSpace:
    return load_space("quadranet-small")


@pytest.fixture
def rows(small: SearchSpace) -> list[list[str]]:
    text = table_text(compute_table(load_device("vpu"), small), small)
    return list(csv.reader(io.StringIO(text)))


def write_rows(path: Path, rows: list[list[str]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue())
    return path


@pytest.mark.parametrize(("device", "name"), EVERY)
def test_every_operator_costs_time_and_identity_none(device: str, name: str) -> None:
    space = load_space(name)
    table = load_table(load_device(device), space)
    for position, cells in zip(space.positions, table.cells, strict=True):
        for candidate, cell in zip(position.candidates, cells, strict=True):
            assert (cell.latency_ms > 0) == (candidate.block != "identity")
            assert 0 <= cell.estimated_ms <= cell.latency_ms
            assert cell.source
    assert table.fixed_ms > 0


@pytest.mark.parametrize(("device", "name"), EVERY)
def test_the_shipped_table_is_what_the_model_says(device: str, name: str) -> None:
    space = load_space(name)
    file = shipped("latency_tables").joinpath(device).joinpath(f"{name}.csv")
    assert file.read_text(encoding="utf-8") == table_text(compute_table(load_device(device), space), space)
    assert load_table(load_device(device), space) == compute_table(load_device(device), space)


@pytest.mark.parametrize(("device", "name"), EVERY)
def test_larger_kernels_and_expansions_are_never_faster(device: str, name: str) -> None:
    space = load_space(name)
    table = compute_table(load_device(device), space)
    for position, row in zip(space.positions, table.ms, strict=True):
        for (a, a_ms), (b, b_ms) in itertools.permutations(zip(position.candidates, row, strict=True), 2):
            if a.is_within(b):
                assert a_ms <= b_ms, (position.name, a.name, b.name)


@pytest.mark.parametrize(("device", "name"), EVERY)
def test_a_network_takes_the_sum_of_its_kernels(device: str, name: str) -> None:
    space, rng = load_space(name), np.random.default_rng(0)
    model = load_device(device)
    table = load_table(model, space)
    for _ in range(5):
        arch = sample_arch(space, rng)
        found = predict_blocks(model, lower(space, arch))
        total = math.fsum([model.fixed_ms, *(row.latency_ms for row in found)])
        estimated = math.fsum(row.latency_ms for row in found if row.kind == "estimated")
        indices = arch.indices(space)
        # a cell is rounded to a nanosecond
        assert table.latency_ms(indices) == pytest.approx(total, abs=1e-6 * (len(indices) + 10))
        rounding = 1e-6 * (len(indices) + 10) / total
        assert table.coverage(indices) == pytest.approx(1 - estimated / total, abs=1e-4 + rounding)
        assert table.fastest_ms <= table.latency_ms(indices) <= table.slowest_ms


@pytest.mark.parametrize("device", DEVICES)
def test_a_candidate_with_its_own_norm_and_activation_takes_as_long_as_in_such_a_space(
    device: str,
) -> None:
    content = load_space("quadranet-small").written() | {"name": "mine"}
    sizes: dict[str, Any] = {"block": "quadra", "kernel": [3, 7], "expansion": 2}
    model = load_device(device)

    def cells(around: tuple[str, str], own: dict[str, str] | None = None) -> tuple[tuple[Cell, ...], ...]:
        around_it = {"norm": around[0], "activation": around[1], "candidates": [sizes | (own or {})]}
        return compute_table(model, parse_space(json.dumps(content | around_it), "mine.yaml")).cells

    for norm, activation in itertools.product(("layernorm", "batchnorm"), ("gelu", "relu6")):
        other = "batchnorm" if norm == "layernorm" else "layernorm"
        own = {"norm": norm, "act": activation}
        assert cells((other, "hswish"), own) == cells((norm, activation))
    # a scale folds like a batch norm, whatever is around
    for around in ("layernorm", "batchnorm"):
        assert cells((around, "relu6"), {"norm": "scale"}) == cells(("batchnorm", "relu6"))


@pytest.mark.parametrize("device", DEVICES)
def test_fixed_spaces_have_a_table_too(device: str) -> None:
    space = load_space("quadranet36-t")
    table = load_table(load_device(device), space)
    assert table.fastest_ms == table.slowest_ms > 0


def test_fastest_and_slowest_are_those_of_all_networks() -> None:
    cells = ((Cell(1.0), Cell(3.0, 1.0)), (Cell(0.0), Cell(0.5, 0.5), Cell(2.0)))
    table = LatencyTable("d", "s", "0", (("runtime", Cell(0.25)), ("stem", Cell(0.5, 0.25))), cells)
    every = [table.latency_ms(a) for a in itertools.product(range(2), range(3))]
    assert every == [1.75, 2.25, 3.75, 3.75, 4.25, 5.75]
    assert (table.fastest_ms, table.slowest_ms) == (min(every), max(every))
    assert table.coverage((1, 1)) == 1 - (0.25 + 1.0 + 0.5) / 4.25
    assert table.fixed_estimated_ms == 0.25
    assert table.estimated_ms == ((0.0, 1.0), (0.0, 0.5, 0.0))


def test_a_budget_of_30_ms_cuts_through_the_mobile_space_on_the_vpu() -> None:
    space = load_space("quadranet-mobile")
    table = load_table(load_device("vpu"), space)
    assert 2 * table.fastest_ms < 30 < table.slowest_ms / 1.5


def test_another_resolution_is_predicted_and_lower_is_faster() -> None:
    space = load_space("quadranet-mobile")
    arch = sample_arch(space, np.random.default_rng(1))
    for device in map(load_device, DEVICES):
        times = [
            sum(row.latency_ms for row in predict_blocks(device, lower(space, arch, resolution_px=px)))
            for px in (96, 160, 224)
        ]
        assert times == sorted(times)


def test_a_written_table_reads_back_equal(tmp_path: Path, small: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), small)
    write_table(table, small, tmp_path / "myriad-vpu" / "quadranet-small.csv")
    found = read_table(tmp_path / "myriad-vpu" / "quadranet-small.csv", small)
    assert found == table
    assert found.digest == table.digest


def test_the_digest_tells_values_apart(small: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), small)
    other = LatencyTable(table.device, table.space, table.space_digest, table.fixed, table.cells[::-1])
    assert other.digest != table.digest


def test_missing_rows_are_named_and_abbreviated(
    tmp_path: Path, small: SearchSpace, rows: list[list[str]]
) -> None:
    path = write_rows(tmp_path / "t.csv", rows[:-9])
    with pytest.raises(TableError) as error:
        read_table(path, small)
    message = str(error.value)
    assert message.startswith(
        f"{path}: not a latency table of space quadranet-small: 9 of {len(rows) - 1} rows"
    )
    assert "and 4 more" in message
    assert "\n" not in message
    path = write_rows(tmp_path / "t.csv", [r for r in rows if r[0] != "stem"])
    with pytest.raises(TableError, match=r"1 of \d+ rows missing: stem$"):
        read_table(path, small)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latency_ms", "fast", "latency_ms 'fast', expected milliseconds"),
        ("latency_ms", "", "latency_ms 'empty', expected milliseconds"),
        ("latency_ms", "-1", "latency_ms '-1', expected milliseconds"),
        ("latency_ms", "nan", "latency_ms 'nan', expected milliseconds"),
        ("latency_ms", "inf", "latency_ms 'inf', expected milliseconds"),
        ("estimated_ms", "x", "estimated_ms 'x', expected milliseconds"),
        ("estimated_ms", "1e6", "estimated_ms 1e\\+06 is above latency_ms"),
        ("c_in", "33", "c_in 33, expected 32"),
        ("resolution_px", "", "resolution_px empty, expected 16"),
        ("layers", "conv", "layers conv, expected layernorm dwconv-k3"),
        ("candidate", "quadra_k9_e2", "'1.1 quadra_k9_e2' is not in space quadranet-small"),
    ],
)
def test_a_damaged_row_is_refused_with_its_line(
    tmp_path: Path, small: SearchSpace, rows: list[list[str]], column: str, value: str, message: str
) -> None:
    line = next(i for i, row in enumerate(rows) if row[0] == "1.1")
    rows[line][COLUMNS.index(column)] = value
    with pytest.raises(TableError, match=rf"line {line + 1}: .*{message}"):
        read_table(write_rows(tmp_path / "t.csv", rows), small)


def test_a_row_twice_is_refused(tmp_path: Path, small: SearchSpace, rows: list[list[str]]) -> None:
    with pytest.raises(TableError, match=r"head is there twice"):
        read_table(write_rows(tmp_path / "t.csv", [*rows, rows[-1]]), small)


def test_a_file_without_the_columns_is_refused(tmp_path: Path, small: SearchSpace) -> None:
    path = tmp_path / "t.csv"
    path.write_text("position,candidate\n1.1,identity\n")
    with pytest.raises(TableError, match=r"columns missing: stage, c_in.*latency_ms"):
        read_table(path, small)
    path.write_text("")
    with pytest.raises(TableError, match=r"columns missing"):
        read_table(path, small)
    with pytest.raises(TableError, match=r"nowhere\.csv: no such file"):
        read_table(tmp_path / "nowhere.csv", small)


def test_the_table_of_another_space_is_refused(tmp_path: Path, rows: list[list[str]]) -> None:
    with pytest.raises(
        TableError, match=r"not a latency table of space quadranet-mobile: \d+ of \d+ rows missing"
    ):
        read_table(write_rows(tmp_path / "t.csv", rows), load_space("quadranet-mobile"))


def another_small(channels: int = 48) -> SearchSpace:
    text = stems("search_spaces", ".yaml")["quadranet-small"].read_text(encoding="utf-8")
    return parse_space(text.replace("channels: 64", f"channels: {channels}"), "mine")


def test_stages_of_equal_width_differ_by_their_resolution() -> None:
    table = compute_table(load_device("vpu"), another_small(channels=32))  # as wide as the stage before
    assert table.ms[0][0] > table.ms[3][0]


def test_a_shipped_table_is_not_used_for_another_space_of_its_name() -> None:
    mine, device = another_small(), load_device("cpu")
    table = load_table(device, mine)
    assert table == compute_table(device, mine)
    assert table.ms != load_table(device, load_space("quadranet-small")).ms


def test_ones_own_table_must_fit_the_space(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(load_device("cpu").to_json())
    table = compute_table(load_device("cpu"), load_space("quadranet-small"))
    write_table(table, load_space("quadranet-small"), tmp_path / "mine" / "quadranet-small.csv")
    with pytest.raises(TableError, match=r"c_in 64, expected 48"):
        load_table(load_device(tmp_path / "mine.json"), another_small())


def test_a_table_that_is_no_table_is_one_short_line(
    tmp_path: Path, rows: list[list[str]], small: SearchSpace
) -> None:
    first, rest = rows[0], rows[1:]
    at = first.index("latency_ms")
    long = [[*row[:at], "9" * 5000, *row[at + 1 :]] for row in rest]
    huge = [[*row[:at], "1e300", *row[at + 1 :]] for row in rest]
    strange = [["x" * 5000, *row[1:]] for row in rest] + [["\x1b[2J\u2028", *row[1:]] for row in rest]
    many = [["9.9", *row[1:]] for row in rest] * 10
    contents: tuple[list[Any], ...] = (
        *([first, *long], [first, *huge], [first, *strange], [first, *many]),
        *([], [[]], [["x" * 5000]], [first], [first, rest[0] + ["", ""]], [[*first, "layers"], *rest]),
    )
    for content in contents:
        path = write_rows(tmp_path / "t.csv", content)
        with pytest.raises(TableError) as error:
            read_table(path, small)
        check_refusal(error.value, path)


def test_more_rows_than_a_space_has_are_not_collected(
    tmp_path: Path, rows: list[list[str]], small: SearchSpace
) -> None:
    path = write_rows(tmp_path / "t.csv", [rows[0], *rows[1:] * 3])
    with pytest.raises(
        TableError, match=r"more than \d+ rows, expected \d+; line \d+: runtime is there twice"
    ):
        read_table(path, small)


def test_names_of_columns_may_have_capitals_and_spaces(
    tmp_path: Path, rows: list[list[str]], small: SearchSpace
) -> None:
    plain = read_table(write_rows(tmp_path / "t.csv", rows), small)
    other = [[f" {name.upper()} " for name in rows[0]], *rows[1:]]
    assert read_table(write_rows(tmp_path / "t.csv", other), small) == plain
