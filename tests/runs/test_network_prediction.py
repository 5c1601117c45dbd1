import pytest

from qnas.common.errors import ArchError
from qnas.runs.network_prediction import predict_network


def test_a_missing_network_is_not_taken_for_a_space() -> None:
    with pytest.raises(ArchError, match=r"^runs/missing: no such run, file or space$"):
        predict_network("runs/missing", "cpu")
