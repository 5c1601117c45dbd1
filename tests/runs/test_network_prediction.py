import pytest

from qnas.common.errors import ArchError, UsageError
from qnas.runs.network_prediction import predict_network, read_network


def test_a_missing_network_is_not_taken_for_a_space() -> None:
    with pytest.raises(ArchError, match=r"^runs/missing: no such run, file or space$"):
        predict_network("runs/missing", "cpu")


def test_a_resolution_is_for_onnx_files_only() -> None:
    with pytest.raises(
        UsageError, match=r"^`resolution_px=64`: for files of networks only, not for quadranet25-xxs$"
    ):
        read_network("quadranet25-xxs", resolution_px=64)
