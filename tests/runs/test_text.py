from collections.abc import Callable
from functools import partial

import pytest
from helpers.exported import neural_space

from qnas.common.resources import stems
from qnas.runs.network_text import choices_by_stage, describe_network, describe_space
from qnas.runs.text import (
    balanced_text,
    columns,
    field,
    never_text,
    next_command,
    short_name,
    table_rows,
)
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space

SPACES: dict[str, Callable[[], SearchSpace]] = {
    **{name: partial(load_space, name) for name in stems("search_spaces", ".yaml")},
    "all neurons": partial(neural_space, "layernorm"),
}


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("name", SPACES)
def test_what_is_drawn_of_a_space_fits_a_terminal_and_breaks_no_name(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    space = SPACES[name]()
    turns = tuple(i % len(position.names) for i, position in enumerate(space.positions))
    arch = arch_from_indices(space, turns)
    chosen = choices_by_stage(space, arch)
    described = describe_space(space)
    for text in (chosen, describe_network(space, lower(space, arch)), described):
        assert max(map(len, text.splitlines())) <= width, text
    lines = chosen.splitlines()
    for choice in set(map(short_name, arch.choices)):
        # as whole columns: no name ends where another goes on
        shown = [part for line in lines for part in line.strip().split("  ") if part.strip() == choice]
        assert len(shown) == list(map(short_name, arch.choices)).count(choice), choice
    for position in space.positions:
        assert all(
            any(name in line for line in described.splitlines()) for name in map(short_name, position.names)
        )


def test_a_long_list_of_candidates_is_written_once() -> None:
    space = load_space("union-mobile")
    lines = describe_space(space).splitlines()
    assert sum(short_name("star_k5_e4") in line.replace("\N{NO-BREAK SPACE}", " ") for line in lines) == 1
    at = lines.index("    the 31 candidates of stage 2")
    assert lines[at - 1] == "  stage 3: 40 channels, 4 positions, stride 2"
    assert sum("of stage 2" in line for line in lines) == 5
    assert "candidates of stage" not in describe_space(load_space("quadranet-small"))


def test_a_network_names_the_neuron_of_each_block() -> None:
    space = neural_space("layernorm")
    arch = arch_from_indices(space, tuple(range(len(space.positions))))
    drawn = describe_network(space, lower(space, arch))
    for line, candidate in zip(drawn.splitlines()[3:], space.positions[0].candidates, strict=False):
        assert f" {candidate.kind} " in line


# ---- narrow terminals


def table(width: int, keys: int = 1) -> str:
    header = ("name", "first", "second", "third")
    rows = [("a", "1.0", "2.00", "x"), ("bb", "10.0", "", "yy")]
    return table_rows(header, rows, left=(0, 3), keys=keys, width=width)


def test_a_table_that_does_not_fit_becomes_several_with_the_names_of_the_rows() -> None:
    whole = "name  first  second  third\na       1.0    2.00  x\nbb     10.0          yy"
    assert table(80) == table(26) == whole
    assert table(19) == (
        "name  first  second\na       1.0    2.00\nbb     10.0\n\nname  third\na     x\nbb    yy"
    )
    assert [part.splitlines()[0] for part in table(1).split("\n\n")] == [
        "name  first",
        "name  second",
        "name  third",
    ], "at least one column beside the names"
    assert table(19, keys=2).splitlines()[4] == "name  first  third"


@pytest.mark.parametrize(
    ("asked", "width"), [("40", 40), ("400", 80), ("1", 20), ("0", 80), ("wide", 80), (None, 80)]
)
def test_output_is_as_wide_as_the_terminal_within_bounds(
    asked: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", asked)
    monkeypatch.setattr("sys.__stdout__", None)  # not a terminal, wherever the tests run
    assert columns() == width
    words = "word " * 60
    assert max(map(len, field("name", words).splitlines())) <= max(width, 12 + len("word"))
    assert max(map(len, next_command(f"qnas {words}").splitlines())) <= max(width, 14 + len("word") + 2)


# ---- classes


def test_a_balanced_accuracy_is_said_unless_it_reads_like_the_accuracy() -> None:
    assert balanced_text(0.95, 0.5) == "balanced accuracy 50.00%, the mean recall of the classes"
    assert balanced_text(0.951, 0.949, digits=1).startswith("balanced accuracy 94.9%")
    assert balanced_text(0.95004, 0.95001) == balanced_text(0.95, None) == ""


def test_the_classes_that_are_never_predicted_are_listed_within_bounds() -> None:
    assert never_text([], 3) == ""
    assert never_text(["a", "b"], 3) == "never predicts 2 of 3 classes: a, b"
    names = [f"\x1b[31mclass {number}" + 300 * "x" for number in range(100)]
    text = never_text(names, 100)
    assert text.startswith(r"never predicts 100 of 100 classes: \x1b[31mclass 0x")
    assert text.endswith("and 95 more")
    assert len(text) < 250
    assert text.isprintable()
