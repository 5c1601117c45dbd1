import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.mutants import check_refusal

from qnas.common.errors import SpaceError
from qnas.common.resources import stems
from qnas.spaces.arch import Arch
from qnas.spaces.lower import Slot, fill, layers_of, lower, skeleton
from qnas.spaces.space import Candidate, SearchSpace, load_space, make_space, parse_space

SHIPPED = list(stems("search_spaces", ".yaml"))

SMALL: dict[str, Any] = {
    "schema": "qnas.space/1",
    "name": "mine",
    "source": "A test.",
    "input": {"channels": 3, "resolution_px": 32},
    "norm": "batchnorm",
    "activation": "relu6",
    "stem": {"channels": 8, "kernel": 3, "stride": 2},
    "transition": "block",
    "candidates": [{"block": "mbconv", "kernel": [3, 5], "expansion": [3, 6]}, {"block": "identity"}],
    "stages": [
        {"channels": 8, "positions": 2, "stride": 1},
        {"channels": 16, "positions": 2, "stride": 2},
    ],
    "head": {"classes": 10},
}
K3E2: dict[str, Any] = {"kernel": 3, "expansion": 2}
FOUR = ("mbconv_k3_e3", "mbconv_k3_e6", "mbconv_k5_e3", "mbconv_k5_e6")


def space(**changes: Any) -> SearchSpace:
    return parse_space(yaml.safe_dump({**SMALL, **changes}), "mine.yaml")


