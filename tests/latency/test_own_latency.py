"""The tables of devices made in Python are those of their functions or measurements."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mutants import check_refusal

from qnas.common.errors import TableError, UsageError
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import load_table
from qnas.latency.kernels import Kernel
from qnas.latency.own_latency import device_from_blocks, device_from_function
from qnas.latency.prediction import predict_arch
from qnas.latency.table import read_table, table_text
from qnas.solver.limits import latency_limit
from qnas.solver.solve import solve_best
from qnas.spaces.arch import Arch, sample_arch
from qnas.spaces.lower import BlockSpec, count_macs, lower
from qnas.spaces.space import SearchSpace, load_space


def rows_of(space: SearchSpace) -> list[dict[str, Any]]:
    return list(csv.DictReader(table_text(load_table(load_device("vpu"), space), space).splitlines()))


class Frame:
    """The part of a pandas DataFrame that is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return self.rows


def test_a_function_of_layers_that_repeats_a_device_gives_its_latencies() -> None:
    vpu, space = load_device("vpu"), load_space("quadranet-small")
    mine = device_from_function("mine", layer=vpu.kernel_ms, fixed_ms=vpu.network_ms)
    table, expected = load_table(mine, space), load_table(vpu, space)
    assert table.ms == expected.ms
    assert table.fixed_ms == pytest.approx(expected.fixed_ms)
    arch = Arch(tuple(p.names[0] for p in space.positions))
    prediction = predict_arch("device", mine, space, arch)
    assert prediction.latency_ms == table.latency_ms(arch.indices(space))
    assert prediction.coverage < 0.5  # all but the runtime is estimated
    assert prediction.batchnorm_ms is not None


def test_a_function_of_blocks_gives_each_cell(tiny_space: SearchSpace) -> None:
    def block_ms(block: BlockSpec) -> float:
        return count_macs([block]) / 1e6

    mine = device_from_function("mine", block=block_ms, fixed_ms=0.5, kind="measured")
    table = load_table(mine, tiny_space)
    arch = Arch(tuple(p.names[0] for p in tiny_space.positions))
    macs = count_macs(lower(tiny_space, arch))
    assert table.latency_ms(arch.indices(tiny_space)) == pytest.approx(0.5 + macs / 1e6, abs=1e-5)
    assert table.coverage(arch.indices(tiny_space)) == 1.0
    with pytest.raises(TableError, match="no model"):
        mine.kernel_ms(Kernel("conv", 8, 8, 8))


def additive_ms(space: SearchSpace) -> Any:
    table = load_table(load_device("cpu"), space)
    return lambda arch: table.latency_ms(arch.indices(space))


@pytest.mark.parametrize("name", ["quadranet-small", "tiny"])
def test_a_function_of_networks_that_is_a_sum_over_blocks_is_found_exactly(
    name: str, tiny_space: SearchSpace
) -> None:
    space = tiny_space if name == "tiny" else load_space(name)
    network_ms = additive_ms(space)
    mine = device_from_function("mine", network=network_ms, space=space)
    table = load_table(mine, space)
    (figures,) = (groups["all"] for groups in mine.accuracy.values())
    assert figures.rmspe_pct == 0
    rng = np.random.default_rng(1)
    for arch in (sample_arch(space, rng) for _ in range(20)):
        assert table.latency_ms(arch.indices(space)) == pytest.approx(network_ms(arch), abs=1e-4)


def test_the_error_of_the_sum_is_that_of_networks_left_out() -> None:
    space = load_space("quadranet-small")
    network_ms = additive_ms(space)
    mine = device_from_function("mine", network=lambda arch: network_ms(arch) ** 1.2, space=space)
    error_pct = mine.accuracy["cross-validated"]["all"].rmspe_pct
    assert 0 < error_pct < 20
    with pytest.raises(TableError, match="its latencies are of space quadranet-small, digest"):
        load_table(mine, load_space("quadranet-mobile"))


