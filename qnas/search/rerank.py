"""The ranking of the best networks on images that no weight was trained on.

The search's scores order networks only roughly, since they add up what each position prefers by itself. So
the best networks within the limits are solved for, a few hundred if the search was long enough, and each is
run on one batch of held-out images with the supernet's weights: a sum of effects does not know which blocks
do well together. The preferred ones are evaluated on all held-out images, and the first of them is taken.
It is proven within the limits like the others, and keeps its rank among them.

The network of least loss is preferred, with one exception: among networks that the images cannot tell from
it, the one with the most parameters. A supernet trains its weights less for each network than the network's
own training will, and what that costs grows with the network's size; all are within the limits, so that size
costs nothing here. This rule chose better than held-out accuracy alone on CIFAR-10 and as well on
Fashion-MNIST at the budget it was chosen with, and no better at another one; among networks that do differ,
size says no more than the supernet does (benchmarks/RESULTS.md). The rule holds for both steps; one batch
leaves more networks undistinguished than all images.

A winner's held-out accuracy is high partly by luck: the figure to report is that on test images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qnas.data.image_data import ImageData, Split
from qnas.search.effects import Losses
from qnas.solver.solve import Solution
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import stream
from qnas.training.scoring import Classified, Score

SCREEN_IMAGES = 1024  # held-out, the same for all networks
# By which the mean difference of two networks' losses must exceed 0 for one to be the worse.
STANDARD_ERRORS = 2.0
Scorer = Callable[[Arch, Split], Classified]


@dataclass(frozen=True)
class Ranked:
    """One of the networks that were solved for, and its score on the held-out images."""

    solution: Solution
    arch: Arch
    heldout: Score
    params: int
    is_level: bool  # with the network of the least loss, as far as these images tell


def prefer(losses: Tensor, params: Sequence[int]) -> tuple[list[int], int]:
    """Return the indices of networks in order of preference, and how many are level with the best.

    losses: (networks, images) in nats. Networks are level whose loss exceeds the least by no more than
    `STANDARD_ERRORS` of the mean difference, image by image. They come first, those with the most
    parameters ahead; the others follow by their loss, as do equals.
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
