import re
from pathlib import Path

import pytest

from qnas.common.errors import ArchError, UsageError
from qnas.runs.network_prediction import predict_network, read_network


def test_a_missing_network_is_not_taken_for_a_space() -> None:
    with pytest.raises(ArchError, match=r"^runs/missing: no such run, file or space$"):
        predict_network("runs/missing", "cpu")


def test_a_resolution_is_for_files_only() -> None:
    with pytest.raises(
        UsageError, match=r"^`resolution_px=64`: for files of networks only, not for quadranet25-xxs$"
    ):
        read_network("quadranet25-xxs", resolution_px=64)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.py", "not run for a prediction: give the run's folder, or its model.onnx"),
        ("model_vpu.blob", "give the .onnx or .xml that it was compiled from"),
        ("model.pte", "give the run's folder, or its model.onnx"),
        ("model.bin", "give the .xml beside it"),
    ],
)
def test_a_file_without_a_graph_is_refused_with_the_one_to_give(
    name: str, advice: str, tmp_path: Path
) -> None:
    """A program would otherwise write a file."""
    file = tmp_path / name
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ArchError, match=re.escape(advice)):
        read_network(file)
    assert not (tmp_path / "ran").exists()