def test_latencies_that_no_sum_follows_are_refused() -> None:
    space = load_space("quadranet-small")
    with pytest.raises(TableError, match=r"do not follow a sum over blocks: the best sum is .*% off"):
        device_from_function("mine", network=lambda arch: 1 + hash(arch.choices) % 7, space=space)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None, "fast"])
def test_what_is_no_latency_is_refused(bad: Any, tiny_space: SearchSpace) -> None:
    for mine in (
        device_from_function("mine", layer=lambda _: bad),
        device_from_function("mine", block=lambda _: bad),
    ):
        with pytest.raises(TableError, match=r"device mine: its function returned .* expected milliseconds"):
            load_table(mine, tiny_space)
    with pytest.raises(TableError, match="device mine: its function returned"):
        device_from_function("mine", network=lambda _: bad, space=tiny_space)


def test_exactly_one_function_is_given_and_a_space_with_one_of_networks(tiny_space: SearchSpace) -> None:
    with pytest.raises(UsageError, match="expected one of layer, block and network, got none"):
        device_from_function("mine")
    with pytest.raises(UsageError, match=r"got \['layer', 'block'\]"):
        device_from_function("mine", layer=lambda _: 1.0, block=lambda _: 1.0)
    with pytest.raises(UsageError, match="give a space with a function of networks"):
        device_from_function("mine", network=lambda _: 1.0)
    with pytest.raises(UsageError, match="give a space with a function of networks"):
        device_from_function("mine", layer=lambda _: 1.0, space=tiny_space)
    with pytest.raises(UsageError, match="device name vpu: a device that ships has this name"):
        device_from_function("vpu", layer=lambda _: 1.0)


def test_measured_blocks_are_read_from_a_file_a_frame_and_rows(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    expected = load_table(load_device("vpu"), tiny_space)
    path = tmp_path / "blocks.csv"
    path.write_text(table_text(expected, tiny_space))
    rows = rows_of(tiny_space)
    for row in rows:  # as pandas reads the file
        row["candidate"] = row["candidate"] or math.nan
        row["c_in"] = float(row["c_in"] or "nan")
        row["latency_ms"] = float(row["latency_ms"])
    for blocks in (path, str(path), Frame(rows), rows):
        table = load_table(device_from_blocks("mine", blocks, tiny_space), tiny_space)
        assert (table.ms, table.fixed_ms) == (expected.ms, expected.fixed_ms)
        assert table.device == "mine"


def test_three_columns_do_and_identity_and_the_runtime_need_no_row(tiny_space: SearchSpace) -> None:
    expected = load_table(load_device("vpu"), tiny_space)
    rows = [
        {key: row[key] for key in ("position", "candidate", "latency_ms")}
        for row in rows_of(tiny_space)
        if row["candidate"] != "identity" and row["position"] != "runtime"
    ]
    table = load_table(device_from_blocks("mine", rows, tiny_space, fixed_ms=0.25), tiny_space)
    assert table.ms == expected.ms
    assert dict(table.fixed)["runtime"].latency_ms == 0.25
    assert table.coverage((0, 0, 0, 0)) == 1.0
    with pytest.raises(TableError, match=r"device mine: .* 1 of \d+ rows missing: stem"):
        device_from_blocks("mine", rows[1:], tiny_space)
    with pytest.raises(TableError, match=r"row 2: .* is there twice"):
        device_from_blocks("mine", [rows[0], *rows], tiny_space)
    with pytest.raises(TableError, match="device mine: columns missing: latency_ms"):
        device_from_blocks("mine", [{"position": "stem", "candidate": ""}], tiny_space)


def test_such_a_device_limits_a_solve_and_its_table_reads_back(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    mine: Device = device_from_function("mine", layer=lambda kernel: 0.01 * kernel.c_out)
    table = load_table(mine, tiny_space)
    assert table.origin == mine
    scores = tuple(tuple(-float(i) for i in range(len(p.candidates))) for p in tiny_space.positions)
    limit = latency_limit(table, (table.fastest_ms + table.slowest_ms) / 2)
    assert solve_best(tiny_space, scores, (limit,))[0].latency_ms <= limit.limit
    path = tmp_path / "table-mine.csv"
    path.write_text(table_text(table, tiny_space))
    assert read_table(path, tiny_space, device="mine").digest == table.digest


HUGE = 10**5000  # Python does not write it


def failing(_: Any) -> float:
    raise KeyError("the board\nis off" + 5000 * "x")


def test_a_function_that_raises_is_one_line(tiny_space: SearchSpace) -> None:
    for mine in (device_from_function("mine", layer=failing), device_from_function("mine", block=failing)):
        with pytest.raises(
            TableError, match=r"device mine: its function raised KeyError for .*the board"
        ) as error:
            load_table(mine, tiny_space)
        check_refusal(error.value)
    with pytest.raises(TableError, match="device mine: its function raised KeyError for quadra") as error:
        device_from_function("mine", network=failing, space=tiny_space)
    check_refusal(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "foo"}, "`kind='foo'`: expected one of measured, fitted, estimated"),
        ({"kind": ["measured"]}, "`kind=['measured']`: expected one of"),
        ({"name": 3}, "`name=3`: expected text"),
        ({"name": None}, "`name=None`: expected text"),
        ({"name": 5000 * "x"}, "device name 'xxx"),
        ({"name": "\n\x1b[2J"}, r"device name '\n\x1b[2J': expected letters"),
        ({"fixed_ms": "1"}, "`fixed_ms='1'`: expected milliseconds"),
        ({"fixed_ms": -1}, "`fixed_ms=-1`: expected milliseconds"),
        ({"fixed_ms": math.nan}, "`fixed_ms=nan`: expected milliseconds"),
        ({"fixed_ms": [HUGE]}, "`fixed_ms=<list whose repr raises ValueError>`: expected"),
    ],
)
def test_arguments_of_another_form_are_named(
    arguments: dict[str, Any], message: str, tiny_space: SearchSpace
) -> None:
    given = {"name": "mine", **arguments}
    makers: tuple[Callable[[], Device], ...] = (
        lambda: device_from_function(layer=lambda _: 1.0, **given),
        lambda: device_from_blocks(blocks=rows_of(tiny_space), space=tiny_space, **given),
    )
    for make in makers:
        with pytest.raises(UsageError) as error:
            make()
        assert str(error.value).startswith(message)
        check_refusal(error.value)


