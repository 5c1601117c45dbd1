"""The choice of a network after the last step of a search: effects, exact solve, screening, ranking.

The scores are sums over positions and ignore how blocks work together. So many networks within the
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

import numpy as np
import torch
from torch import Tensor

from qnas.common.progress import Display, silent
from qnas.data.given import GivenData
from qnas.data.image_data import ImageData, Split
from qnas.runs.finished_run import FinishedRun, check_rankable
from qnas.search.effects import IMAGES, NETWORKS_PER_EFFECT, Effects, Losses, count_effects, measure_effects
from qnas.search.evaluator import Evaluator, evaluator_of, saved_evaluator
from qnas.search.problem import Problem
from qnas.search.state import SearchState
from qnas.solver.solve import Scores, Solution, solve_best
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import stream
from qnas.training.losses import LossFunction
from qnas.training.scoring import Classified, Score

# Weight steps for each network that effects are measured by: its pass forward of up to 128 images is at most
# two thirds of a step of the presets, so that measuring adds at most a sixth to a search.
STEPS_PER_NETWORK = 4
# The same of screened networks, of up to 1,024 images.
STEPS_PER_SCREENED = 32
SCREENED_PER_RANKED = 16
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


@dataclass(frozen=True)
class Selection:
    """The best networks of a search, and the scores that they were solved for."""

    effects: Effects | None  # None: the scores are the log probabilities
    scores: Scores
    ranking: tuple[Ranked, ...]  # the k best networks by held-out images; the first is the derived one


def select(state: SearchState, display: Display = silent) -> Selection:
    """Select the best networks of a finished search within its limits. The state stays as it is."""
    problem, evaluator = state.problem, evaluator_of(state)
    space, data, keep = problem.space, problem.data, problem.config.k_best
    with display(count_effect_networks(problem), "measure") as progress:
        effects = effects_of(state, evaluator, progress.step_by)
    scores = effects.scores if effects else state.log_probabilities
    solutions = solve_best(space, scores, problem.limits, count_screened(problem))
    if len(solutions) > keep:
        with display(len(solutions), "screen") as progress:
            device, step = evaluator.device, progress.step
            solutions = screen(space, solutions, data, evaluator.losses, keep, device, step)
    with display(len(solutions), "rank") as progress:
        ranking = rerank(space, solutions, data, evaluator.classify, progress.step)
    return Selection(effects, scores, ranking)


def count_effect_networks(problem: Problem) -> int:
    """Return how many networks are drawn to measure the candidates' effects."""
    asked = problem.config.effect_networks
    if asked is not None:
        return asked
    needed = NETWORKS_PER_EFFECT * count_effects(problem.space)
    return min(needed, problem.schedule.total_steps // STEPS_PER_NETWORK)


def count_screened(problem: Problem) -> int:
    """Return how many networks are solved for."""
    config = problem.config
    if config.screened is not None:
        return max(config.screened, config.k_best)
    most = min(SCREENED_PER_RANKED * config.k_best, problem.schedule.total_steps // STEPS_PER_SCREENED)
    return max(most, config.k_best)


def effects_of(
    state: SearchState, evaluator: Evaluator, on_measured: Callable[[int], None] = lambda _: None
) -> Effects | None:
    """Measure what each candidate adds to the held-out loss; None where that cannot be told.

    The state stays as it is, so that a second call returns the same.
    """
    problem = state.problem
    split, seed = problem.data.heldout, problem.config.seed + 2  # other draws than those of the steps
    return measure_effects(
        problem.space,
        problem.limits,
        # before a temperature sharpens them: settled positions are to vary as well
        state.log_probabilities_at(1.0),
        evaluator.losses,
        stream(split, min(IMAGES, len(split)), seed, 0, augment=False, device=evaluator.device),
        count_effect_networks(problem),
        np.random.default_rng(seed),
        on_measured,
    )


def rerank_saved(
    run: FinishedRun,
    solutions: Sequence[Solution],
    keep: int | None = None,
    *,
    data: GivenData | None = None,
    loss: LossFunction | None = None,
    display: Display = silent,
) -> tuple[Ranked, ...]:
    """Rank networks by the supernet that a finished search left in its folder, on the data it searched on.

    More than `keep` are screened first. Raises as `saved_evaluator` and `check_rankable`.
    """
    check_rankable(run.folder, run.config)
    evaluator = saved_evaluator(run.folder, run.config, run.space, data, loss)
    keep = keep or len(solutions)
    space, images, device = run.space, evaluator.data, evaluator.device
    with display(len(solutions) + (keep if len(solutions) > keep else 0), "rank") as progress:
        screened = screen(space, solutions, images, evaluator.losses, keep, device, progress.step)
        return rerank(space, screened, images, evaluator.classify, progress.step)


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