def message_of(text: str) -> str:
    with pytest.raises(SpaceError) as error:
        parse_space(text, "mine.yaml")
    message = str(error.value)
    assert message.startswith("mine.yaml")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_space_loads_under_its_own_name(name: str) -> None:
    assert load_space(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_written_space_reads_back_to_the_same_networks(name: str) -> None:
    before = load_space(name)
    after = parse_space(before.to_yaml(), "copy")
    assert after.digest == before.digest
    assert after.positions == before.positions
    assert after.source == before.source


def test_the_digest_names_the_networks_and_not_the_words() -> None:
    assert space(source="Other words.").digest == space().digest
    changes: list[dict[str, Any]] = [
        {"norm": "batchnorm", "activation": "relu"},
        {"input": {"channels": 3, "resolution_px": 64}},
        {"head": {"classes": 11}},
        {"candidates": SMALL["candidates"][:1]},
    ]
    digests = {space(**change).digest for change in changes}
    assert len(digests | {space().digest}) == len(changes) + 1


def test_no_two_shipped_spaces_are_the_same() -> None:
    assert len({load_space(name).digest for name in SHIPPED}) == len(SHIPPED)


def test_lists_stand_for_all_their_combinations_in_order() -> None:
    assert tuple(c.name for c in space().candidates) == (*FOUR, "identity")


NEURAL: dict[str, Any] = {
    **SMALL,
    "transition": "conv",
    "candidates": [
        {"block": "quadra", "neuron": ["linear", "quadranet", "fan"], "kernel": [3, 5], "expansion": 2},
        {"block": "quadra", "kernel": 3, "expansion": 4},
    ],
}


def test_neurons_may_be_a_list_and_show_in_names_but_for_quadranets() -> None:
    names = space(**NEURAL).positions[0].names
    assert names == (
        "quadra_k3_e2_linear",
        "quadra_k5_e2_linear",
        "quadra_k3_e2",
        "quadra_k5_e2",
        "quadra_k3_e2_fan",
        "quadra_k5_e2_fan",
        "quadra_k3_e4",
    )


def test_a_space_with_neurons_reads_back_to_the_same_networks() -> None:
    before = space(**NEURAL)
    after = parse_space(before.to_yaml(), "copy")
    assert (after, after.digest) == (before, before.digest)


def test_the_default_neuron_leaves_the_digest_as_it_was_before_there_were_neurons() -> None:
    assert load_space("quadranet-small").digest == "00d9ce65978f0c96"  # as in every arch.json until then
    named, other = (
        space(**{**NEURAL, "candidates": [{"block": "quadra", "kernel": 3, "expansion": 2, "neuron": n}]})
        for n in ("quadranet", "linear")
    )
    silent = space(**{**NEURAL, "candidates": [{"block": "quadra", "kernel": 3, "expansion": 2}]})
    assert named.digest == silent.digest != other.digest


NORMED: dict[str, Any] = {
    **SMALL,
    "transition": "conv",
    "norm": "layernorm",
    "activation": "gelu",
    "candidates": [
        {"block": "quadra", "norm": ["space", "batchnorm", "scale"], "act": ["space", "relu6"], **K3E2},
        {"block": "star", "norm": "batchnorm", "act": "relu6", **K3E2},
        {"block": "mbconv", "norm": "batchnorm", "act": "relu6", **K3E2},
        {"block": "identity"},
    ],
}


def test_a_candidates_own_norm_and_activation_show_in_its_name_and_in_its_layers() -> None:
    found = space(**NORMED)
    assert found.positions[0].names == (
        "quadra_k3_e2",
        "quadra_k3_e2_batchnorm",
        "quadra_k3_e2_scale",
        "quadra_k3_e2_relu6",
        "quadra_k3_e2_relu6_batchnorm",
        "quadra_k3_e2_relu6_scale",
        "star_k3_e2_relu6_batchnorm",
        "mbconv_k3_e2_relu6_batchnorm",
        "identity",
    )
    again = parse_space(found.to_yaml(), "copy")
    assert (again, again.digest) == (found, found.digest)
    slot = next(part for part in skeleton(found) if isinstance(part, Slot))
    words = {"batchnorm": "batchnorm", "scale": "layerscale"}
    for candidate in found.positions[0].candidates[:-1]:
        ops = {layer.op for layer in fill(found, slot, candidate).layers}
        own = candidate.name.split("_")[3:]
        norm = next((words[word] for word in own if word in words), "layernorm")
        assert ops & {"layernorm", "batchnorm", "layerscale"} == {norm}, candidate.name
        assert ops & {"gelu", "relu6"} == {"relu6" if "relu6" in own else "gelu"}, candidate.name
    # the surroundings are the space's
    fixed = {layer.op for part in skeleton(found) if not isinstance(part, Slot) for layer in part.layers}
    assert fixed & {"layernorm", "batchnorm", "layerscale"} == {"layernorm"}


def test_the_word_space_leaves_names_and_digests_as_they_were_before_there_was_a_choice() -> None:
    # as in every arch.json until then
    assert load_space("union-mobile").digest == "4985fe6c8e2129f1"
    assert load_space("quadranet-mobile").digest == "21c1377ff60809a5"
    words: dict[str, Any] = {"norm": "space", "act": "space"}
    for block in ("quadra", "star", "mbconv"):
        silent, named = (
            space(**{**NORMED, "norm": "batchnorm", "candidates": [{"block": block, **K3E2, **given}]})
            for given in (dict[str, Any](), words)
        )
        assert named.digest == silent.digest
        assert named.positions[0].names == (f"{block}_k3_e2",)


@pytest.mark.parametrize("block", ["quadra", "star", "mbconv"])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        ({"act": ["space", "gelu"]}, "gelu"),
        ({"act": ["hswish", "gelu", "space"]}, "gelu"),
        ({"norm": ["space", "batchnorm"]}, "batchnorm"),
    ],
)
def test_two_names_of_the_same_block_are_refused(block: str, words: dict[str, Any], name: str) -> None:
    same = {"norm": "batchnorm", "candidates": [{"block": block, **K3E2, **words}]}
    with pytest.raises(SpaceError) as error:
        space(**{**NORMED, **same})
    pair = (f"{block}_k3_e2", f"{block}_k3_e2_{name}")
    first, second = pair if next(iter(words.values()))[0] == "space" else pair[::-1]
    assert f"candidates: {first} and {second} are the same block, as the space has norm: batchnorm" in str(
        error.value
    )
    # one of them alone is fine, and so are both where the space has other words
    own = dict.fromkeys(words, name)
    assert space(**{**NORMED, **same, "candidates": [{"block": block, **K3E2, **own}]})


def test_a_space_with_another_norm_has_it_in_all_candidates_that_have_one() -> None:
    other = space(**NORMED).with_norm("batchnorm")
    assert other.positions[0].names == (
        *("quadra_k3_e2", "quadra_k3_e2_scale", "quadra_k3_e2_relu6", "quadra_k3_e2_relu6_scale"),
        *("star_k3_e2_relu6", "mbconv_k3_e2_relu6", "identity"),
    )
    assert other.norm == "batchnorm"


def test_the_defaults_of_later_keys_leave_the_digest_as_it_was_before_there_were_any() -> None:
    plain = space()
    digest = "4de3ade8ff484973"
    assert plain.digest == digest
    assert space(padding="symmetric", norm_eps=None).digest == digest
    assert space(input={"channels": 3, "resolution_px": 32, "mean": None, "std": None}).digest == digest
    others = [
        space(padding="same"),
        space(norm_eps=1e-3),
        space(input={"channels": 3, "resolution_px": 32, "mean": [0.5] * 3, "std": [0.25] * 3}),
    ]
    assert len({digest, *(other.digest for other in others)}) == 4


