from dataclasses import replace

import pytest
from helpers.pretrained import tiny_space

from qnas.common.errors import UsageError
from qnas.nn.pretrained.derivation import (
    Residual,
    check_fits,
    derived_space,
    fixed_space,
    own_arch,
    own_choices,
)
from qnas.spaces.space import SearchSpace, parse_space


def changed(space: SearchSpace, **keys: object) -> SearchSpace:
    return SearchSpace.model_validate(space.model_dump(mode="json", by_alias=True, exclude_unset=True) | keys)


def test_blocks_that_differ_in_a_stage_make_stages_of_their_own() -> None:
    blocks = [Residual(8, 1, 3, 1), Residual(12, 2, 5, 6), Residual(12, 1, 3, 6), Residual(12, 1, 3, 6)]
    space = fixed_space(
        "net",
        blocks,
        input={"resolution_px": 32},
        activation="relu",
        stem={"channels": 8, "kernel": 3, "stride": 2},
        head={"classes": 10},
    )
    assert [(s.channels, s.stride, s.positions) for s in space.stages] == [(8, 1, 1), (12, 2, 1), (12, 1, 2)]
    assert [p.names for p in space.positions] == [
        ("mbconv_k3_e1",),
        ("mbconv_k5_e6",),
        ("mbconv_k3_e6",),
        ("mbconv_k3_e6",),
    ]


@pytest.mark.parametrize("quadratic", [False, True])
def test_the_derived_space_contains_the_network_and_smaller_and_larger_blocks(quadratic: bool) -> None:
    network = tiny_space()
    space = derived_space(network, quadratic=quadratic)
    check_fits(space, network)
    assert own_arch(space, network).choices == ("mbconv_k3_e1", *["mbconv_k5_e6"] * 2, "mbconv_k3_e4")
    sizes = [
        {(c.sizes["kernel"], c.sizes["expansion"]) for c in p.candidates if c.sizes} for p in space.positions
    ]
    assert sizes[0] == {(k, 1) for k in (3, 5, 7)}
    assert sizes[2] == {(k, e) for k in (3, 5, 7) for e in (2, 3, 4, 6)}
    assert sizes[3] == {(k, e) for k in (3, 5, 7) for e in (2, 3, 4)}
    # where the shape stays, and only there, a block can be left out
    assert ["identity" in p.names for p in space.positions] == [p.keeps_shape for p in space.positions]
    neurons = {c.parameters["neuron"] for p in space.positions for c in p.candidates if c.sizes}
    assert neurons == ({"linear", "factored"} if quadratic else {"linear"})


def test_a_derived_space_survives_its_file() -> None:
    space = derived_space(tiny_space())
    assert parse_space(space.to_yaml(), "file") == space
    assert (space.padding, space.norm_eps) == ("same", 1e-2)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"padding": "symmetric"}, "padding: expected same, got symmetric"),
        ({"norm_eps": 1e-3}, "norm_eps: expected 0.01, got 0.001"),
        ({"activation": "relu"}, "activation: expected relu6, got relu"),
        ({"head": {"classes": 10, "channels": 32}}, "head.channels: expected 24, got 32"),
        ({"input": {"resolution_px": 32}}, "input.mean: expected (0.4, 0.5, 0.6), got None"),
        ({"stem": {"channels": 16, "kernel": 3, "stride": 2}}, "stem: expected"),
    ],
)
def test_a_space_of_other_conventions_is_refused(keys: dict[str, object], problem: str) -> None:
    network = tiny_space()
    with pytest.raises(UsageError, match="does not fit tiny-net") as caught:
        check_fits(changed(derived_space(network), **keys), network)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("candidate", "fits"),
    [
        ({"block": "mbconv", "kernel": 9, "expansion": 6}, True),
        ({"block": "mbconv", "kernel": 1, "expansion": 5}, True),
        ({"block": "mbconv", "kernel": 3, "expansion": 8}, False),
        ({"block": "mbconv", "kernel": 3, "expansion": 1}, False),
        ({"block": "mbconv", "kernel": 3, "expansion": 6, "attention": "se"}, False),
        ({"block": "mbconv", "kernel": 3, "expansion": 6, "act": "hswish"}, False),
        ({"block": "star", "kernel": 3, "expansion": 4}, False),
    ],
)
def test_candidates_must_be_slices_of_the_network(candidate: dict[str, object], fits: bool) -> None:
    network = tiny_space()
    content = derived_space(network).model_dump(mode="json", by_alias=True, exclude_unset=True)
    own = {"block": "mbconv", "kernel": 5, "expansion": 6}
    content["stages"][1]["candidates"] = [own, candidate]
    space = SearchSpace.model_validate(content)
    if fits:
        check_fits(space, network)
        return
    with pytest.raises(UsageError, match=r"position 2\.\d: \S+ cannot start from mbconv_k5_e6"):
        check_fits(space, network)


def test_a_space_with_fewer_positions_fits_but_does_not_contain_the_network() -> None:
    network = tiny_space()
    content = derived_space(network).model_dump(mode="json", by_alias=True, exclude_unset=True)
    content["stages"][1]["positions"] = 1
    space = SearchSpace.model_validate(content)
    check_fits(space, network)
    assert own_choices(space, network) == ("mbconv_k3_e1", "mbconv_k5_e6", "mbconv_k3_e4")
    with pytest.raises(UsageError, match="does not contain tiny-net itself"):
        own_arch(space, network)
    content["stages"][1]["positions"] = 3
    with pytest.raises(UsageError, match=r"stages\[1\]\.positions: expected at most 2, got 3"):
        check_fits(SearchSpace.model_validate(content), network)


def test_residuals_are_values() -> None:
    assert replace(Residual(8, 1, 3, 6), kernel=5) == Residual(8, 1, 5, 6)
