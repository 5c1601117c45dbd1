"""Latencies of networks from Python."""

from pathlib import Path

import onnx
import pytest
from helpers.onnx_graphs import convolutions

import qnas
from qnas.common.errors import ArchError, UsageError


def test_an_onnx_file_that_leaves_the_image_size_open_takes_a_resolution(tmp_path: Path) -> None:
    model, path = convolutions(), tmp_path / "free.onnx"
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "size"
    onnx.save(model, path)
    with pytest.raises(ArchError, match="give a resolution"):
        qnas.predict(path, "cpu")
    small, large = (qnas.predict(path, "cpu", resolution_px=px).latency_ms for px in (32, 64))
    assert 0 < small < large


def test_other_networks_have_their_own_resolution() -> None:
    with pytest.raises(UsageError, match=r"^`resolution_px=64`: for files of networks only"):
        qnas.predict("quadranet25-xxs", "cpu", resolution_px=64)
    with pytest.raises(UsageError, match=r"^`resolution_px=0`: expected a whole number from 1$"):
        qnas.predict("quadranet25-xxs", "cpu", resolution_px=0)
