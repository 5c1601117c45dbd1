from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qnas.common.errors import UsageError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.blocks import QuadraBlock
from qnas.search.config import SearchConfig
from qnas.search.searcher import Searcher
from qnas.solver.limits import latency_limit
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import (
    PLAIN,
    Acceleration,
    choose_acceleration,
    compile_blocks,
)
from qnas.training.optimizer import make_optimizer, weight_step

CPU = torch.device("cpu")

CONFIG = SearchConfig(
    preset="test",
    resolution_px=8,
    warmup_epochs=0,
    search_epochs=2,
    batch_size=128,
    learning_rate=2e-3,
    arch_learning_rate=0.05,
    arch_every=2,
    torch_device="cpu",
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_without_a_gpu_it_is_the_cpu_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_acceleration("auto", "auto") == PLAIN == Acceleration(CPU, torch.float32)
    assert choose_acceleration("cpu", "bf16").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="finds no CUDA device here"):
        choose_acceleration("cuda", "auto")


def test_with_a_gpu_it_is_that_in_the_best_16_bits_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch, (9, 0))
    assert choose_acceleration("auto", "auto", 1) == Acceleration(torch.device("cuda", 1), torch.bfloat16)
    assert choose_acceleration("cuda", "fp32").dtype == torch.float32
    assert choose_acceleration("cpu", "auto") == PLAIN
    with pytest.raises(UsageError, match="process 2 of this machine has no GPU, as there are 2"):
        choose_acceleration("auto", "auto", 2)
    pretend_a_gpu(monkeypatch, (7, 5))
    assert choose_acceleration("auto", "auto").dtype == torch.float16
    with pytest.raises(UsageError, match="Some GPU has no bfloat16: choose `precision='fp16'` or"):
        choose_acceleration("auto", "bf16")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="`torch_device`: expected 'auto', 'cpu' or 'cuda', got 'tpu'"):
        CONFIG.override({"torch_device": "tpu"})
    with pytest.raises(
        UsageError, match="`precision`: expected 'auto', 'fp32', 'bf16' or 'fp16', got 'int8'"
    ):
        CONFIG.override({"precision": "int8"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_16_bits_is_nearly_that_in_32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 3))
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(0, 3, (8,))
    seen: list[torch.dtype] = []
    network[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    moments = []
    for acceleration in (PLAIN, Acceleration(CPU, dtype)):
        optimizer = make_optimizer(network.parameters(), 0.0, 0.0)
        scaler = acceleration.scaler()
        loss = weight_step(network, optimizer, images, labels, 0.1, acceleration=acceleration, scaler=scaler)
        assert loss.dtype == torch.float32
        moments.append([optimizer.state[weight]["exp_avg"].clone() for weight in network.parameters()])
    assert seen == [torch.float32, dtype]
    for moment, expected in zip(*reversed(moments), strict=True):
        assert float((moment - expected).norm()) < 0.02 * float(expected.norm())


def test_a_step_whose_scaled_gradient_overflows_is_skipped_and_the_scale_lowered() -> None:
    weight = nn.Parameter(torch.eye(3))
    optimizer, acceleration = make_optimizer([weight], 0.1, 0.0), Acceleration(CPU, torch.float16)
    scaler = acceleration.scaler()
    images, labels = 1e4 * torch.ones(2, 3), torch.tensor([0, 1])  # times a scale of 65536 beyond float16
    before = scaler.get_scale()
    weight_step(
        lambda x: x @ weight, optimizer, images, labels, 0.0, acceleration=acceleration, scaler=scaler
    )
    assert torch.equal(weight, torch.eye(3))
    assert scaler.get_scale() < before


def test_architecture_steps_are_never_in_float16() -> None:
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        with Acceleration(CPU, dtype).autocast_unscaled():
            assert F.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "bf16", "weights": "shared", "gradient": "all-paths"},
        {"precision": "bf16", "weights": "nested"},
    ],
    ids=str,
)
def test_a_search_in_16_bits_goes_the_way_of_one_in_32(
    changes: dict[str, Any], tiny_space: SearchSpace, digits: ImageData
) -> None:
    table = compute_table(load_device("cpu"), tiny_space)
    limits = (latency_limit(table, 0.5 * (table.fastest_ms + table.slowest_ms)),)

    def losses(config: SearchConfig) -> list[float]:
        searcher = Searcher(tiny_space, limits, digits, config)
        return [searcher.step()["loss"] for _ in range(6)]

    low, full = (
        losses(CONFIG.override({**changes})),
        losses(CONFIG.override({**{**changes, "precision": "fp32"}})),
    )
    assert low == pytest.approx(full, rel=0.02)
    assert low != full


def test_compiling_asks_for_each_block_and_leaves_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    blocks = [QuadraBlock(8, 3, 2), QuadraBlock(8, 5, 2)]
    network = nn.Sequential(blocks[0], nn.ModuleList(blocks[1:]))
    names = list(network.state_dict())
    compile_blocks(network)
    assert compiled == blocks
    assert list(network.state_dict()) == names
