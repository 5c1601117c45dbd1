import inspect

import qnas.common.errors as errors
from qnas.common.errors import QnasError, nearest


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
