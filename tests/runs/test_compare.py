import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.finished_runs import make_record, make_training

from qnas.common.errors import ArchError, UsageError
from qnas.common.intervals import wilson
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import compute_table
from qnas.runs.compare import compare
from qnas.runs.finished_run import read_finished_run
from qnas.runs.run_text import describe_comparison
from qnas.spaces.space import SearchSpace, load_space


@pytest.fixture
def folders(tiny_space: SearchSpace, tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in "xyz"]
    for seed, folder in enumerate(found):
        make_record(folder, tiny_space, seed=seed, share=0.3 + 0.2 * seed)
    return found


def test_positions_that_differ_are_marked(folders: list[Path], tiny_space: SearchSpace) -> None:
    comparison = compare(folders)
    choices = [json.loads((folder / "arch.json").read_text())["choices"] for folder in folders]
    assert [list(run.choices) for run in comparison.runs] == choices
    assert comparison.positions == tuple(p.name for p in tiny_space.positions)
    assert comparison.differ == tuple(len(set(column)) > 1 for column in zip(*choices, strict=True))
    assert any(comparison.differ)
    shown = describe_comparison(comparison, lambda line: f"<{line}>")
    for name, differs in zip(comparison.positions, comparison.differ, strict=True):
        (line,) = (line for line in shown.splitlines() if f" {name} " in line)
        assert line.startswith("<*") == differs


def test_latencies_are_those_of_every_known_device(folders: list[Path], tiny_space: SearchSpace) -> None:
    for run in compare(folders).runs:
        indices = tuple(p.names.index(c) for p, c in zip(tiny_space.positions, run.choices, strict=True))
        assert list(run.latencies_ms) == list(device_names())
        for name, latency_ms in run.latencies_ms.items():
            assert latency_ms == compute_table(load_device(name), tiny_space).latency_ms(indices)


def test_latencies_have_their_intervals(folders: list[Path], tiny_space: SearchSpace) -> None:
    comparison = compare(folders)
    table = compute_table(load_device("vpu"), tiny_space)
    table = replace(table, uncertainty=load_device("vpu").known_uncertainty)
    for run in comparison.runs:
        indices = tuple(p.names.index(c) for p, c in zip(tiny_space.positions, run.choices, strict=True))
        assert run.intervals["myriad-vpu"] == table.interval(indices) is not None
    rows = describe_comparison(comparison).splitlines()
    (at,) = (i for i, row in enumerate(rows) if row.startswith("myriad-vpu"))
    ends = [interval.ends for run in comparison.runs if (interval := run.intervals["myriad-vpu"])]
    assert rows[at + 1].split() == ["90%", "interval", *ends]


def test_of_a_device_unknown_here_the_interval_is_that_of_the_run(
    folders: list[Path], tiny_space: SearchSpace
) -> None:
    board = load_device("vpu").model_copy(update={"name": "my-board"})
    run = make_record(folders[0], tiny_space, devices=(board,), confidence=0.8)
    (entry,) = run.document["limits"]
    first, second = compare(folders[:2]).runs
    assert first.latencies_ms["my-board"] == entry["latency_ms"] < entry["amount"]
    found = first.intervals["my-board"]
    assert found is not None
    assert (found.high_ms, found.level) == (entry["interval"]["high_ms"], 0.8)
    assert second.intervals["my-board"] is None


def test_a_device_that_one_run_knows_is_shown_for_it(folders: list[Path], tiny_space: SearchSpace) -> None:
    board = load_device("vpu").model_copy(update={"name": "my-board"})
    run = make_record(folders[0], tiny_space, devices=(board,))
    comparison = compare(folders[:2])
    latency_ms = run.document["latency_ms"]
    assert [run.latencies_ms["my-board"] for run in comparison.runs] == [latency_ms, None]
    (line,) = (row for row in describe_comparison(comparison).splitlines() if row.startswith("my-board"))
    assert line.split() == ["my-board", f"{latency_ms:.4g}", "ms", "-"]


def test_accuracies_have_the_intervals_of_their_images(folders: list[Path]) -> None:
    path = folders[0] / "search.json"
    document = json.loads(path.read_text())
    document["images"] = {"test": 359}
    path.write_text(json.dumps(document))
    make_training(read_finished_run(folders[1]), right=180, images=200)
    first, second, _ = compare(folders).runs
    assert first.supernet is not None
    assert (first.supernet.low, first.supernet.high) == wilson(first.supernet.accuracy, 359)
    assert first.trained is None
    assert second.supernet is not None
    assert second.supernet.low is None
    assert second.trained is not None
    assert (second.trained.accuracy, second.trained.low, second.trained.high) == (0.9, *wilson(0.9, 200))
    shown = describe_comparison(compare(folders))
    low, high = wilson(0.9, 200)
    assert f"90.0% ({100 * low:.1f}-{100 * high:.1f})" in shown


def test_one_network_with_its_identities_elsewhere_is_the_same(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    block, none = "quadra_k3_e2", "identity"
    for name, choices in (("a", [block, none]), ("b", [none, block]), ("c", [none, none])):
        make_record(tmp_path / name, tiny_space, choices=(*choices, none, none))
    comparison = compare([tmp_path / name for name in "abc"])
    assert comparison.same_network == (("A", "B"),)
    assert comparison.differ == (True, True, False, False)


def test_other_spaces_are_compared_but_for_their_choices(folders: list[Path], tmp_path: Path) -> None:
    small = load_space("quadranet-small")
    make_record(tmp_path / "small", small)
    comparison = compare([folders[0], tmp_path / "small"])
    assert (comparison.positions, comparison.differ, comparison.same_network) == ((), (), ())
    assert "of different spaces" in describe_comparison(comparison)
    assert [run.space for run in comparison.runs] == ["tiny", "quadranet-small"]


def test_what_cannot_be_compared_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 runs: expected 2 to 26"):
        compare(folders[:1])
    with pytest.raises(ArchError, match=r"no arch\.json in this folder"):
        compare([folders[0], tmp_path])


def test_many_runs_stay_within_80_columns(tiny_space: SearchSpace, tmp_path: Path) -> None:
    space = load_space("union-mobile")
    folders = [tmp_path / f"{seed}" for seed in range(9)]
    for seed, folder in enumerate(folders):
        make_record(folder, space, seed=seed, share=0.3)
    comparison = compare(folders)
    short = replace(comparison, runs=tuple(replace(run, run="runs/x") for run in comparison.runs))
    lines = describe_comparison(short, lambda line: f"<{line}>").splitlines()
    assert max(len(line.strip("<>")) for line in lines) <= 80
    tables = sum(line.split()[:1] == ["position"] for line in lines)
    assert tables > 1
    assert sum(line.startswith("<*") for line in lines) == tables * sum(comparison.differ)
