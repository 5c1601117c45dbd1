"""Files for timing: what an export writes in each format and precision, with random weights."""

from pathlib import Path

import onnx
import pytest
import torch

from qnas.common.errors import UsageError
from qnas.deploy.export.formats import FORMATS
from qnas.deploy.export.quantisation import QUANTISED
from qnas.deploy.measurement import Here, measure_sample
from qnas.deploy.timed_files import TIMED_FORMATS, FileKind, write_timed
from qnas.latency.fitting.measurements import Measured, read_measured, write_measured
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

NETWORKS = (
    Measured("one", Arch(("quadra_k3_e2", "identity", "quadra_k3_e2", "identity"))),
    Measured("two", Arch(("quadra_k3_e2", "identity", "identity", "identity"))),
)
QUICK = [("onnx", "fp32"), ("onnx", "int8")]
ALL = [(name, precision) for name in TIMED_FORMATS for precision in FORMATS[name].precisions]


def kind_of(name: str, precision: str) -> FileKind:
    try:
        return FileKind(name, precision)  # type: ignore[arg-type]  # both are words here
    except UsageError as error:  # an extra is not installed
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow) for each in ALL],
)
def test_each_file_is_read_by_its_runtime(
    name: str, precision: str, tiny_space: SearchSpace, tmp_path: Path
) -> None:
    kind = kind_of(name, precision)
    write_timed(tiny_space, NETWORKS, tmp_path, kind, 0, quiet=True)
    expected = sorted(path.name for n in NETWORKS for path in kind.files(tmp_path, n.name))
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    px = tiny_space.input.resolution_px
    image = torch.randn(1, tiny_space.input.channels, px, px, generator=torch.Generator().manual_seed(0))
    logits = [FORMATS[name].load(kind.files(tmp_path, n.name)[0])(image) for n in NETWORKS]
    assert logits[0].shape == (1, tiny_space.head.classes)
    assert not torch.equal(*logits)


def test_every_layer_of_a_timed_file_is_in_int8(tiny_space: SearchSpace, tmp_path: Path) -> None:
    kind = FileKind("onnx", "int8")
    write_timed(tiny_space, NETWORKS[:1], tmp_path, kind, 0, quiet=True)
    (path,) = kind.files(tmp_path, "one")
    assert path.name == "one_int8.onnx"
    graph = onnx.load(path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in QUANTISED]
    assert len(layers) >= 5
    for node in layers:
        assert [made_by[name] for name in node.input[:2]] == ["DequantizeLinear", "DequantizeLinear"], (
            node.name
        )


def test_int8_files_are_timed_on_this_machine(tiny_space: SearchSpace, tmp_path: Path) -> None:
    csv, kind = tmp_path / "latencies.csv", FileKind("onnx", "int8")
    write_measured(csv, NETWORKS)
    done = measure_sample(csv, tiny_space, Here(), kind, repeats=5, tolerance=1e3, quiet=True)
    assert done.runtime.endswith(", onnx int8")
    for row in read_measured(csv, tiny_space):
        assert row.latency_ms
        assert (row.format, row.precision) == ("onnx", "int8")


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="`format='onx'`: did you mean onnx"):
        FileKind("onx")
    with pytest.raises(UsageError, match="format vpu has no int8"):
        FileKind("vpu", "int8")