def test_padding_epsilon_and_normalisation_survive_a_file_and_python() -> None:
    given = {"channels": 3, "resolution_px": 32, "mean": [0.5, 0.25, 0.75], "std": [0.25] * 3}
    full = space(padding="same", norm_eps=1e-3, input=given)
    assert parse_space(full.to_yaml(), "again") == full
    assert full.input.normalisation == ((0.5, 0.25, 0.75), (0.25,) * 3)
    assert space().input.normalisation is None
    keys = {key: value for key, value in SMALL.items() if key not in ("schema", "name", "input")}
    made = make_space("mine", **keys, input=given, padding="same", norm_eps=1e-3)
    assert made.digest == full.digest
    assert "padding" not in make_space("mine", **keys, input=SMALL["input"]).to_yaml()


def test_layers_have_the_padding_and_epsilon_of_their_space() -> None:
    usual, other = space(), space(padding="same", norm_eps=1e-3)
    arch = Arch(("mbconv_k3_e3", "identity", "mbconv_k5_e6", "mbconv_k3_e3"))
    before, after = (list(layers_of(lower(s, arch))) for s in (usual, other))
    for old, new in zip(before, after, strict=True):
        assert (old.same, old.eps) == (False, None)
        assert new.same == (new.op in ("conv", "dwconv") and new.stride == 2)
        assert new.eps == (1e-3 if new.op == "batchnorm" else None)
        assert (new.out_px, new.macs, new.params) == (old.out_px, old.macs, old.params)
    assert [layer.pads for layer in after if layer.same] == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": [0.5] * 3}, "mean and std: expected both with a value for each of 3 channels, got 3 and 0"),
        ({"mean": [0.5] * 3, "std": [0.5]}, "got 3 and 1"),
        ({"mean": [2.0] * 3, "std": [0.5] * 3}, "input.mean[0]: expected at most 1, got 2.0"),
        ({"mean": [0.5] * 3, "std": [0] * 3}, "input.std[0]: expected at least 0.001, got 0"),
    ],
)
def test_a_normalisation_is_one_of_all_channels(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match="input") as error:
        space(input={"channels": 3, "resolution_px": 32, **given})
    assert message in str(error.value)


def test_a_candidate_that_keeps_the_shape_is_left_out_where_the_shape_changes() -> None:
    # the first stage goes from 8 to 8 channels at stride 1, the second changes both
    names = {p.name: p.names for p in space().positions}
    assert names == {
        "1.1": (*FOUR, "identity"),
        "1.2": (*FOUR, "identity"),
        "2.1": FOUR,
        "2.2": (*FOUR, "identity"),
    }


def test_a_conv_transition_leaves_every_position_all_candidates() -> None:
    positions = space(transition="conv").positions
    assert all(p.names == (*FOUR, "identity") and p.keeps_shape for p in positions)


def test_a_stage_may_have_candidates_of_its_own() -> None:
    own = [{"block": "mbconv", "kernel": 3, "expansion": 1}]
    stages = [{**SMALL["stages"][0], "candidates": own}, SMALL["stages"][1]]
    assert [p.names for p in space(stages=stages).positions][:2] == [("mbconv_k3_e1",)] * 2


def test_a_space_with_one_candidate_a_position_is_fixed() -> None:
    assert not space().is_fixed
    assert space(candidates=[{"block": "mbconv", "kernel": 3, "expansion": 1}]).is_fixed


ALL_BROKEN: dict[str, Any] = {
    "name": "my space",
    "norm": "batchnrom",
    "input": {"channels": "3", "resolution_px": 0},
    "stem": {"channels": 8, "kernal": 3, "stride": 2},
    "candidates": [
        {"block": "mbconf", "kernel": 3, "expansion": 3},
        {"block": "mbconv", "kernel": [3, 4], "expansion": [3, 17]},
    ],
    "stages": [{"channels": 8.5, "positions": 2, "stride": 1}],
    "head": None,
    "actvation": "relu",
}


