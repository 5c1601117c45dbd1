from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qnas.arch import Arch, sample_arch
from qnas.data import ImageData, Split, load_data
from qnas.derive import Indices, Solution, solve_best
from qnas.errors import CheckpointError
from qnas.latency.device import load_device
from qnas.latency.table import compute_table
from qnas.limits import latency_limit
from qnas.originals import parse_data_spec
from qnas.rerank import SCREEN_IMAGES, ranking_document, rerank, rerank_saved, score_subnet, screen
from qnas.space import SearchSpace
from qnas.subnet import build_subnet
from qnas.train import Score

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


def five_best(space: SearchSpace) -> tuple[Solution, ...]:
    table = compute_table(load_device("vpu"), space)
    scores = tuple(
        tuple(-0.1 * (i + 1) * j for j in range(len(p.names))) for i, p in enumerate(space.positions)
    )
    return solve_best(space, scores, (latency_limit(table, table.slowest_ms),), 5)


def test_the_winner_has_the_highest_accuracy_on_heldout_images_and_of_equals_the_best_score(
    tiny_space: SearchSpace, digits: ImageData
) -> None:
    solutions = five_best(tiny_space)
    accuracies = iter([0.5, 0.7, 0.9, 0.9, 0.6])
    seen: list[Split] = []

    def score(arch: Arch, split: Split) -> Score:
        seen.append(split)
        return Score(next(accuracies), 1.0, len(split))

    ranked = rerank(tiny_space, solutions, digits, score)
    assert [r.solution.rank for r in ranked] == [3, 4, 2, 5, 1]
    assert [split.name for split in seen] == ["heldout"] * 5
    document = ranking_document(ranked)
    assert [entry["rank"] for entry in document] == [3, 4, 2, 5, 1]
    assert document[0]["heldout_accuracy"] == 0.9
    assert document[0]["score"] == solutions[2].score
    assert document[0]["amounts"] == [solutions[2].latency_ms]
    assert Arch(tuple(document[0]["choices"])).indices(tiny_space) == solutions[2].indices


def test_networks_of_least_loss_on_one_batch_are_kept_by_their_score(
    tiny_space: SearchSpace, digits: ImageData
) -> None:
    solutions = five_best(tiny_space)
    by_network = dict(zip((s.indices for s in solutions), [0.5, 0.2, 0.9, 0.1, 0.3], strict=True))
    batches: list[Tensor] = []

    def losses(networks: Sequence[Indices], images: Tensor, labels: Tensor) -> list[float]:
        batches.append(images)
        assert len(images) == len(labels) == min(SCREEN_IMAGES, len(digits.heldout))
        return [by_network[network] for network in networks]

    assert [s.rank for s in screen(solutions, digits, losses, 3, CPU)] == [2, 4, 5]
    assert len(batches) == 5
    assert all(torch.equal(images, batches[0]) for images in batches)
    assert screen(solutions, digits, losses, 5, CPU) == solutions
    assert len(batches) == 5


def test_batch_norms_are_measured_anew_before_a_network_is_scored(
    tiny_space: SearchSpace, digits: ImageData
) -> None:
    space = tiny_space.with_norm("batchnorm")
    network = build_subnet(space, sample_arch(space, np.random.default_rng(0)), 10)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    found = []
    for mean in (0.0, 100.0):
        for norm in norms:
            assert norm.running_mean is not None
            norm.running_mean.fill_(mean)
        found.append(score_subnet(network, digits, digits.heldout, CPU))
    assert found[0] == found[1]
    assert found[0].images == len(digits.heldout)
    assert not network.training


def test_without_a_supernet_there_is_nothing_to_rank_by(tiny_space: SearchSpace, tmp_path: Path) -> None:
    config = {"search": {"resolution_px": 8}, "data": "digits", "data_digest": ""}
    with pytest.raises(CheckpointError, match=r"supernet\.safetensors: no such file"):
        rerank_saved(tmp_path, config, tiny_space, five_best(tiny_space))
