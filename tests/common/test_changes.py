import pytest

from qnas.common.changes import describe_changes
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import table_text
from qnas.spaces.space import SearchSpace, parse_space

BEFORE = {
    "search": {"batch_size": 64, "seed": 0, "resolution_px": 32},
    "budget": "30ms",
    "budget_ms": 30.0,
    "data": "digits",
    "data_digest": "a" * 16,
    "space_digest": "b" * 16,
    "table_digest": "c" * 16,
    "versions": {"torch": "2.6"},
}


def test_what_is_equal_or_a_version_is_no_change() -> None:
    assert describe_changes(BEFORE, {**BEFORE, "versions": {"torch": "2.7"}}) == []


def test_every_changed_option_is_named_with_both_values() -> None:
    now = {**BEFORE, "search": {"batch_size": 128, "seed": 1, "resolution_px": 16, "threads": 2}}
    assert describe_changes(BEFORE, now) == [
        "batch size was 64, is 128",
        "seed was 0, is 1",
        "resolution in pixels was 32, is 16",
        "threads was None, is 2",
    ]
    assert describe_changes(BEFORE, {**BEFORE, "budget": "0.02s", "budget_ms": 20.0}) == [
        "budget was '30ms', is '0.02s'"
    ]


def test_a_changed_item_of_a_list_is_named_by_its_place() -> None:
    before = {"layers": [{"size": 1}, {"size": 2}]}
    assert describe_changes(before, {"layers": [{"size": 1}, {"size": 3}]}) == [
        "size of layers 2 was 2, is 3"
    ]
    assert describe_changes(before, {"layers": []}) == ["layers: there were 2, there are 0"]
    assert describe_changes({"choices": list("abcdef")}, {"choices": list("abcxef")}) == [
        "choices: 1 of 6 changed"
    ]


def test_a_changed_limit_is_named_once_by_its_device() -> None:
    def request(budget: str, digest: str) -> dict[str, object]:
        cpu = {"name": "cortex-a76", "budget": "1ms", "limit": 1.0, "table_digest": "a"}
        vpu = {"name": "myriad-vpu", "budget": budget, "limit": 2.0 * len(budget), "table_digest": digest}
        return {**BEFORE, "budget": budget, "limits": [vpu, cpu], "table_digest": digest}

    assert describe_changes(request("2ms", "b"), request("2.5ms", "b")) == [
        "budget of myriad-vpu was '2ms', is '2.5ms'"
    ]
    # what follows from the budget is said where the budget is the same
    assert describe_changes({"budget_ms": 1.0}, {"budget_ms": 2.0}) == ["budget ms was 1.0, is 2.0"]
    assert describe_changes(request("2ms", "b"), request("2ms", "c")) == [
        "the latency table changed (digest b -> c)"
    ]


def test_changed_data_are_named() -> None:
    assert describe_changes(BEFORE, {**BEFORE, "data_digest": "d" * 16}) == [
        "the data changed (digest aaaaaaaa -> dddddddd)"
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("channels: 16", "channels: 24", "channels 16 -> 24 in stage 2"),
        ("channels: 8, kernel: 2", "channels: 4, kernel: 2", "stem.channels 8 -> 4"),
        ("kernel: [3, 5]", "kernel: [3, 7]", "candidates.kernel 5 -> 7"),
        ("kernel: [3, 5]", "kernel: [3, 5, 7]", "5 -> 7 candidates"),
        ("classes: 10", "classes: 12", "head.classes 10 -> 12"),
        ("name: tiny", "name: other", "it was tiny, is other"),
    ],
)
def test_a_changed_space_says_what_changed(old: str, new: str, words: str, tiny_space: SearchSpace) -> None:
    from helpers.tiny import TINY_SPACE

    other = parse_space(TINY_SPACE.replace(old, new, 1), "other.yaml")
    (said,) = describe_changes(
        BEFORE,
        # a table is of one space: it is not named beside it
        {**BEFORE, "space_digest": other.digest, "table_digest": "e" * 16},
        {"space.yaml": tiny_space.to_yaml()},
        {"space.yaml": other.to_yaml()},
    )
    assert said.startswith(f"the space changed (digest bbbbbbbb -> {other.digest[:8]}): {words}")
    (bare,) = describe_changes(BEFORE, {**BEFORE, "space_digest": other.digest}, {"space.yaml": "a: ["}, {})
    assert bare == f"the space changed (digest bbbbbbbb -> {other.digest[:8]})"


def test_a_changed_table_says_whose_and_where(tiny_space: SearchSpace) -> None:
    text = table_text(compute_table(load_device("vpu"), tiny_space), tiny_space)
    row = next(line for line in text.splitlines() if "quadra_k5_e4" in line)
    cells = row.split(",")
    latency = text.splitlines()[0].split(",").index("latency_ms")
    before, cells[latency] = cells[latency], "9.000000"
    names = {"table-myriad-vpu.csv": text, "table-a100.csv": "same"}
    now = {**names, "table-myriad-vpu.csv": text.replace(row, ",".join(cells))}
    changed = {**BEFORE, "table_digest": "e" * 16}
    assert describe_changes(BEFORE, changed, names, now) == [
        f"the latency table of myriad-vpu changed: 1.1 quadra_k5_e4 {before} -> 9.000000 (ms)"
    ]
    assert describe_changes(BEFORE, changed, names, names) == [
        "the latency table changed (digest cccccccc -> eeeeeeee)"
    ]


def test_copies_that_somebody_damaged_are_described_without_an_error() -> None:
    before, now = {"space_digest": "a" * 16}, {"space_digest": "b" * 16}
    space = "name: x\nstages:\n- {channels: 8}\n"
    for kept in (
        *("", "[", "[" * 5000, "3", "name: [1]", "stages: {a: 1}\nname: x", '"\\UFFFFFFFF": 1'),
        space,
    ):
        for given in ("", "3", space, f"{space}{'k' * 5000}: {'v' * 5000}", "name: x\nstages: {a: 2}"):
            (line,) = describe_changes(before, now, {"space.yaml": kept}, {"space.yaml": given})
            assert line.startswith("the space changed (digest aaaaaaaa -> bbbbbbbb)")
            assert len(line) < 400
            assert line.isprintable()
    tables = {"table_digest": "a" * 16}, {"table_digest": "b" * 16}
    good = "position,candidate,latency_ms\n1.1,identity,1\n"
    for kept in ("", "x", '"', "position\n1", "position,candidate,latency_ms\n1,2,3,4", good):
        (line,) = describe_changes(*tables, {"table-cpu.csv": kept}, {"table-cpu.csv": f"{good}1.2,b,2\n"})
        assert line.startswith("the latency table of cpu changed")


def test_values_of_any_length_are_shown_in_a_line() -> None:
    (line,) = describe_changes({"data": "a" * 5000}, {"data": "\x1b[2J\n" * 5000})
    assert len(line) < 200
    assert line.isprintable()
