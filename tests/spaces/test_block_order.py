import pytest
from helpers.networks import WITH_BLOCK_TRANSITIONS, all_networks, same_network

from qnas.spaces.block_order import block_labels, place_blocks_first, runs_of, take_first_places
from qnas.spaces.space import SearchSpace, parse_space


@pytest.mark.parametrize("text", ["", WITH_BLOCK_TRANSITIONS])
def test_labels_are_equal_for_equal_networks_only(text: str, tiny_space: SearchSpace) -> None:
    space = parse_space(text, "blocks.yaml") if text else tiny_space
    labels = block_labels(space)
    classes: dict[object, set[tuple[int, ...]]] = {}
    for indices in all_networks(space):
        key = tuple(row[i] for row, i in zip(labels, indices, strict=True) if row[i])
        classes.setdefault(same_network(space, indices), set()).add(key)
    assert all(len(keys) == 1 for keys in classes.values())
    assert len(set().union(*classes.values())) == len(classes)
    assert len(classes) < len(list(all_networks(space)))


@pytest.mark.parametrize("text", ["", WITH_BLOCK_TRANSITIONS])
def test_blocks_placed_first_are_the_same_network(text: str, tiny_space: SearchSpace) -> None:
    space = parse_space(text, "blocks.yaml") if text else tiny_space
    labels = block_labels(space)
    runs = runs_of(labels)
    assert [i for run in runs for i in run] == list(range(len(space.positions)))
    placed: dict[object, set[tuple[int, ...]]] = {}
    for indices in all_networks(space):
        first = place_blocks_first(labels, indices)
        assert place_blocks_first(labels, first) == first
        for run in runs:
            layers = [labels[i][first[i]] > 0 for i in run]
            assert layers == sorted(layers, reverse=True)
        assert same_network(space, first) == same_network(space, indices)
        placed.setdefault(same_network(space, indices), set()).add(first)
    if not text:  # elsewhere candidates differ between positions of one shape, and blocks stay within runs
        assert all(len(each) == 1 for each in placed.values())


def test_the_first_places_are_taken_in_order_within_each_run(tiny_space: SearchSpace) -> None:
    labels = block_labels(tiny_space)  # two stages of two positions; identity is the last candidate
    identity = [len(row) - 1 for row in labels]
    assert take_first_places(labels, [0, 1, 0, 0]) == [0, 1, 2, 3]
    assert take_first_places(labels, [identity[0], 1, 0, identity[3]]) == [1, 0, 2, 3]
    assert take_first_places(labels, [identity[0], identity[1], identity[2], 0]) == [0, 1, 3, 2]
