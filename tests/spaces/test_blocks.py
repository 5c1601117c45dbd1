from typing import Any

import pytest
import yaml
from helpers.mutants import check_refusal
from helpers.own_blocks import Gate, register_gate
from helpers.tiny import TINY_SPACE

from qnas.common.errors import SpaceError, UsageError
from qnas.spaces.arch import make_arch
from qnas.spaces.blocks import BLOCKS, Place, module_of, register_block
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import count_macs, count_params, lower, make_block
from qnas.spaces.space import Candidate, SearchSpace, make_space, parse_space

pytestmark = pytest.mark.usefixtures("_registries")
IDENTITY = "  - {block: identity}\n"
GATES = "  - {block: gate, act: [relu6, relu], width: [2, 4]}\n"


def with_gates(entry: str = GATES) -> SearchSpace:
    return parse_space(TINY_SPACE.replace(IDENTITY, IDENTITY + entry), "tiny.yaml")


def test_a_registered_block_is_written_in_yaml_with_its_own_parameters() -> None:
    register_gate()
    space = with_gates()
    names = space.positions[0].names
    assert names[-4:] == ("gate_w2_relu6", "gate_w4_relu6", "gate_w2", "gate_w4")  # the default is not named
    again = parse_space(space.to_yaml(), "copy")
    assert (again, again.digest) == (space, space.digest)
    assert space.digest != with_gates("  - {block: gate, width: [2, 4]}\n").digest
    one, same = (with_gates(f"  - {{block: gate, width: 2{more}}}\n") for more in ("", ", act: relu"))
    assert one.digest == same.digest


def test_a_registered_block_is_counted_by_its_layers() -> None:
    register_gate()
    space = with_gates()
    gate, nothing = (
        lower(space, make_arch(space, (choice, *("identity",) * 3))) for choice in ("gate_w2", "identity")
    )
    assert count_params(gate) - count_params(nothing) == 8 * 16 + 16 + 16 * 8
    assert count_macs(gate) - count_macs(nothing) == 16**2 * 2 * 8 * 16
    assert gate[1].parameters == {"width": 2, "act": "relu"}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("width: 9", "candidates.width: expected at most 8, got 9"),
        ("width: two", "candidates.width: expected a whole number, got 'two'"),
        ("width: 2, act: gelu", "candidates.act: expected 'relu' or 'relu6', got 'gelu'"),
        ("act: relu", "candidates: gate needs width"),
        ("width: 2, kernel: 3", "candidates: gate takes no kernel (known: act, width)"),
    ],
)
def test_a_parameter_that_is_missing_or_not_allowed_is_refused(entry: str, problem: str) -> None:
    register_gate()
    with pytest.raises(SpaceError) as error:
        with_gates(f"  - {{block: gate, {entry}}}\n")
    assert str(error.value) == f"tiny.yaml: {problem}"


def test_a_block_that_is_not_registered_is_answered_with_what_to_do() -> None:
    with pytest.raises(SpaceError) as error:
        with_gates()
    assert str(error.value) == (
        "tiny.yaml: candidates.block: unknown block, got 'gate' (known: identity, mbconv, quadra, "
        "star, or one that a `plugin` registers first)"
    )


def chain(place: Place, width: int = 1) -> tuple[LayerSpec, ...]:
    c, px = place.c_in, place.resolution_px
    return (
        LayerSpec("conv", "conv", px, c, width * c),
        LayerSpec("back", "conv", px, width * c, place.c_out, 1, place.stride),
    )


def with_product(place: Place) -> tuple[LayerSpec, ...]:
    c, px = place.c_in, place.resolution_px
    return LayerSpec("conv", "conv", px, c, c), LayerSpec("product", "mul", px, c, c)


class NeedsMore(Gate):
    def __init__(self, c_in: int, width: int, act: str, depth: int) -> None:
        super().__init__(c_in, width, act)
        self.depth = depth


WIDTH: dict[str, Any] = {"parameters": {"width": (1, 2)}}
GATE: dict[str, Any] = {"parameters": {"width": (1, 2), "act": ("relu", "relu6")}}


