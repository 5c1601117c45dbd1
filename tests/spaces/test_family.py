import itertools
from pathlib import Path

import pytest
from helpers.networks import WITH_BLOCK_TRANSITIONS
from helpers.tiny import TINY_SPACE

from qnas.common.errors import SpaceError
from qnas.spaces.family import (
    Layout,
    SpaceFamily,
    load_family,
    make_family,
    multiplied_widths,
    parse_family,
)
from qnas.spaces.lower import all_blocks
from qnas.spaces.space import load_space, parse_space

FOUR = TINY_SPACE.replace("resolution_px: 32", "resolution_px: [32, 16, 24]")


def with_widths(text: str, widths: tuple[tuple[int, ...], ...]) -> SpaceFamily:
    """Return the family of a space whose stages have these widths."""
    content = parse_space(text, "tiny").written()
    for stage, row in zip(content["stages"], widths, strict=True):
        stage["channels"] = max(row)
    largest = type(parse_space(text, "tiny")).model_validate(content)
    return SpaceFamily(largest, (16, 32), widths)


def test_a_family_has_a_space_of_its_own_at_each_layout() -> None:
    family = parse_family(FOUR, "f")
    assert len(family) == 3
    assert [layout.resolution_px for layout in family.layouts()] == [16, 24, 32]
    spaces = [family.at(layout) for layout in family.layouts()]
    assert [space.name for space in spaces] == ["tiny-16px", "tiny-24px", "tiny-32px"]
    assert len({space.digest for space in spaces}) == 3
    # besides the name, it is the space whose file has this one resolution
    for space in spaces:
        text = TINY_SPACE.replace("name: tiny", f"name: {space.name}")
        px = space.input.resolution_px
        assert space == parse_space(text.replace("resolution_px: 32", f"resolution_px: {px}"), "t")


def test_a_file_without_lists_is_a_family_of_its_own_space() -> None:
    family, space = parse_family(TINY_SPACE, "f"), parse_space(TINY_SPACE, "f")
    (layout,) = family.layouts()
    assert family.at(layout) == space
    assert family.at(layout).digest == space.digest


def test_the_text_of_a_family_reads_back_to_it() -> None:
    family = parse_family(FOUR, "f")
    again = parse_family(family.to_yaml(), "g")
    assert again == family
    assert again.digest == family.digest != make_family(family.largest).digest


