from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import compute_table
from qnas.runs.found_arch import FoundArch
from qnas.spaces.arch import sample_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import PLAIN
from qnas.training.evaluation import accuracy_facts, measure_speed, share, size_facts
from qnas.training.scoring import classify


def batches(count: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Images that are their own logits."""
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(count, classes, generator=rng), torch.arange(count) % (classes - 1)
    return list(zip(logits.chunk(4), labels.chunk(4), strict=True))


def test_every_class_is_counted_by_its_true_label() -> None:
    given = batches(100, 10)
    logits, labels = (torch.cat(part) for part in zip(*given, strict=True))
    found = classify(lambda x: x, given)
    facts = accuracy_facts(found, [f"class {k}" for k in range(10)])
    order = logits.argsort(1, descending=True)
    for k in range(10):
        row, images = facts["per_class"][k], int((labels == k).sum())
        assert row["images"] == images
        if images:
            right = sum(int(o[0]) == k for o, y in zip(order, labels, strict=True) if y == k)
            assert row["value"] == right / images
        assert int(found.among_top[labels == k].sum()) == sum(k in o[:5].tolist() for o in order[labels == k])
    assert facts["per_class"][9] == {"class": "class 9", "images": 0}, "a class without images has no share"
    assert facts["top1"]["value"] == found.score.accuracy < facts["top5"]["value"]


def test_few_classes_have_no_top_5() -> None:
    found = classify(lambda x: x, batches(20, 5))
    assert accuracy_facts(found, list("abcde"))["top5"] is None


@pytest.mark.parametrize(("count", "of"), [(0, 30), (30, 30), (27, 30), (9300, 10_000)])
def test_the_interval_is_wilsons(count: int, of: int) -> None:
    """The shares whose distance from what was seen is 1.96 of their own standard deviations."""
    found = share(count, of)
    z = 1.959964
    centre = (count + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * np.sqrt(count * (of - count) / of + z * z / 4)
    assert found["value"] == count / of
    assert found["low"] == pytest.approx(max(centre - half, 0), abs=1e-6)
    assert found["high"] == pytest.approx(min(centre + half, 1), abs=1e-6)


def test_size_and_latencies_are_those_of_the_deployed_network(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    arch = sample_arch(tiny_space, np.random.default_rng(0))
    limits = [{"name": "mine", "unit": "ms", "amount": 3.5}, {"name": "params", "unit": "", "amount": 9}]
    facts = size_facts(FoundArch(tiny_space, arch, {"limits": limits}, tmp_path))
    blocks = lower(tiny_space, arch)
    assert (facts["macs"], facts["params"]) == (count_macs(blocks), count_params(blocks))
    assert set(facts["latency"]) == {*device_names(), "mine"}
    assert facts["latency"]["mine"]["ms"] == 3.5, "as it was searched for"
    table = compute_table(load_device("vpu"), tiny_space)
    assert facts["latency"]["myriad-vpu"]["ms"] == table.latency_ms(arch.indices(tiny_space))


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.randn(300, 300) @ torch.randn(300, 300)
        return x.mean((2, 3))


def test_the_speed_is_images_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(1000) / 4.0)  # a pass takes a quarter of a second
    monkeypatch.setattr("qnas.training.evaluation.time.perf_counter", lambda: next(clock))
    found = measure_speed(Slow(), replace(PLAIN), 3, 8)
    assert found["images_per_second"] == pytest.approx(found["batch_size"] / 0.25)
