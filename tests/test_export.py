import copy
import logging
import subprocess
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
from torch import Tensor, nn

import qnas.export
from qnas.arch import Arch, sample_arch
from qnas.blocks import QuadraBlock
from qnas.errors import ExportError
from qnas.export import TOLERANCE, ExportReport, export_onnx, fold_quadratic_norms
from qnas.space import load_space
from qnas.subnet import build_subnet
from qnas.train import recalibrate

PX = 32
METADATA = {"classes": '["zero", "größe"]', "mean": "[0.5]", "latency_ms": "29.9"}


def images(n: int, px: int = PX) -> Tensor:
    return torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(1))


def trained_like(
    space_name: str, seed: int, choices: tuple[str, ...] | None = None, px: int = PX
) -> nn.Module:
    """Build a random network whose norms have weights of their own and the images' statistics."""
    space = load_space(space_name)
    torch.manual_seed(seed)
    arch = Arch(choices) if choices else sample_arch(space, np.random.default_rng(seed))
    network = build_subnet(space, arch, 5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    n = 64 if px < 100 else 16
    recalibrate(network, network, [(images(n, px), torch.zeros(n))])
    return network


def export(network: nn.Module, path: Path, px: int = PX, n: int = 3) -> ExportReport:
    return export_onnx(network, path, channels=3, resolution_px=px, images=images(n, px), metadata=METADATA)


def run(path: Path, batch: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": batch.numpy()})
    return torch.from_numpy(logits)


def agree(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max()) <= 2 * TOLERANCE * float(expected.abs().max())


class Small(nn.Module):
    """A small network, quickly exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.conv(x).relu().mean((2, 3)))
        return y


@pytest.mark.parametrize("space", ["quadranet-small", "quadranet-mobile-bn", "proxyless-mobile"])
def test_the_file_computes_what_the_network_computes(space: str, tmp_path: Path) -> None:
    network = trained_like(space, seed=0)
    path = tmp_path / "model.onnx"
    report = export(network, path)
    batch = images(7) + 0.1
    with torch.no_grad():
        assert agree(run(path, batch), network(batch))
        assert agree(run(path, batch[:1]), network(batch[:1]))
    assert 0 <= report.max_difference <= TOLERANCE * report.scale
    assert report.inputs == 2 * (1 + 2 + 5)
    assert report.path == path
    assert report.size_bytes == path.stat().st_size


def _difference(space_name: str, px: int, seed: int, folder: Path) -> float:
    """Export a network; return how far the file is from it, as a share of the output's scale."""
    report = export(trained_like(space_name, seed, px=px), folder / f"{space_name}-{px}-{seed}.onnx", px)
    return report.max_difference / report.scale


@pytest.mark.slow
@pytest.mark.parametrize("px", [32, 64, 224])
@pytest.mark.parametrize(
    "space", ["quadranet-small", "quadranet-mobile", "quadranet-mobile-bn", "quadranet-gpu"]
)
def test_networks_of_every_space_export_at_every_resolution(space: str, px: int, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert _difference(space, px, seed, tmp_path) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("space", ["proxyless-mobile", "quadranet25-xxs"])
def test_networks_of_other_spaces_export(space: str, tmp_path: Path) -> None:
    assert _difference(space, 64, 1, tmp_path) <= TOLERANCE


def test_a_network_of_identities_exports(tmp_path: Path) -> None:
    space = load_space("quadranet-small")
    network = trained_like(space.name, 0, ("identity",) * len(space.positions))
    assert export(network, tmp_path / "model.onnx").inputs == 16


def test_the_file_is_one_graph_of_standard_operators_with_a_free_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export(trained_like("quadranet-mobile-bn", 1), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", report.opset)]
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


def test_the_file_says_what_the_network_needs_and_nothing_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(Small(), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == METADATA
    content = path.read_bytes()
    assert str(Path(qnas.export.__file__).parent).encode() not in content
    assert b"site-packages" not in content
    assert Path(__file__).name.encode() not in content


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    space = load_space("quadranet-mobile-bn")
    choices = (space.positions[0].names[0], *("identity",) * (len(space.positions) - 1))
    network = trained_like(space.name, 0, choices)
    network.train()
    network.get_submodule("head").eval()  # modes may differ within a network
    modes = {name: module.training for name, module in network.named_modules()}
    strides = {name: tensor.stride() for name, tensor in network.state_dict().items()}
    before = copy.deepcopy(network.state_dict())
    export(network, tmp_path / "model.onnx")
    after = network.state_dict()
    assert modes == {name: module.training for name, module in network.named_modules()}
    assert strides == {name: tensor.stride() for name, tensor in after.items()}
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_folding_a_norm_changes_no_output() -> None:
    torch.manual_seed(0)
    block = QuadraBlock(6, 5, 2, norm="batchnorm").double().eval()
    assert isinstance(block.norm1, nn.BatchNorm2d)
    for tensor in (*block.parameters(), block.norm1.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]  # running_mean is None only without statistics
    nn.init.uniform_(block.norm1.running_var, 0.5, 2.0)  # type: ignore[arg-type]  # as above
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        mixed = block.norm1(block.mix(x))
        assert 0.1 < float((mixed.abs() > 6).float().mean()) < 0.9  # on both sides of the clip
        expected = block(x)
        fold_quadratic_norms(block)
        torch.testing.assert_close(block.mix(x), mixed, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    assert isinstance(block.norm1, nn.Identity)
    assert isinstance(block.clip, nn.Hardtanh)


Disturb = Callable[[onnx.ModelProto], None]


def _wrong_bias(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "classifier.bias":
            array = onnx.numpy_helper.to_array(tensor) + np.float32(0.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _nan(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "classifier.bias":
            array = onnx.numpy_helper.to_array(tensor) * np.float32("nan")
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _frozen_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3


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
        (_wrong_bias, r"not written: for 1 images the file's logits differ from torch's by 0\.01"),
        (_nan, "differ from torch's by nan"),
        (_frozen_batch, "onnxruntime cannot run 1 images: "),
        (_custom_operator, "expected standard ONNX operators only, found com.microsoft"),
        (_missing_weight, "not a valid ONNX graph: "),
    ],
)
@pytest.mark.parametrize("stood_before", [None, b"an older file"])
def test_a_wrong_file_is_refused_and_what_stood_there_stays(
    disturb: Disturb,
    message: str,
    stood_before: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.onnx"
    if stood_before is not None:
        path.write_bytes(stood_before)
    right = qnas.export.trace_onnx

    def wrong(*args: Any) -> onnx.ModelProto:
        model = right(*args)
        disturb(model)
        return model

    monkeypatch.setattr(qnas.export, "trace_onnx", wrong)
    with pytest.raises(ExportError, match=message) as error:
        export(Small(), path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([stood_before] if stood_before else [])


def test_what_torch_cannot_export_is_refused_in_one_line(tmp_path: Path) -> None:
    class Unexportable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))

    with pytest.raises(ExportError, match=r"model\.onnx: torch cannot export this network: \w+") as error:
        export(Unexportable(), tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_network_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    network = Small()
    nn.init.constant_(network.classifier.bias, float("inf"))
    with pytest.raises(ExportError, match="the network's own logits are not finite numbers"):
        export(network, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_folding_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the file is compared with the network as it was before anything was folded
    space = load_space("quadranet-mobile-bn")
    choices = (space.positions[0].names[0], *("identity",) * (len(space.positions) - 1))

    def fold_wrongly(network: nn.Module) -> None:
        for block in network.modules():
            if isinstance(block, QuadraBlock):
                block.norm1 = nn.Identity()

    monkeypatch.setattr(qnas.export, "fold_quadratic_norms", fold_wrongly)
    with pytest.raises(ExportError, match="differ from torch's"):
        export(trained_like(space.name, 0, choices), tmp_path / "model.onnx")


def test_an_export_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        export(Small(), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == disabled


def test_the_file_runs_without_torch_and_qnas(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(Small(), path)
    code = (
        "import sys, numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        f"(y,) = session.run(None, {{'images': numpy.zeros((4, 3, {PX}, {PX}), numpy.float32)}})\n"
        "assert y.shape == (4, 5) and not {'torch', 'qnas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
