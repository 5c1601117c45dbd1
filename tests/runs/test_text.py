from collections.abc import Callable
from functools import partial

import pytest
from helpers.exported import neural_space

from qnas.common.resources import stems
from qnas.runs.network_text import choices_by_stage, describe_network, describe_space
from qnas.runs.text import short_name
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space

SPACES: dict[str, Callable[[], SearchSpace]] = {
    **{name: partial(load_space, name) for name in stems("search_spaces", ".yaml")},
    "all neurons": partial(neural_space, "layernorm"),
}


@pytest.mark.parametrize("name", SPACES)
def test_what_is_drawn_of_a_space_fits_a_terminal_and_breaks_no_name(name: str) -> None:
    space = SPACES[name]()
    turns = tuple(i % len(position.names) for i, position in enumerate(space.positions))
    arch = arch_from_indices(space, turns)
    chosen = choices_by_stage(space, arch)
    for text in (chosen, describe_network(space, lower(space, arch)), describe_space(space)):
        assert max(map(len, text.splitlines())) <= 80, text
    lines = chosen.splitlines()
    for choice in set(map(short_name, arch.choices)):
        # as whole columns: no name ends where another goes on
        shown = [part for line in lines for part in line.strip().split("  ") if part.strip() == choice]
        assert len(shown) == list(map(short_name, arch.choices)).count(choice), choice
    for position in space.positions:
        assert all(
            any(name in line for line in describe_space(space).splitlines())
            for name in map(short_name, position.names)
        )


def test_a_network_names_the_neuron_of_each_block() -> None:
    space = neural_space("layernorm")
    arch = arch_from_indices(space, tuple(range(len(space.positions))))
    drawn = describe_network(space, lower(space, arch))
    for line, candidate in zip(drawn.splitlines()[3:], space.positions[0].candidates, strict=False):
        assert f" {candidate.kind} " in line
