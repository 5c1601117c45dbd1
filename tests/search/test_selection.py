from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qnas.common.errors import CheckpointError, QnasWarning
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.subnet import build_subnet
from qnas.runs.names import SUPERNET_FILE
from qnas.runs.tensors import load_supernet, save_supernet
from qnas.search.evaluator import Evaluator, load_saved_supernet
from qnas.search.selection import SCREEN_IMAGES, prefer, ranking_document, rerank, screen
from qnas.solver.limits import latency_limit
from qnas.solver.solve import CandidateIndices, Solution, solve_best
from qnas.spaces.arch import Arch, arch_from_indices, sample_arch
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.losses import CROSS_ENTROPY
from qnas.training.scoring import Classified

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


def classified(losses: Tensor, right: int) -> Classified:
    labels = torch.zeros(len(losses), dtype=torch.int64)
    predicted = (torch.arange(len(losses)) >= right).long()
    return Classified(labels, predicted, torch.ones(len(losses)), predicted == labels, losses)


def five_best(space: SearchSpace) -> tuple[Solution, ...]:
    table = compute_table(load_device("vpu"), space)
    scores = tuple(
        tuple(-0.1 * (i + 1) * j for j in range(len(p.names))) for i, p in enumerate(space.positions)
    )
    return solve_best(space, scores, (latency_limit(table, table.slowest_ms),), 5)


def test_of_networks_that_images_cannot_tell_from_the_best_the_largest_is_preferred() -> None:
    base = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    swing = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(200)  # standard error of its mean: 0.05
    losses = torch.stack([base, base + 0.09 + swing, base + 0.11 + swing, base + 0.001, base + 0.002])
    # the second is 1.8 standard errors above the least, the third 2.2; the last two are surely above it,
    # if by little: each image says so
    assert prefer(losses, [10, 50, 60, 70, 80]) == ([1, 0, 3, 4, 2], 2)
    assert prefer(losses, [50, 10, 60, 70, 80]) == ([0, 1, 3, 4, 2], 2)
    assert prefer(losses[:2], [50, 50]) == ([0, 1], 2)
    assert prefer(losses[[1, 0]], [50, 50]) == ([1, 0], 2)
    assert prefer(losses[:, :1], [10, 50, 60, 70, 80])[0][0] in range(5)
    # what all networks find hard makes none of them alike
    hard = 100 * torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert prefer(losses + hard, [10, 50, 60, 70, 80]) == ([1, 0, 3, 4, 2], 2)


def test_networks_are_ranked_by_all_heldout_images_and_by_their_parameters(
    tiny_space: SearchSpace, digits: ImageData
) -> None:
    solutions = five_best(tiny_space)
    sizes = [count_params(lower(tiny_space, arch_from_indices(tiny_space, s.indices))) for s in solutions]
    images = len(digits.heldout)
    least = min(range(5), key=sizes.__getitem__)  # which is surely the best, whatever its size
    noise = torch.rand(5, images, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for lead, first in ((0.0, max(range(5), key=sizes.__getitem__)), (1.0, least)):
        losses = 5 + noise
        losses[least] -= lead
        said = [classified(row, 10 * (i + 1)) for i, row in enumerate(losses)]
        score = Mock(side_effect=said)
        ranked = rerank(tiny_space, solutions, digits, score)
        assert [call.args[1].name for call in score.call_args_list] == ["heldout"] * 5
        assert ranked[0].solution == solutions[first]
        order, level = prefer(losses, sizes)
        assert [r.solution for r in ranked] == [solutions[i] for i in order]
        assert [r.is_level for r in ranked] == [place < level for place in range(5)]
        assert (level == 1) is (lead > 0)
        document = ranking_document(ranked)
        for entry, i in zip(document, order, strict=True):
            assert entry["rank"] == solutions[i].rank
            assert entry["heldout_accuracy"] == 10 * (i + 1) / images
            assert entry["heldout_loss"] == pytest.approx(float(losses[i].mean()))
            assert entry["params"] == sizes[i]
            assert entry["score"] == solutions[i].score
            assert entry["amounts"] == [solutions[i].latency_ms]
            assert Arch(tuple(entry["choices"])).indices(tiny_space) == solutions[i].indices


def test_networks_to_prefer_by_one_batch_are_kept_by_their_score(
    tiny_space: SearchSpace, digits: ImageData
) -> None:
    solutions = five_best(tiny_space)
    by_network = dict(zip((s.indices for s in solutions), [0.5, 0.2, 0.9, 0.1, 0.3], strict=True))
    batches: list[Tensor] = []

    def losses(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        batches.append(images)
        assert len(images) == len(labels) == min(SCREEN_IMAGES, len(digits.heldout))
        return torch.tensor([[by_network[network]] * len(images) for network in networks])

    assert [s.rank for s in screen(tiny_space, solutions, digits, losses, 3, CPU)] == [2, 4, 5]
    assert len(batches) == 5
    assert all(torch.equal(images, batches[0]) for images in batches)
    assert screen(tiny_space, solutions, digits, losses, 5, CPU) == solutions
    assert len(batches) == 5

    def alike(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(len(networks), len(images))

    largest = sorted(
        solutions, key=lambda s: -count_params(lower(tiny_space, arch_from_indices(tiny_space, s.indices)))
    )
    chosen = screen(tiny_space, solutions, digits, alike, 2, CPU)
    assert chosen == tuple(sorted(largest[:2], key=lambda s: s.rank))


def test_batch_norms_are_measured_anew_before_a_network_is_scored(
    tiny_space: SearchSpace, digits: ImageData
) -> None:
    space = tiny_space.with_norm("batchnorm")
    arch = sample_arch(space, np.random.default_rng(0))
    network = build_subnet(space, arch, 10)
    evaluator = Evaluator(digits, CPU, CROSS_ENTROPY, lambda arch: network, Mock())
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    found = []
    for mean in (0.0, 100.0):
        for norm in norms:
            assert norm.running_mean is not None
            norm.running_mean.fill_(mean)
        found.append(evaluator.classify(arch, digits.heldout))
    assert torch.equal(found[0].losses, found[1].losses)
    assert len(found[0].losses) == len(digits.heldout)
    assert not network.training


def test_without_a_supernet_there_is_nothing_to_rank_by(tiny_space: SearchSpace, tmp_path: Path) -> None:
    config = {"search": {"resolution_px": 8}, "data": "digits", "data_digest": ""}
    with pytest.raises(CheckpointError, match=r"supernet\.safetensors: no such file"):
        load_saved_supernet(tmp_path, config, tiny_space)


def test_a_supernet_whose_weights_lie_elsewhere_is_refused(tiny_space: SearchSpace, tmp_path: Path) -> None:
    path, state = tmp_path / SUPERNET_FILE, {"alpha": torch.ones(2)}
    save_supernet(path, state)
    assert torch.equal(load_supernet(path)["alpha"], state["alpha"])
    for metadata, said in ((None, "an early one"), ({"schema": "qnas.supernet/1"}, "qnas.supernet/1")):
        save_file(state, path, metadata)
        with (
            pytest.warns(QnasWarning, match="without a digest"),
            pytest.raises(CheckpointError, match=rf"from another version of qnas \({said}, .*search again"),
        ):
            load_supernet(path)
    path.write_bytes(b"{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_supernet(path)