@pytest.mark.parametrize(
    ("name", "definition", "options", "problem"),
    [
        ("quadra", chain, WIDTH, "block quadra: the name is taken"),
        ("Own-1", chain, WIDTH, "block Own-1: the name must be lower-case letters and digits, got 'Own-1'"),
        ("own", chain, {}, "block own: `layers` takes width, declared are none"),
        ("own", chain, {"parameters": {"width": (1.5,)}}, "block own: width: expected whole numbers from 0"),
        (
            "own",
            chain,
            {"parameters": {"width": (2, 3)}},
            "block own: default of width: expected 2 or 3, got 1",
        ),
        ("own", chain, {**WIDTH, "sliced": ["depth"]}, "block own: sliced: no parameter depth"),
        (
            "own",
            lambda place, norm="one": (),
            {"parameters": {"norm": ("one", "two")}},
            "block own: a parameter cannot be called norm",
        ),
        (
            "own",
            lambda place, norm="space": (),
            {"parameters": {"norm": ("space", "two")}},
            "block own: norm: expected words of layernorm, batchnorm or scale, got 'two'",
        ),
        ("own", with_product, {}, "block own: layer product (mul) cannot be in a chain"),
        ("own", lambda place: chain(place)[:1], {"keeps_shape": False}, "block own: its layers go from 8 "),
        ("own", lambda place: chain(place)[5:6], {"keeps_shape": False}, "block own: its layers go from 8 "),
        ("own", lambda place: 2 * chain(place), {}, "block own: two layers have one role among conv, back"),
        ("own", lambda place: place.width, {}, "block own: its layers cannot be made at Place("),
        ("own", NeedsMore, GATE, "block own: its module needs depth, known are c_in, c_out, stride, "),
        ("own", type("Bare", (), {}), {}, "block own: the class has no static method `layers(place, ...)`"),
    ],
)
def test_a_registration_that_does_not_fit_is_refused(
    name: str, definition: Any, options: dict[str, Any], problem: str
) -> None:
    before = dict(BLOCKS)
    with pytest.raises(SpaceError) as error:
        register_block(name, **options)(definition)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)
    assert before == BLOCKS


def test_a_registered_block_may_leave_its_norm_and_activation_to_the_candidate() -> None:
    def normed(place: Place, act: str = "space", norm: str = "space") -> tuple[LayerSpec, ...]:
        c, px = place.c_in, place.resolution_px
        return (
            LayerSpec("conv", "conv", px, c, c),
            LayerSpec("norm", place.norm, px, c, c),
            LayerSpec("act", place.activation, px, c, c),
        )

    words: dict[str, Any] = {"act": ("space", "relu"), "norm": ("space", "layernorm", "scale")}
    register_block("normed", parameters=words)(normed)
    place = Place(8, 8, 1, 9, "batchnorm", "gelu")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["conv", "batchnorm", "gelu"]),
        ({"norm": "scale"}, ["conv", "layerscale", "gelu"]),
        ({"norm": "layernorm", "act": "relu"}, ["conv", "layernorm", "relu"]),
    ]
    for given, ops in cases:
        block = make_block("1.1", "normed", place, **given)
        assert [layer.op for layer in block.layers] == ops
        assert block.place is not None
        assert [block.place.norm, block.place.activation] == ops[1:]
    register_gate()  # whose `act` has no word for that of the space
    block = make_block("1.1", "gate", place, width=2, act="relu6")
    assert block.place == place


def test_a_definition_can_be_registered_again_as_when_a_notebook_runs_its_cell() -> None:
    for _ in range(2):
        register_block("own", **WIDTH)(chain)
    assert BLOCKS["own"].layers is chain


def test_layers_that_do_not_fit_a_place_are_refused_where_they_are_made() -> None:
    def narrow(place: Place) -> tuple[LayerSpec, ...]:
        c = min(place.c_in, 20)
        return (LayerSpec("conv", "conv", place.resolution_px, c, c),)

    register_block("own")(narrow)
    with pytest.raises(
        SpaceError, match=r"^block own: its layers go from 20 channels at 9 px to 20 at 9 px, "
    ):
        make_block("1.1", "own", Place(32, 32, 1, 9, "batchnorm", "relu"))


def test_a_space_made_in_python_is_that_of_the_yaml_file() -> None:
    register_gate()
    content = yaml.safe_load(TINY_SPACE.replace(IDENTITY, IDENTITY + GATES))
    del content["schema"]
    made = make_space(content.pop("name"), **content)
    assert made == with_gates()
    assert make_space("tiny", **{**content, "candidates": made.candidates}) == made
    with pytest.raises(
        SpaceError, match=r"^space tiny: norm: expected 'layernorm' or 'batchnorm', got 'none'$"
    ):
        make_space("tiny", **{**content, "norm": "none"})


