import copyreg
import functools
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pickled_forests import dump_old, train_forest
from helpers.places import FILES
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor

from qnas.common.errors import TableError
from qnas.latency.nn_meter.forests import Forest
from qnas.latency.nn_meter.pickles import PickleBounds, read_forest

DATA = FILES


def read(content: bytes, limits: PickleBounds | None = None) -> Forest:
    return read_forest(io.BytesIO(content), "x.pkl", limits)


def refused(content: bytes, limits: PickleBounds | None = None) -> str:
    with pytest.raises(TableError, match=r"^x\.pkl: ") as caught:
        read(content, limits)
    return str(caught.value)


# forests


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("options", [{}, {"oob_score": True, "bootstrap": True}, {"max_leaf_nodes": 5}])
@pytest.mark.filterwarnings("ignore:Some inputs do not have OOB scores")
def test_a_forest_of_todays_scikit_learn_predicts_the_same(protocol: int, options: dict[str, Any]) -> None:
    forest, x = train_forest(**options)
    np.testing.assert_allclose(read(pickle.dumps(forest, protocol)).predict(x), forest.predict(x), rtol=1e-12)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("n_features", [1, 2, 7])
def test_a_forest_of_the_old_layout_predicts_the_same(protocol: int, n_features: int) -> None:
    forest, x = train_forest(n_features)
    content = dump_old(forest, protocol)
    assert b"missing_go_to_left" not in content
    assert b"numpy._core" not in content
    found = read(content)
    assert found.n_features == n_features
    np.testing.assert_allclose(found.predict(x), forest.predict(x), rtol=1e-12)


def test_a_forest_that_scikit_learn_0_23_1_wrote_predicts_what_it_predicted() -> None:
    expected = json.loads((DATA / "forest-sklearn-0.23.1.json").read_text(encoding="utf-8"))
    forest = read((DATA / "forest-sklearn-0.23.1.pkl").read_bytes())
    np.testing.assert_allclose(forest.predict(expected["rows"]), expected["said"], rtol=1e-12)


