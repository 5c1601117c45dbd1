"""Which releases of the runtimes read a file: its opset, and the version of the format that holds it."""

import onnx
import pytest
from helpers.exported import trained

from qnas.deploy.export import onnx_format
from qnas.deploy.export.formats import FORMATS
from qnas.deploy.export.opset import OLDEST_OPSET, TRACED_OPSET, readers
from qnas.deploy.export.product import FilePrecision, Variant

OPSETS = range(OLDEST_OPSET, TRACED_OPSET + 1)
# opset -> the version of the format in the first onnx release that has it, by onnx itself
IR_VERSIONS = {row[2]: row[1] for row in reversed(onnx.helper.VERSION_TABLE)}


@pytest.mark.parametrize(("opset", "precision"), [(None, "fp32"), (13, "int8")])
def test_a_file_is_as_old_as_its_opset(opset: int | None, precision: FilePrecision) -> None:
    model = onnx_format.graph_of(trained(), Variant(precision, opset), "file")
    assert [entry.version for entry in model.opset_import] == [opset or TRACED_OPSET]
    assert model.ir_version <= IR_VERSIONS[opset or TRACED_OPSET]


def test_a_file_says_from_which_release_on_a_runtime_reads_it() -> None:
    runs_on = FORMATS["onnx"].runs_on
    assert not isinstance(runs_on, str)
    assert runs_on(Variant()) == readers(TRACED_OPSET)
    assert runs_on(Variant(opset=13)) == readers(13) != readers(TRACED_OPSET)
    assert "onnxruntime 1.6 or newer" in readers(13)
    for name in ("onnxruntime", "TensorRT", "OpenVINO"):
        firsts = [readers(opset).split(f"{name} ")[1].split()[0] for opset in OPSETS]
        assert firsts == sorted(firsts, key=lambda text: [int(part) for part in text.split(".")]), name


def test_tensorrt_is_named_for_symmetric_int8_alone() -> None:
    runs_on = FORMATS["onnx"].runs_on
    assert not isinstance(runs_on, str)
    assert "TensorRT 10.0 or newer" in runs_on(Variant("int8", symmetric=True))
    assert "TensorRT 10.0" not in runs_on(Variant("int8"))
    assert "not TensorRT" in runs_on(Variant("int8"))
