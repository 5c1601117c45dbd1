import inspect

import qnas.common.errors as errors
from qnas.common.errors import LIST_CHARACTERS, QnasError, abbreviate, nearest


def test_the_nearest_name_comes_first() -> None:
    assert nearest("vpo", ["cpu", "vpu"]) == "did you mean vpu? known: cpu, vpu"
    assert nearest("quadranet-smal", ["x", "quadranet-small", "quadranet-gpu"]).startswith(
        "did you mean quadranet-small"
    )


def test_all_names_are_shown_where_none_is_near() -> None:
    assert nearest("zzz", {"b": 1, "a": 2}) == "known: a, b"


def test_every_kind_of_error_can_be_caught_as_a_qnas_error() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    assert len(kinds) >= 9
    # that the user stopped is no error: its state is saved
    others = {kind for kind in kinds if not issubclass(kind, QnasError)}
    assert others <= {errors.Interrupted, errors.QnasWarning}


def test_the_list_of_known_names_has_an_end() -> None:
    assert len(nearest("zzz", [f"name{i}" for i in range(1000)])) < 210
    assert len(nearest("name1" * 10_000, [f"name{i}" for i in range(1000)])) < 300


def test_a_list_shows_what_a_line_has_room_for_and_counts_the_rest() -> None:
    assert abbreviate(["a", "b"]) == "a, b"
    text = abbreviate([f"problem {i} " + 150 * "x" for i in range(1000)], "; ", most=1000)
    assert text.startswith("problem 0 x")
    assert text.endswith("; and 996 more")
    assert len(text) < LIST_CHARACTERS + 20
    assert abbreviate(["a\x1b[2J\nb"]) == "a\\x1b[2J b"