def test_reading_holds_the_flat_forest_and_not_the_file() -> None:
    content = pickle.dumps(train_forest(trees=60, rows=1500)[0])
    tracemalloc.start()
    forest = read(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    flat = sum(array.nbytes for array in forest.arrays().values())
    assert flat < len(content) / 5
    assert peak < 4 * flat < len(content)


@pytest.mark.parametrize("model", [ExtraTreesRegressor, RandomForestClassifier])
def test_other_models_are_refused_by_name(model: Any) -> None:
    fitted = model(2).fit(np.arange(20.0).reshape(10, 2), np.arange(10) % 2)
    assert f"_forest.{model.__name__}'" in refused(pickle.dumps(fitted))


def test_a_forest_of_two_outputs_is_refused() -> None:
    x = np.arange(20.0).reshape(10, 2)
    assert "several outputs" in refused(pickle.dumps(RandomForestRegressor(2).fit(x, x)))


def test_a_forest_that_was_never_fitted_is_refused() -> None:
    assert "without trees" in refused(pickle.dumps(RandomForestRegressor()))
    values: list[Any] = [None, {}, [1], "text", 1.5, (1, 2)]
    for value in values:
        assert "no RandomForestRegressor" in refused(pickle.dumps(value))


# hostile pickles


class Call:
    """Pickles to a call."""

    def __init__(self, called: Callable[..., Any], *args: Any) -> None:
        self.call = (called, args)

    def __reduce__(self) -> Any:
        return self.call


def calls(marker: Path) -> dict[str, Call]:
    """Return calls that would leave a file, by what must be named in the refusal."""
    python = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(eval, python),
        "builtins.exec": Call(exec, python),
        "builtins.open": Call(open, str(marker), "w"),
        "builtins.getattr": Call(getattr, "", "join"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "numpy.load": Call(np.load, str(marker)),
        "functools.partial": Call(functools.partial, os.system, f"touch {marker}"),
        "operator.attrgetter": Call(operator.attrgetter, "system"),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {marker}"))),
        "numpy.fromfile": Call(np.fromfile, str(marker)),
        "numpy.ones": Call(np.ones, 10**12),
    }


NAMES = list(calls(Path("x")))


def is_named(name: str, message: str) -> bool:
    """Whether a refusal has the last part of a name: protocols and versions differ in its module."""
    return f".{name.rpartition('.')[2]}'" in message


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_refused_by_name_and_never_made(name: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "called"
    message = refused(pickle.dumps(calls(marker)[name], protocol))
    assert is_named(name, message)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["attribute", "tree", "list", "first"])
def test_a_call_inside_a_forest_is_refused_by_name_and_never_made(
    name: str, place: str, tmp_path: Path
) -> None:
    marker = tmp_path / "called"
    call = calls(marker)[name]
    forest, _ = train_forest()
    if place == "attribute":
        forest.verbose = call
    elif place == "tree":
        forest.estimators_[2].random_state = call
    elif place == "list":
        forest.estimators_.append(call)
    else:
        forest.__dict__ = {"_": call, **forest.__dict__}
    for content in (pickle.dumps(forest), dump_old(forest)):
        assert is_named(name, refused(content))
        assert not marker.exists()


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def dtype(code: str = "f8", order: str = "<", subtype: bytes = b"N", names: bytes = b"NN") -> bytes:
    head = b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R(K\x03" + text(order)
    return head + subtype + names + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"


def array(shape: bytes, content: bytes, of: bytes = b"", subclass: bytes = b"cnumpy\nndarray\n") -> bytes:
    start = b"cnumpy.core.multiarray\n_reconstruct\n" + subclass + b"K\x00\x85C\x01b\x87R"
    return start + b"(K\x01" + shape + (of or dtype()) + b"\x89" + content + b"tb"


def small(content: bytes) -> bytes:
    return b"C" + bytes([len(content)]) + content


def integer(value: int) -> bytes:
    content = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + content


# a struct of two members of one name
TWO_NAMES = text("a") * 2 + b"\x86}" + text("a") + dtype() + b"K\x00\x86s"


def test_the_parts_by_hand_are_what_the_refusals_below_change() -> None:
    right = b"\x80\x04" + array(b"K\x02\x85", small(bytes(16))) + b"."
    assert "no RandomForestRegressor" in refused(right)
    np.testing.assert_array_equal(pickle.loads(right), [0.0, 0.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array(integer(2**39) + b"\x85", small(bytes(16))), "its shape needs 4398046511104"),
        (array(integer(2**60) + b"\x85", small(bytes(16))), "unknown shape"),
        (array(integer(2**39) * 3 + b"\x87", small(bytes(16))), "its shape needs"),
        (array(integer(-1) + b"\x85", small(bytes(16))), "unknown shape"),
        (array(b"K\x03\x85", small(bytes(16))), "its shape needs 24"),
        (array(b"K\x02", small(bytes(16))), "unknown shape"),
        (array(b"(K\x01K\x01K\x01K\x01K\x02t", small(bytes(16))), "unknown shape"),
        (array(b"K\x02\x85", b"]"), "array of objects"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("O8", "|")), "'O8', expected plain numbers"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("O", "|")), "'O', expected plain numbers"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("U2")), "'U2'"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("V99999")), "'V99999'"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("f8", "?")), "dtype of an unknown form"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("f8", subtype=b"K\x01")), "dtype of an unknown form"),
        (array(b"K\x02\x85", small(bytes(16)), dtype("V8", "|")), "struct"),
        (array(b"K\x01\x85", small(bytes(8)), dtype("V8", "|", names=TWO_NAMES)), "names are no names"),
        (array(b"K\x02\x85", small(bytes(16)), b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R"), "before"),
        (array(b"K\x02\x85", small(bytes(16)), b"N"), "unknown dtype"),
        (array(b"K\x02\x85", small(bytes(16)), subclass=b"cnumpy\ndtype\n"), "another class"),
        (array(b"K\x02\x85", small(bytes(16)), subclass=b"cnumpy\nmatrix\n"), "numpy.matrix"),
        (array(b"K\x02\x85", small(bytes(16))) + b"N" + b"b", "unknown form|set twice"),
        (dtype() + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb", "set twice"),
        (b"cnumpy.core.multiarray\nscalar\n" + dtype() + small(bytes(7)) + b"\x86R", "another size"),
        (b"cnumpy\nndarray\n)R", "no known class"),
        (b"cnumpy\nndarray\n}b", "a state for something that has none"),
        (b"csklearn.ensemble._forest\nRandomForestRegressor\n}" + text("a") + b"K\x01sb", "a state for"),
        (b"csklearn.ensemble._forest\nRandomForestRegressor\n)R)b", "estimator"),
        (b"K\x01)R", "no known class"),
        (b"csklearn.tree._tree\nTree\nK\x02NK\x02\x87R", "several outputs"),
    ],
)
def test_arrays_and_objects_of_other_forms_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(TableError, match=message):
        read(b"\x80\x04" + content + b".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Pxyz\n.", "opcode b'P'"),
        (b"K\x01Q.", "opcode b'Q'"),
        (b"\x82\x01.", "opcode"),
        (b"\x83\x01\x00.", "opcode"),
        (b"\x84\x01\x00\x00\x00.", "opcode"),
        (b"(ios\nsystem\n.", "opcode b'i'"),
        (b"(cos\nsystem\nS'true'\no.", "os.system"),
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (text("os") + text("system") + b"\x93.", "os.system"),
        (text("sklearn.ensemble._forest") + text("warn") + b"\x93.", "_forest.warn"),
        (text("sklearn.tree._tree") + text("Tree.__class__") + b"\x93.", "Tree.__class__"),
        (text("numpy") + text("dtype.__class__") + b"\x93.", "dtype.__class__"),
        (b"cnumpy\ndtype\n)}\x92.", "opcode"),
        (b"\x97.", "opcode"),
        (b"I1\n.", "opcode b'I'"),
        (b"\x80\x06N.", "protocol: 6"),
        (b"\x00" * 100, "opcode"),
        (b"", "ends too soon"),
        (b".", "values left over"),
        (b"NN.", "values left over"),
        (b"(N.", "values left over"),
        (b"t.", "no valid pickle"),
        (b"R.", "no valid pickle"),
        (b"h\x05.", "no valid pickle: Memo value not found"),
        (b"q\x05.", "no valid pickle"),
        (b"}K\x01K\x01s.", "no text"),
        (b"}(K\x01u.", "no text"),
        (b"}(" + text("a") + b"u.", "no valid pickle"),
        (b"](" + text("a") + b"Nu.", "a dict"),
        (b"Na.", "no valid pickle"),
        (b"NNa.", "no attribute 'append'"),
        (b"\x8c\x02\xff\xff.", "utf-8"),
        (b"K\x01K\x02\x93.", "requires str"),
        (b"\x8b\x01\x00\x00\x00\x01.", "opcode"),
        (b"\x8f(K\x01\x90.", "opcode"),
        (b"]2.", "opcode b'2'"),
        (b"}a.", "no valid pickle"),
        (b"}]a.", "no attribute 'append'"),
        (b"c" + b"a" * 10_000, "too soon"),
    ],
)
def test_opcodes_that_no_forest_needs_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(TableError, match=message):
        read(content)