def test_a_candidate_is_within_another_of_its_kind_that_is_larger() -> None:
    small, wide, large = (
        Candidate(block="mbconv", kernel=k, expansion=e) for k, e in ((3, 3), (3, 6), (5, 3))
    )
    quadra = Candidate(block="quadra", kernel=5, expansion=6)
    assert small.is_within(wide)
    assert small.is_within(small)
    assert not wide.is_within(large)
    assert not small.is_within(quadra)


def raising(place: Place, width: int = 1) -> tuple[LayerSpec, ...]:
    raise ZeroDivisionError("no\nlayers " + 5000 * "x")


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("name", "definition", "options", "problem"),
    [
        ("own", raising, WIDTH, "block own_w1: its layers cannot be made at Place("),
        ("own", lambda place: [1], {}, "block own: `layers` returned [1], no tuple of LayerSpec"),
        ("own", lambda place: None, {}, "block own: `layers` returned None, no tuple of LayerSpec"),
        ("own", lambda place: (1,), {}, "block own: `layers` returned (1,), no tuple of LayerSpec"),
        ("own", lambda place: BadRepr(), {}, "block own: `layers` returned <BadRepr whose repr raises Run"),
        ("own", lambda: (), {}, "block own: `layers` takes no place"),
        ("own", 3, {}, "block own: 3 is no function or class, and has no static method `layers(place, ...)`"),
        ("own", int, {}, "block own: the class has no static method `layers(place, ...)`"),
        ("own", chain, {"parameters": {"width": 3}}, "block own: width: expected a collection of values"),
        ("own", chain, {"parameters": {"width": "12"}}, "block own: width: expected a collection of values"),
        ("own", chain, {"parameters": {"width": None}}, "block own: width: expected a collection of values"),
        ("own", chain, {"parameters": {3: (1, 2)}}, "block own: parameters: 3 is no name"),
        ("own" * 2000, chain, WIDTH, "block ownown"),
        ("\x1b[2J\n", chain, WIDTH, "block \\x1b[2J: the name must be lower-case letters and digits"),
    ],
)
def test_a_registration_with_other_things_is_refused_in_one_line(
    name: str, definition: Any, options: dict[str, Any], problem: str
) -> None:
    before = dict(BLOCKS)
    with pytest.raises(SpaceError) as error:
        register_block(name, **options)(definition)
    assert str(error.value).startswith(problem)
    check_refusal(error.value)
    assert before == BLOCKS


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"name": 3}, "`name=3`: expected text"),
        ({"name": None}, "`name=None`: expected text"),
        ({"parameters": 3}, "`parameters=3`: expected a mapping"),
        ({"parameters": ["width"]}, "`parameters=['width']`: expected a mapping"),
        ({"sliced": "width"}, "`sliced='width'`: expected names"),
        ({"sliced": 3}, "`sliced=3`: expected names"),
        ({"keeps_shape": 1}, "`keeps_shape=1`: expected True or False"),
        ({"needs_batchnorm": "no"}, "`needs_batchnorm='no'`: expected True or False"),
        ({"module": 3}, "`module=3`: expected a function, a class or its import path"),
        ({"module": BadRepr()}, "`module=<BadRepr whose repr raises RuntimeError>`: expected a function"),
    ],
)
def test_arguments_of_another_type_are_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as error:
        register_block(**{"name": "own", **arguments})(chain)
    assert str(error.value).startswith(problem)


def test_layers_that_raise_at_another_place_are_one_line() -> None:
    def small(place: Place) -> tuple[LayerSpec, ...]:
        assert place.c_in < 20, "too wide"
        return (LayerSpec("conv", "conv", place.resolution_px, place.c_in, place.c_out),)

    register_block("own")(small)
    with pytest.raises(SpaceError, match=r"^block own: its layers cannot be made at .* too wide"):
        make_block("1.1", "own", Place(32, 32, 1, 9, "batchnorm", "relu"))


@pytest.mark.parametrize(
    "path", ["nowhere:Block", "qnas.spaces.blocks:Nothing", "nothing", "", ":", "a..b:c"]
)
def test_a_module_that_cannot_be_imported_is_one_line(path: str) -> None:
    register_block("own", module=path)(with_product)
    with pytest.raises(SpaceError, match=r"^block own: module ") as error:
        module_of(BLOCKS["own"], Place(8, 8, 1, 9, "batchnorm", "relu"), {})
    check_refusal(error.value)
