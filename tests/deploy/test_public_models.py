"""Public models are read without weights, and cost what rivals and modules of the same networks cost."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

import qnas
from qnas.common.errors import ArchError, ExportError, QnasWarning, UsageError
from qnas.deploy.module_latency import trace_module
from qnas.deploy.public_models import read_public_model
from qnas.latency.device import load_device
from qnas.latency.prediction import DEVICE, predict_file
from qnas.latency.public_networks import public_networks
from qnas.latency.rivals import price_public_networks

# One of each of the larger families, the smallest at 224 px.
FAMILIES = (
    *("resnet18", "mobilenetv3_small_050", "convnext_atto", "lcnet_035", "regnetx_002", "repghostnet_050"),
    *("tf_efficientnet_lite0", "mixnet_s", "starnet_s1", "tf_mobilenetv3_small_minimal_100"),
)


def position(name: str, px: int) -> int:
    networks = public_networks().networks
    return next(i for i, n in enumerate(networks) if (n.name, n.resolution_px) == (name, px))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_model_of_torchvision_takes_what_its_module_takes(name: str) -> None:
    found = read_public_model(f"torchvision:{name}", resolution_px=64)
    module = trace_module(models.get_model(name), torch.zeros(1, 3, 64, 64))
    assert found.macs == module.macs
    assert (found.height_px, found.width_px, found.channels) == (64, 64, 3)
    assert found.path == Path(f"torchvision:{name}")
    device = load_device("vpu")
    expected = predict_file(DEVICE, device, module).latency_ms
    assert predict_file(DEVICE, device, found).latency_ms == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "name", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def test_a_model_of_timm_takes_what_its_rival_takes(name: str) -> None:
    pytest.importorskip("timm")
    i = position(name, 224)
    for device in ("vpu", "cpu", "a100"):
        rival = price_public_networks(load_device(device))[i]
        assert qnas.predict(f"timm:{name}", device, resolution_px=224).latency_ms == pytest.approx(
            rival.latency_ms, rel=0.03
        )


def test_a_model_has_its_own_resolution() -> None:
    assert read_public_model("torchvision:squeezenet1_1").height_px == 224
    if pytest.importorskip("timm"):
        assert read_public_model("timm:test_resnet").height_px == 160


def test_a_model_that_cannot_be_built_without_numbers_is_built_with_them() -> None:
    """RegNet rounds its widths with tensors, which have no numbers on the meta device."""
    found = read_public_model("torchvision:regnet_x_400mf", resolution_px=32)
    assert found.macs > 0
    assert found.stand_ins


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("torchvision:resnet19", ArchError, "torchvision has no classifier 'resnet19': did you mean resnet1"),
        ("torchvision:fcn_resnet50", ArchError, "no classifier 'fcn_resnet50'"),
        ("torchvision:vit_b_16", ExportError, "vit_b_16 at 64 px: torch cannot record its operators"),
    ],
)
def test_what_is_no_model_is_named(target: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_public_model(target, resolution_px=64)


def test_an_unknown_model_of_timm_is_named() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ArchError, match="timm has no model 'resnet19x': did you mean"):
        read_public_model("timm:resnet19x")


def test_without_timm_a_rival_has_its_shipped_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.warns(QnasWarning, match="timm:resnet18: timm is not installed: its operators are those"):
        found = read_public_model("timm:resnet18")
    assert found.macs == public_networks().networks[position("resnet18", 224)].macs
    with pytest.raises(
        UsageError, match=r"needs timm: pip install 'quadranet-nas\[timm\]'; known without it at"
    ):
        read_public_model("timm:resnet18", resolution_px=100)
    with pytest.raises(UsageError, match=r"needs timm: pip install 'quadranet-nas\[timm\]'$"):
        read_public_model("timm:vit_tiny_patch16_224")


def test_a_resolution_is_for_files_and_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for files and public models only"):
        qnas.predict(torch.nn.ReLU(), "vpu", resolution_px=32)