def test_the_extension_registry_is_not_asked(tmp_path: Path) -> None:
    copyreg.add_extension("posix", "system", 77)
    try:
        content = pickle.dumps(Call(os.system, f"touch {tmp_path / 'called'}"))
        assert b"\x82" + bytes([77]) in content
        assert "opcode" in refused(content)
    finally:
        copyreg.remove_extension("posix", "system", 77)
    assert not list(tmp_path.iterdir())


def test_a_named_module_is_not_imported() -> None:
    refused(b"cantigravity\nfly_far_away\n.")
    assert "antigravity" not in sys.modules


def test_bytes_after_the_end_are_refused() -> None:
    content = dump_old(train_forest()[0])
    assert "after its end" in refused(content + b"x")
    assert "after its end" in refused(content + content)


def test_a_pickle_that_ends_anywhere_is_refused() -> None:
    content = dump_old(train_forest(2, trees=2, rows=10)[0])
    for end in range(len(content)):
        refused(content[:end])


def test_damage_gives_a_forest_or_a_refusal_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    original = dump_old(train_forest(2, trees=2, rows=10)[0])
    survived = 0
    for _ in range(3000):
        content = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            found = read(bytes(content))
        except TableError:
            continue
        survived += 1
        assert np.all(np.isfinite(found.predict(np.ones((1, found.n_features)))))
    assert survived  # else the damage is never in a value