def test_functions_spaces_and_blocks_of_another_type_are_named(tiny_space: SearchSpace) -> None:
    anything: Any = 3
    cases: tuple[tuple[Callable[[], Device], str], ...] = (
        (lambda: device_from_function("mine", layer=anything), "`layer=3`: expected a function"),
        (lambda: device_from_function("mine", block=anything), "`block=3`: expected a function"),
        (lambda: device_from_function("mine", network=anything, space=tiny_space), "`network=3`: expected a"),
        (lambda: device_from_function("mine", network=failing, space=anything), "`space=3`: expected a Sea"),
        (lambda: device_from_blocks("mine", [], anything), "`space=3`: expected a SearchSpace"),
        (lambda: device_from_blocks("mine", anything, tiny_space), "`blocks=3`: expected a CSV file, a Data"),
        (
            lambda: device_from_blocks("mine", [1, 2], tiny_space),
            "`blocks`: row 1 is 1, expected a dictionary",
        ),
        (lambda: device_from_blocks("mine", {"a": 1}, tiny_space), "`blocks={'a': 1}`: expected a CSV"),
    )
    for make, message in cases:
        with pytest.raises(UsageError) as error:
            make()
        assert str(error.value).startswith(message)


def test_a_latency_of_blocks_that_is_none_is_one_line(tiny_space: SearchSpace) -> None:
    for value in (HUGE, [1], "1e300", b"1", object(), np.array([1.0, 2.0])):
        rows = rows_of(tiny_space)
        rows[3]["latency_ms"] = value
        with pytest.raises(TableError, match=r"device mine: .*row 4: .*latency_ms") as error:
            device_from_blocks("mine", rows, tiny_space)
        check_refusal(error.value)