def test_one_of_several_resolutions_is_asked_for_where_one_space_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(FOUR)
    with pytest.raises(SpaceError) as error:
        load_space(file)
    assert str(error.value) == (
        f"{file}: input.resolution_px: 3 values, which make a family of spaces: expected one value here; a "
        "search takes them all"
    )
    assert len(load_family(file)) == 3


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("[]", "f: input.resolution_px: expected 1 to 32 values, got 0"),
        ("[32, 16, 32]", "f: input.resolution_px: 32 is there twice"),
        ("[32, big]", "f: input.resolution_px: expected whole numbers, got 'big'"),
        ("[32, true]", "f: input.resolution_px: expected whole numbers, got True"),
        ("[32, 3]", "resolution 3 px is too small for space tiny: at least 4 px"),
        ("[32, 5000]", "f: input.resolution_px: expected at most 4096, got 5000"),
    ],
)
def test_problems_of_resolutions_are_told_in_one_line(given: str, problem: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse_family(TINY_SPACE.replace("resolution_px: 32", f"resolution_px: {given}"), "f")
    assert str(error.value) == problem


def with_list(given: str) -> str:
    """Return the file of a space with a list of widths of its second stage, and of resolutions."""
    assert "channels: 16\n" in TINY_SPACE
    return FOUR.replace("channels: 16\n", f"channels: {given}\n")


def test_lists_of_widths_make_a_family() -> None:
    family = parse_family(with_list("[16, 24]"), "f")
    assert family.widths == ((8,), (16, 24))
    assert (len(family), family.choices, family.has_widths) == (6, 3, True)
    assert family.largest_layout == Layout(32, (8, 24))
    for layout in family.layouts():
        assert [stage.channels for stage in family.at(layout).stages] == list(layout.channels)
    assert family.label_of(Layout(24, (8, 16))) == "24 px, 8-16 channels"
    assert not parse_family(FOUR, "f").has_widths
    again = parse_family(family.to_yaml(), "g")
    assert again == family
    assert again.digest == family.digest != parse_family(FOUR, "f").digest
    assert make_family(family.largest, [16, 24, 32], [[8], [24, 16]]) == family


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("[]", "f: stages[1].channels: expected 1 to 32 values, got 0"),
        ("[16, 16]", "f: stages[1].channels: 16 is there twice"),
        ("[16, wide]", "f: stages[1].channels: expected whole numbers, got 'wide'"),
        ("[16, 0]", "f: stages[1].channels: expected at least 1, got 0"),
        ("[16, 99999]", "f: stages[1].channels: expected at most 16384, got 99999"),
        ("", "f: stages[1].channels: expected a whole number, got nothing"),
    ],
)
def test_problems_of_widths_are_told_in_one_line(given: str, problem: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse_family(with_list(given), "f")
    assert str(error.value) == problem


def test_other_keys_are_checked_beside_lists() -> None:
    with pytest.raises(SpaceError) as error:
        parse_family(with_list("[16, 24]").replace("classes: 10", "classes: 1"), "f")
    assert str(error.value) == "f: head.classes: expected at least 2, got 1"
    with pytest.raises(SpaceError, match="input: expected a mapping"):
        parse_family(
            with_list("[16, 24]").replace("input: {", "input: [{").replace("32, 16, 24]}", "32]}]"), "f"
        )


@pytest.mark.parametrize("transition", ["conv", "block"])
def test_stages_whose_shape_changes_at_some_widths_only_are_refused(transition: str) -> None:
    text = WITH_BLOCK_TRANSITIONS.replace("transition: block", f"transition: {transition}")
    space = parse_space(text, "t")
    make_family(space, widths=[[16, 24], [32, 40], [40, 48]])
    with pytest.raises(SpaceError) as error:
        make_family(space, widths=[[16, 24], [24, 32], [48]])
    name = "2.transition" if transition == "conv" else "2.1"
    assert str(error.value).endswith(
        f"stages[1].channels: block {name} differs between widths, since the stage has no stride and some of "
        "its widths are those of stage 1: expected the same single width, or no width in both"
    )


def test_multiples_of_widths_are_rounded_to_vectors() -> None:
    space = make_family(parse_space(TINY_SPACE, "t"), widths=[[20], [44]]).largest
    assert multiplied_widths(space, [1, 0.5]) == ((8, 20), (24, 44))  # 10 and 22 to the nearest
    assert multiplied_widths(space, [0.01]) == ((8,), (8,))
    # nothing stands between the stem and the first stage, nor between the first two
    assert multiplied_widths(parse_space(TINY_SPACE, "t"), [1, 2]) == ((8,), (16, 32))
    alike = parse_space(WITH_BLOCK_TRANSITIONS, "t")
    assert multiplied_widths(alike, [1, 2]) == ((8,), (8,), (8, 16))
    assert len(make_family(alike, None, multiplied_widths(alike, [1, 2]))) == 2
    for wrong, problem in (([], "expected one or more"), ([0.5, -1.0], "got -1.0"), ([True], "got True")):
        with pytest.raises(SpaceError, match=problem):
            multiplied_widths(space, wrong)
    with pytest.raises(SpaceError, match="expected widths for 2 stages, got 1"):
        make_family(space, widths=[[8]])


@pytest.mark.parametrize("widths", [((8, 12), (16,)), ((8, 12, 16), (8, 16)), ((8,), (8, 12, 16, 24))])
def test_covering_layouts_have_every_pair_of_neighbouring_widths(widths: tuple[tuple[int, ...], ...]) -> None:
    family = with_widths(TINY_SPACE, widths)
    covering = list(family.covering())
    assert len(covering) <= 2 * max(map(len, widths)) ** 2
    for px in family.resolutions_px:
        found = {layout.channels for layout in covering if layout.resolution_px == px}
        for before, after in itertools.pairwise(range(len(widths))):
            pairs = {(channels[before], channels[after]) for channels in found}
            assert pairs == set(itertools.product(widths[before], widths[after]))


def test_covering_layouts_have_every_block_of_every_layout() -> None:
    family = with_widths(WITH_BLOCK_TRANSITIONS, ((8, 12), (8, 12, 16), (8,)))
    covered = {block for layout in family.covering() for block, _ in all_blocks(family.at(layout))}
    every = {block for layout in family.layouts() for block, _ in all_blocks(family.at(layout))}
    assert covered == every


def test_names_of_layouts_differ_and_stay_short() -> None:
    family = with_widths(TINY_SPACE.replace("name: tiny", f"name: {'x' * 95}"), ((8, 12), (16, 24)))
    names = [family.name_of(layout) for layout in family.layouts()]
    assert len(set(names)) == len(names) == 8
    assert max(map(len, names)) <= 100
    assert family.at(Layout(16, (8, 24))).name in names


@pytest.mark.parametrize("name", ["union-mobile", "quadranet-small"])
def test_a_shipped_space_at_a_resolution_is_known_by_the_name_of_both(name: str) -> None:
    family = make_family(load_space(name), [64, 96])
    for layout in family.layouts():
        found = load_space(f"{name}-{layout.resolution_px}px")
        assert found.digest == family.at(layout).digest
        assert load_family(f"{name}-{layout.resolution_px}px") == make_family(found)
    with pytest.raises(SpaceError, match="unknown search space 'none-64px'"):
        load_space("none-64px")
    with pytest.raises(SpaceError, match=r"-9999px: input\.resolution_px: expected at most 4096, got 9999"):
        load_space(f"{name}-9999px")