# bombs


def test_opcodes_are_bounded() -> None:
    assert "more than 1000 opcodes" in refused(b"]" + b"N" * 10_000, PickleBounds(opcodes=1000))


def test_values_nested_a_million_times_are_refused_without_harm() -> None:
    for nest in (b"\x85", b"\x85q\x00h\x00\x86"):
        assert "no RandomForestRegressor" in refused(b")" + nest * 200_000 + b".")
    assert "nested too deeply" in refused(b"(" * 1_000_000)
    assert "nested too deeply" in refused(b"](" * 1_000_000)
    lists = b"]" * 50_000 + b"a" * 49_999 + b"."
    assert "no RandomForestRegressor" in refused(lists)
    assert "no RandomForestRegressor" in refused(b"]q\x00h\x00a.")  # a list that holds itself


def test_too_many_values_are_refused() -> None:
    assert "too many values" in refused(b"N" * 1000, PickleBounds(stack=100))


def test_a_memo_number_takes_no_room() -> None:
    tracemalloc.start()
    assert "no RandomForestRegressor" in refused(b"Nr\xff\xff\xff\xff.")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x8d"])
def test_a_size_that_the_file_does_not_have_takes_no_room(opcode: bytes) -> None:
    tracemalloc.start()
    refused(opcode + struct.pack("<Q", 2**62))
    refused(opcode + struct.pack("<Q", 2**63 + 5))
    refused(b"B" + struct.pack("<I", 2**27))
    refused(b"X" + struct.pack("<I", 2**32 - 1))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_texts_are_bounded() -> None:
    assert "more than 1000 bytes of text" in refused(
        (b"X" + struct.pack("<I", 200) + bytes(200)) * 20, PickleBounds(all_text_bytes=1000)
    )
    assert "a text of 5000 bytes" in refused(b"X" + struct.pack("<I", 5000) + bytes(5000))


def test_arrays_that_are_held_are_bounded_and_those_of_trees_let_go() -> None:
    block = b"B" + struct.pack("<I", 6000) + bytes(6000)
    assert "held already" in refused(b"]" + (block + b"a") * 5 + b".", PickleBounds(held_bytes=20_000))
    forest, x = train_forest(trees=30, rows=200)
    content = pickle.dumps(forest)
    assert len(content) > 400_000
    np.testing.assert_allclose(read(content, PickleBounds(held_bytes=40_000)).predict(x), forest.predict(x))


def test_the_bytes_of_an_array_are_used_once() -> None:
    forest, _ = train_forest(trees=2, rows=200)
    forest.estimators_[1].tree_ = forest.estimators_[0].tree_  # a small file, and as large as one likes
    assert "a tree that occurs twice" in refused(pickle.dumps(forest))

    class Twice(pickle._Pickler):
        nodes: Any = None

        def reducer_override(self, value: Any) -> Any:
            if type(value).__name__ != "Tree":
                return NotImplemented
            make, args, state = value.__reduce__()
            self.nodes = state["nodes"] if self.nodes is None else self.nodes
            return make, args, {**state, "nodes": self.nodes}

    forest, _ = train_forest(trees=2, rows=200)
    content = io.BytesIO()
    Twice(content, 4).dump(forest)
    assert "used twice" in refused(content.getvalue())