@pytest.mark.parametrize(
    ("key", "problems"),
    [
        ("name", ["name: expected the form ^[A-Za-z0-9][A-Za-z0-9._-]*$, got 'my space'"]),
        (
            "input",
            [
                "input.channels: expected a whole number, got '3'",
                "input.resolution_px: expected at least 1, got 0",
            ],
        ),
        ("norm", ["norm: expected 'layernorm' or 'batchnorm', got 'batchnrom'"]),
        (
            "stem",
            [
                "stem.kernel: missing",
                "stem.kernal: unknown key (did you mean kernel? known: activation, channels, kernel, stride)",
            ],
        ),
        (
            "candidates",
            [
                "candidates.block: unknown block, got 'mbconf' (did you mean mbconv? known: identity, "
                "mbconv, quadra, star, or one that a `plugin` registers first)",
                "candidates.expansion: expected at most 16, got 17",
                "candidates.kernel: expected an odd number, got 4",
            ],
        ),
        ("stages", ["stages[0].channels: expected a whole number, got 8.5"]),
        ("head", ["head: expected a mapping, got nothing"]),
        (
            "actvation",
            [
                "actvation: unknown key (did you mean activation or transition? known: activation, "
                "candidates, head, input, name, norm, norm_eps, padding, schema, source, stages, stem, "
                "transition)",
            ],
        ),
    ],
)
def test_problems_of_a_key_come_in_one_line(key: str, problems: list[str]) -> None:
    found = message_of(yaml.safe_dump({**SMALL, key: ALL_BROKEN[key]}))
    assert found.removeprefix("mine.yaml: ").split("; ") == problems


def test_all_problems_of_a_file_come_in_one_line_and_what_it_has_no_room_for_is_counted() -> None:
    message = message_of(yaml.safe_dump({**SMALL, **ALL_BROKEN})).removeprefix("mine.yaml: ")
    assert len(message) <= 290
    *shown, more = message.split("; ")
    assert [problem.partition(":")[0] for problem in shown] == [
        *("name", "input.channels", "input.resolution_px", "norm", "stem.kernel")
    ]
    assert more == "and 7 more"


LISTS = {"kernel": 40 * [3], "expansion": 40 * [4], "neuron": 700 * ["fan"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": [{"block": "quadra", **LISTS}]}, "candidates: expected at most 64, got 1120000"),
        ({"candidates": 1000 * [{"block": "quadra", **LISTS}]}, "candidates: expected at most 64, got "),
        ({"candidates": 5000 * [{"block": "identity"}]}, "candidates: expected at most 64, got 5000"),
        ({"candidates": 5000 * [3]}, "candidates: expected at most 64, got 5000"),
        (
            {"stages": [{**SMALL["stages"][0], "candidates": [{"block": "mbconv", "kernel": 300 * [3]}]}]},
            "stages[0].candidates: expected at most 64, got 300",
        ),
        ({"stages": 101 * [SMALL["stages"][0]]}, "stages: expected at most 100, got 101"),
        (
            {"stages": 100 * [{**SMALL["stages"][0], "positions": 100}]},
            "stages: expected at most 1,000 positions together, got 10,000",
        ),
        (
            {
                "stages": 10 * [{**SMALL["stages"][0], "positions": 100}],
                "candidates": [{"block": "mbconv", "kernel": [1, 3, 5, 7], "expansion": [1, 2, 3]}],
            },
            "expected at most 10,000 candidates in all positions together, got 12,000",
        ),
        ({"head": {"classes": 10**30}}, "head.classes: expected at most 1000000, got 1000000000"),
        ({"stem": {"channels": 10**9, "kernel": 3, "stride": 2}}, "stem.channels: expected at most 16384"),
        ({"input": {"resolution_px": 10**9}}, "input.resolution_px: expected at most 4096"),
        ({"name": 101 * "a"}, "name: expected at most 100 characters, got "),
        ({"candidates": [{"block": "identity", 3: 4}]}, "candidates: identity takes no 3"),
    ],
)
def test_a_space_that_no_search_can_bear_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    text = yaml.safe_dump({**SMALL, **changes})
    before = time.process_time()
    tracemalloc.start()
    found = message_of(text).removeprefix("mine.yaml: ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.startswith(message)
    assert len(found) <= 290
    assert peak < 300 * len(text) + 2_000_000
    assert time.process_time() - before < 5


def test_the_largest_space_has_room_for_generous_candidates() -> None:
    stage = {**SMALL["stages"][0], "positions": 50}
    candidates = [{"block": "mbconv", "kernel": [1, 3, 5, 7], "expansion": list(range(1, 11))}]
    largest = space(stages=5 * [stage], candidates=candidates)
    assert sum(len(p.candidates) for p in largest.positions) == 10_000


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "b" * 5000, "x\n\x1b[2J", "\0", "a/\0.yaml"])
def test_a_name_that_no_space_has_is_one_line(name: str) -> None:
    with pytest.raises(SpaceError) as error:
        load_space(name)
    check_refusal(error.value)


