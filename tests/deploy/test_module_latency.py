"""A module is priced as the ONNX file that torch exports of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from qnas.common.errors import ArchError, TableError, UsageError
from qnas.deploy.module_latency import predict_module, trace_module
from qnas.latency.own_latency import device_from_function
from qnas.runs.network_prediction import predict_network

PLAIN = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 5),
)


def export(module: nn.Module, image: Tensor, path: Path) -> Path:
    torch.onnx.export(module.eval(), (image,), str(path), dynamo=True, verbose=False)
    return path


@pytest.mark.parametrize(("module", "px"), [(PLAIN, 32), (mobilenet_v2(weights=None), 64)])
def test_a_module_takes_what_its_exported_file_takes(module: nn.Module, px: int, tmp_path: Path) -> None:
    image = torch.zeros(1, 3, px, px)
    by_hand = predict_network(export(module, image, tmp_path / "a.onnx"), "cpu")
    module.train()
    prediction = predict_module(module, image.expand(2, -1, -1, -1), "cpu")
    assert prediction.latency_ms == by_hand.latency_ms > 0
    assert [part.what for part in prediction.parts] == [part.what for part in by_hand.parts]
    assert prediction.note == ""
    assert module.training


class Nonzero(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.nonzero(images)


def test_unknown_operators_are_counted_in_the_note() -> None:
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cumsum(images, 2).sin()

    prediction = predict_module(Odd(), torch.zeros(1, 3, 8, 8), "cpu")
    assert prediction.note == "uncovered, each priced as a pass over its map: CumSum (1), Sin (1)"
    assert prediction.coverage < 1


def test_a_function_of_layers_prices_a_module() -> None:
    counted = device_from_function("counted", layer=lambda kernel: 1.0)
    prediction = predict_module(PLAIN, torch.zeros(1, 3, 32, 32), counted)
    assert prediction.latency_ms == len(prediction.parts)
    with pytest.raises(TableError, match="no model"):
        predict_module(PLAIN, torch.zeros(1, 3, 32, 32), device_from_function("b", block=lambda _: 1.0))


def test_messages_name_the_module_and_not_a_temporary_file() -> None:
    with pytest.raises(UsageError, match=r"module Sequential: expected a batch .* got shape \(3, 32, 32\)"):
        trace_module(PLAIN, torch.zeros(3, 32, 32))
    with pytest.raises(ArchError, match=r"^module Nonzero: the shape of") as error:
        trace_module(Nonzero(), torch.zeros(1, 3, 8, 8))
    assert "module.onnx" not in str(error.value)
