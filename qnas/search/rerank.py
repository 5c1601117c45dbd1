"""Which of the best networks is the best on images that no weight was trained on.

The search's scores order networks only roughly: they sum what each position prefers by itself. So the best
networks within the limits are solved for, a few hundred where the search was long enough for that, and each
is run on one batch of held-out images with the supernet's weights: a sum of effects does not know which
blocks do well together. Those to prefer are evaluated on all held-out images, and the first of them by
these is taken. It is proven within the limits like the others; its rank among them stays with it.

To prefer is the network of least loss, but for this: of networks that the images cannot tell from it the one
with the most parameters. A supernet's weights are trained less for each network than the network's own will
be, and what that costs grows with its size; all are within the limits, so that size costs nothing here. It
chose better than held-out accuracy alone on CIFAR-10 and as well on Fashion-MNIST at the budget it was chosen
with, and no better at another one; of networks that do differ, size says no more than the supernet does
(benchmarks/RESULTS.md). The same holds in both steps; by one
batch more networks are level than by all images.

Held-out accuracies of such a winner are high by luck too: the figure to report is that on test images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.common.errors import DataError
from qnas.data.broken_images import MAX_BROKEN
from qnas.data.images import ImageData, Split, batches, load_data
from qnas.data.sources import parse_data_spec
from qnas.nn.subnet import build_subnet, subnet_state
from qnas.runs.finished_run import check_rankable
from qnas.runs.names import SUPERNET_FILE
from qnas.runs.tensors import load_supernet
from qnas.search.effects import Losses
from qnas.solver.solve import CandidateIndices, Solution
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import choose_acceleration
from qnas.training.loop import stream
from qnas.training.scoring import (
    CALIBRATION_BATCHES,
    ImageScores,
    Score,
    batch_statistics,
    evaluate_images,
    recalibrate,
)
from qnas.training.subnet_trainer import load_weights

SCREEN_IMAGES = 1024  # held-out, the same for all networks
# By which the mean difference of two networks' losses must exceed 0 for one to be the worse.
STANDARD_ERRORS = 2.0
Scorer = Callable[[Arch, Split], ImageScores]


@dataclass(frozen=True)
class Ranked:
    """One of the networks that were solved for, and how well it does on the held-out images."""

    solution: Solution
    arch: Arch
    heldout: Score
    params: int
    is_level: bool  # with the network of the least loss, as far as these images tell


def score_subnet(network: nn.Module, data: ImageData, split: Split, device: torch.device) -> ImageScores:
    """Evaluate a network with a supernet's weights, its batch norms first measured on training images.

    The network is moved to the device and put into evaluation mode.
    """
    network = network.to(device).eval()
    train = batches(data.train, 128, seed=0, device=device)
    first = (batch for batch, _ in zip(train, range(CALIBRATION_BATCHES), strict=False))
    recalibrate(network, network, first)
    return evaluate_images(network, batches(split, 256, device=device))


def prefer(losses: Tensor, params: Sequence[int]) -> tuple[list[int], int]:
    """Return the places of networks in the order in which they are taken, and how many are level.

    losses: (networks, images) in nats. Level are those whose loss is not above the least by more than
    `STANDARD_ERRORS` of the mean difference, image by image. They come first, those of most parameters
    ahead; the others follow by their loss, as do equals.
    """
    means = losses.mean(1)
    above = losses - losses[means.argmin()]
    errors = above.std(1, correction=0) / losses.shape[1] ** 0.5
    level = (above.mean(1) <= STANDARD_ERRORS * errors).tolist()
    rows = zip(level, params, means.tolist(), strict=True)
    keys = [(not same, -size if same else 0, loss) for same, size, loss in rows]
    return sorted(range(len(keys)), key=keys.__getitem__), sum(level)


def screen(
    space: SearchSpace,
    solutions: Sequence[Solution],
    data: ImageData,
    losses: Losses,
    keep: int,
    device: torch.device,
    on_screened: Callable[[], None] = lambda: None,
) -> tuple[Solution, ...]:
    """Return the networks to prefer by one batch of held-out images, `keep` of them, by their score.

    All where there are no more; nothing is run then. `on_screened` is called after each network.
    """
    if len(solutions) <= keep:
        return tuple(solutions)
    size = min(SCREEN_IMAGES, len(data.heldout))
    images, labels = next(stream(data.heldout, size, 0, 0, augment=False, device=device))
    found = []
    for solution in solutions:
        found.append(losses([solution.indices], images, labels))
        on_screened()
    sizes = [_count_params(space, solution) for solution in solutions]
    order, _ = prefer(torch.cat(found), sizes)
    return tuple(solutions[i] for i in sorted(order[:keep]))


def rerank(
    space: SearchSpace,
    solutions: Sequence[Solution],
    data: ImageData,
    score: Scorer,
    on_scored: Callable[[], None] = lambda: None,
) -> tuple[Ranked, ...]:
    """Return the networks as `prefer` orders them by all held-out images.

    `on_scored` is called after each network.
    """
    scores = []
    for solution in solutions:
        scores.append(score(arch_from_indices(space, solution.indices), data.heldout))
        on_scored()
    sizes = [_count_params(space, solution) for solution in solutions]
    order, level = prefer(torch.stack([s.losses for s in scores]), sizes)
    return tuple(
        Ranked(
            solutions[i],
            arch_from_indices(space, solutions[i].indices),
            scores[i].score,
            sizes[i],
            is_level=place < level,
        )
        for place, i in enumerate(order)
    )


def _count_params(space: SearchSpace, solution: Solution) -> int:
    return count_params(lower(space, arch_from_indices(space, solution.indices)))


def ranking_document(ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """Return a ranking as JSON values, the winner first."""
    return [
        {
            "choices": list(r.arch.choices),
            "rank": r.solution.rank,
            "score": r.solution.score,
            "heldout_accuracy": r.heldout.accuracy,
            "heldout_loss": r.heldout.loss,
            "level": r.is_level,
            "params": r.params,
            "amounts": [limit.amount(r.solution.indices) for limit in r.solution.limits],
        }
        for r in ranked
    ]


def rerank_saved(
    folder: Path,
    config: Mapping[str, Any],
    space: SearchSpace,
    solutions: Sequence[Solution],
    keep: int | None = None,
    on_scored: Callable[[], None] = lambda: None,
) -> tuple[Ranked, ...]:
    """Rank networks by the supernet that a finished search left in its folder, on the data it searched on.

    Where there are more than `keep` they are screened first; `on_scored` is called after each network, once
    or twice. `config` is the folder's config.json. Raises CheckpointError where it lacks what a ranking
    needs or the supernet is missing or damaged, DataError where the data are, or are others than they were.
    """
    check_rankable(folder, config)
    path = folder / SUPERNET_FILE
    tensors = load_supernet(path)
    searched = config["search"]
    data = load_data(
        parse_data_spec(config["data"]),
        resolution_px=searched["resolution_px"],
        channels=space.input.channels,
        max_broken=config.get("max_broken", MAX_BROKEN),
        quiet=True,
    )
    if data.digest != config["data_digest"]:
        raise DataError(f"{config['data']}: not the images that {folder} was searched on")
    device = choose_acceleration("auto", "auto").device

    def build(arch: Arch) -> nn.Module:
        network = build_subnet(space, arch, len(data.classes))
        load_weights(network, subnet_state(tensors, space, arch), path)
        return network

    def score(arch: Arch, split: Split) -> ImageScores:
        return score_subnet(build(arch), data, split, device)

    @torch.no_grad()
    def losses(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        found = []
        for indices in networks:
            network = build(arch_from_indices(space, indices)).to(device).eval()
            with batch_statistics(network):
                found.append(F.cross_entropy(network(images), labels, reduction="none"))
        return torch.stack(found).double().cpu()

    screened = screen(space, solutions, data, losses, keep or len(solutions), device, on_scored)
    return rerank(space, screened, data, score, on_scored)
