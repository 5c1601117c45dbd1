import copy
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.exported import PX, digits, trained
from torch import Tensor, nn

import qnas.deploy.export.tracing
from qnas.common.errors import ExportError
from qnas.deploy.export.opset import TRACED_OPSET
from qnas.deploy.export.tracing import check_form, trace_onnx


class Small(nn.Module):
    """A small network, quickly exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.conv(x).relu().mean((2, 3)))
        return y


def trace(network: nn.Module) -> onnx.ModelProto:
    return trace_onnx(network, (3, PX, PX), "model.onnx")


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_the_graph_computes_what_the_network_computes_at_any_batch_size(norm: str) -> None:
    network = trained(norm).network
    session = onnxruntime.InferenceSession(
        trace(network).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for size in (1, 3, 7):
        images = digits(16).take(range(size))
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = network(images)
        assert np.abs(logits - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())


def test_it_is_one_graph_of_standard_operators_with_a_free_batch() -> None:
    model = trace(trained("batchnorm").network)
    check_form(model, "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", TRACED_OPSET)]
    assert not model.functions
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    (given,), (made,) = model.graph.input, model.graph.output
    shape = given.type.tensor_type.shape.dim
    assert (given.name, made.name) == ("images", "logits")
    assert shape[0].dim_param
    assert [dim.dim_value for dim in shape[1:]] == [3, PX, PX]
    # batch normalisation is folded away and the clips are there, as the latency tables count
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("BatchNormalization") == 0
    assert operators.count("Clip") == operators.count("Mul") > 0


def test_it_says_nothing_of_this_machine() -> None:
    content = trace(trained().network).SerializeToString()
    assert str(Path(qnas.__file__).parent).encode() not in content
    assert b"site-packages" not in content
    assert Path(__file__).name.encode() not in content


def test_the_network_is_left_as_it_was() -> None:
    network = copy.deepcopy(trained("batchnorm").network)
    strides = {name: tensor.stride() for name, tensor in network.state_dict().items()}
    before = copy.deepcopy(network.state_dict())
    trace(network)
    after = network.state_dict()
    assert strides == {name: tensor.stride() for name, tensor in after.items()}
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_torch_cannot_export_is_refused_in_one_line() -> None:
    class Unexportable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.linalg.eigvalsh(x[:, 0])  # which ONNX has no operator for
            return y

    with pytest.raises(ExportError, match=r"model\.onnx: torch cannot export this network: \w+") as error:
        trace(Unexportable())
    assert "\n" not in str(error.value)


def _custom_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "QuickGelu", "com.microsoft"


def _missing_weight(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (_custom_operator, "expected standard ONNX operators only, found com.microsoft"),
        (_missing_weight, "not a valid ONNX graph: "),
    ],
)
def test_a_graph_of_another_form_is_refused(disturb: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = trace(Small())
    disturb(model)
    with pytest.raises(ExportError, match=f"^here: {message}") as error:
        check_form(model, "here")
    assert "\n" not in str(error.value)


def test_an_export_says_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = torch.onnx.export

    def chatter(*args: Any, **options: Any) -> Any:
        print("exporting")
        print("exporting", file=sys.stderr)
        warnings.warn("exporting", stacklevel=2)
        logging.getLogger("torch.onnx").error("exporting")
        return quiet(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", chatter)
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Small())
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == disabled


def test_the_tests_get_the_graph_of_the_network_that_they_ask_for() -> None:
    """Torch's exporter is replaced in tests (helpers/traced.py)."""
    torch.manual_seed(0)
    network = Small().eval()
    first = trace(network)
    before = first.SerializeToString()
    first.graph.node.clear()
    assert trace(copy.deepcopy(network)).SerializeToString() == before
    with torch.no_grad():
        network.classifier.bias.add_(1)
    others = [trace(network), trace_onnx(network, (3, PX, PX), "model.onnx", batch=1)]
    network.conv.padding = (0, 0)
    others.append(trace(network))
    assert len({before, *(model.SerializeToString() for model in others)}) == 4
