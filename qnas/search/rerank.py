"""The ranking of the best networks on held-out images, with the supernet's weights.

The search's scores are sums over positions and ignore how blocks work together. So many networks within the
limits are solved for, a few hundred in a long search, and each is run on one batch of held-out images. The
best of these are evaluated on all held-out images, and the first becomes the derived network. It is proven
within the limits like the others, and keeps its rank among them.

The network of least loss is preferred, with one exception: among networks whose losses the images cannot
distinguish from it, the one with the most parameters is taken. A supernet trains each network less than the
network's own training will, which costs larger networks more. This rule chose better than held-out accuracy
alone on CIFAR-10, as well on Fashion-MNIST at one budget, and no better at another (benchmarks/RESULTS.md).

The winner's held-out accuracy is too high by selection: the accuracy to report is that on test images.
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
# two networks differ if the mean difference of their losses exceeds so many standard errors
STANDARD_ERRORS = 2.0
Scorer = Callable[[Arch, Split], Classified]


@dataclass(frozen=True)
class Ranked:
    """A network within the limits, and its score on the held-out images."""

    solution: Solution
    arch: Arch
    heldout: Score
    params: int
    is_level: bool  # as accurate as the network of least loss, as far as these images tell


def prefer(losses: Tensor, params: Sequence[int]) -> tuple[list[int], int]:
    """Return the indices of networks in order of preference, and the number of equally accurate ones.

    losses: (networks, images) in nats. Networks are equally accurate whose loss exceeds the least by at most
    `STANDARD_ERRORS` of the mean difference, image by image. They come first, by their parameters, largest
    first, then by loss; the others follow by loss.
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
    """Return the `keep` best networks on one batch of held-out images, in the order of their scores.

    Nothing is run where there are no more than that. `on_screened` is called after each network.
    """
    if len(solutions) <= keep:
        return tuple(solutions)
    size = min(SCREEN_IMAGES, len(data.heldout))
    images, labels = next(stream(data.heldout, size, 0, 0, augment=False, device=device))
    found = []
    for solution in solutions:
        found.append(losses([solution.indices], images, labels))
        on_screened()
    sizes = [count_params(lower(space, arch)) for arch in _archs(space, solutions)]
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
    archs, scores = _archs(space, solutions), []
    for arch in archs:
        scores.append(score(arch, data.heldout))
        on_scored()
    sizes = [count_params(lower(space, arch)) for arch in archs]
    order, level = prefer(torch.stack([s.losses for s in scores]), sizes)
    return tuple(
        Ranked(solutions[i], archs[i], scores[i].score, sizes[i], is_level=place < level)
        for place, i in enumerate(order)
    )


def _archs(space: SearchSpace, solutions: Sequence[Solution]) -> list[Arch]:
    return [arch_from_indices(space, solution.indices) for solution in solutions]


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