def test_a_space_made_in_python_is_refused_in_one_line() -> None:
    with pytest.raises(SpaceError) as error:
        make_space("x" * 5000, **{k: v for k, v in SMALL.items() if k not in ("schema", "name")})
    check_refusal(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm"}, "candidates: mbconv needs norm: batchnorm, got layernorm"),
        (
            {"candidates": [*SMALL["candidates"], {"block": "mbconv", "kernel": 5, "expansion": 3}]},
            "candidates: listed twice: mbconv_k5_e3",
        ),
        ({"candidates": [{"block": "identity", "kernel": 3}]}, "candidates: identity takes no kernel"),
        ({"candidates": [{"block": "mbconv"}]}, "candidates: mbconv needs expansion and kernel"),
        (
            {"candidates": [{"block": "mbconv", "kernel": 3, "expansion": 3, "neuron": "fan"}]},
            "candidates.neuron: expected 'linear' or 'factored', got 'fan'",
        ),
        (
            {"candidates": [{"block": "quadra", "kernel": 3, "expansion": 3, "neuron": ["fan", "fam"]}]},
            "candidates.neuron: expected 'quadranet', 'linear', 'type2', 'type3', 'type4', 'factored', "
            "'fan' or 'compact', got 'fam'",
        ),
        ({"candidates": ["identity"]}, "candidates: expected a mapping, got 'identity'"),
        ({"candidates": []}, "candidates: expected at least 1, got 0"),
        ({"stages": []}, "stages: expected at least 1, got 0"),
        ({"schema": "qnas.space/9"}, "schema: expected 'qnas.space/1', got 'qnas.space/9'"),
        (
            {"stem": {"channels": 8, "kernel": 4, "stride": 2}},
            "stem.kernel: expected an odd number or the stride, got 4",
        ),
        (
            {"stages": [{"channels": 16, "positions": 1, "stride": 3}]},
            "stages[0].stride: expected at most 2 with transition: block, got 3",
        ),
        (
            {
                "candidates": [{"block": "quadra", "kernel": 3, "expansion": 2}],
                "stages": [SMALL["stages"][0], SMALL["stages"][1]],
            },
            "position 2.1: no candidate can go from 8 to 16 channels at stride 2",
        ),
    ],
)
def test_a_problem_is_named_with_its_key_and_what_was_expected(changes: dict[str, Any], message: str) -> None:
    assert message_of(yaml.safe_dump({**SMALL, **changes})) == f"mine.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: expected a mapping with schema: qnas.space/1, got an empty file"),
        ("# nothing\n", "mine.yaml: expected a mapping with schema: qnas.space/1, got an empty file"),
        ("- a\n", "mine.yaml: expected a mapping with schema: qnas.space/1, got a list"),
        ("text", "mine.yaml: expected a mapping with schema: qnas.space/1, got 'text'"),
        ("a: 1\nb: [1\n", "mine.yaml, line 3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: \x00", "mine.yaml: not YAML: cannot be read"),
    ],
)
def test_what_is_no_space_at_all_is_refused(text: str, message: str) -> None:
    assert message_of(text) == message


def test_a_missing_key_is_named() -> None:
    text = yaml.safe_dump({key: value for key, value in SMALL.items() if key not in ("schema", "head")})
    assert message_of(text) == "mine.yaml: schema: missing; head: missing"


def test_an_unknown_space_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(SpaceError) as error:
        load_space("quadranet-smal")
    assert str(error.value).startswith("unknown search space 'quadranet-smal': did you mean quadranet-small")
    assert f"known: {', '.join(SHIPPED[:3])}" in str(error.value)


def test_a_space_of_ones_own_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert load_space(path) == load_space(str(path)) == space()
    path.write_text("schema: qnas.space/1")
    with pytest.raises(SpaceError, match=r"mine\.yaml: name: missing"):
        load_space(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpaceError, match=r"mine\.yaml: not a text file in UTF-8"):
        load_space(path)
    with pytest.raises(SpaceError, match=r"^search space .*other\.yaml: no such file$"):
        load_space(tmp_path / "other.yaml")


def test_a_space_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        space().norm = "layernorm"
    with pytest.raises(ValueError, match="frozen"):
        Candidate(block="identity").block = "mbconv"
