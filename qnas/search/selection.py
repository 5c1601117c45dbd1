"""The choice of a network after the last step of a search: effects, exact solve, screening, ranking.

The scores are sums over positions and ignore how blocks work together. Therefore, many networks within the
limits are solved for, a few hundred in a long search, and each is evaluated on one batch of held-out images.
The best of these are evaluated on all held-out images, and the first becomes the derived network. Like the
others, it is proven to be within the limits, and it keeps its proven rank by score.

The network of least loss is preferred, with one exception: among networks whose losses the images cannot
distinguish from it, the one with the most parameters is taken. A supernet trains each network less than
training it alone would, which costs larger networks more. This rule chose better than held-out accuracy
alone on CIFAR-10, equally well on Fashion-MNIST at one budget, no better at another (benchmarks/RESULTS.md).

The winner's held-out accuracy is biased upwards by the selection: report the accuracy on test images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnas.common.progress import Display, silent
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import GivenData
from qnas.runs.finished_run import FinishedRun, check_rankable
from qnas.search.ablation import BATCHES, CHECKED, count_changes, measure_changes
from qnas.search.effects import (
    IMAGES,
    NETWORKS_PER_EFFECT,
    Effects,
    Losses,
    count_effects,
    draw_networks,
    measure_effects,
)
from qnas.search.evaluator import Evaluator, SavedSupernet, evaluator_of, load_saved_supernet
from qnas.search.paths import whole_network
from qnas.search.problem import Problem
from qnas.search.sizes import scaled_px
from qnas.search.state import SearchState
from qnas.solver.solve import CandidateIndices, Scores, Solution, solve_best
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.family import Layout
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import stream
from qnas.training.losses import LossFunction
from qnas.training.scoring import Classified, Score

# Weight steps for each network that is measured for the effects. Its forward pass over up to 128 images takes
# at most two thirds of a weight step of the presets, so measuring adds at most a sixth to a search.
STEPS_PER_NETWORK = 4
# The same for screened networks, with up to 1,024 images.
STEPS_PER_SCREENED = 32
SCREENED_PER_RANKED = 16
SCREEN_IMAGES = 1024  # held-out, the same for all networks
# two networks differ if the mean difference of their losses exceeds this many standard errors
STANDARD_ERRORS = 2.0

Scorer = Callable[[Arch, Split], Classified]


@dataclass(frozen=True)
class Ranked:
    """A network within the limits, and its score on the held-out images."""

    solution: Solution
    arch: Arch
    heldout: Score
    params: int
    is_level: bool  # tied with the network of least loss, which these images cannot distinguish from it


@dataclass(frozen=True)
class Selection:
    """The best networks of a search, and the scores that they were solved for."""

    effects: Effects | None  # None: the scores are the log probabilities
    scores: Scores
    ranking: tuple[Ranked, ...]  # the k best networks on held-out images; the first is the derived one


def select(state: SearchState, display: Display = silent) -> Selection:
    """Select the best networks of a finished search within its limits, leaving its state unchanged."""
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
    """Return the number of networks to draw for measuring the candidates' effects."""
    asked = problem.config.effect_networks
    if asked is not None:
        return asked
    choices = 0 if problem.family is None else problem.family.family.choices
    needed = NETWORKS_PER_EFFECT * (count_effects(problem.space) + choices)
    return min(needed, problem.schedule.total_steps // STEPS_PER_NETWORK)


def count_screened(problem: Problem) -> int:
    """Return the number of networks to solve for."""
    config = problem.config
    if config.screened is not None:
        return max(config.screened, config.k_best)
    most = min(SCREENED_PER_RANKED * config.k_best, problem.schedule.total_steps // STEPS_PER_SCREENED)
    return max(most, config.k_best)


def effects_of(
    state: SearchState, evaluator: Evaluator, on_measured: Callable[[int], None] = lambda _: None
) -> Effects | None:
    """Measure what each candidate adds to the held-out loss; None as in `measure_effects`.

    Where weight steps train the whole network alone, it is changed at one position at a time
    (`search.ablation`). The state stays unchanged, so a second call returns the same.
    """
    problem = state.problem
    if problem.config.weight_steps == "whole":
        return effects_of_changes(state, evaluator, on_measured)
    split, seed = problem.data.heldout, problem.config.seed + 2  # draws differ from those of the steps
    return measure_effects(
        problem.space,
        problem.limits,
        # not sharpened by the temperature, so that decided positions vary as well
        state.log_probabilities_at(1.0),
        evaluator.losses,
        stream(split, min(IMAGES, len(split)), seed, 0, augment=False, device=evaluator.device),
        count_effect_networks(problem),
        np.random.default_rng(seed),
        on_measured,
    )


def effects_of_changes(
    state: SearchState, evaluator: Evaluator, on_measured: Callable[[int], None] = lambda _: None
) -> Effects | None:
    """Measure what changes of the whole network add to its held-out loss; None where none is asked for."""
    problem, asked = state.problem, count_effect_networks(state.problem)
    if not asked:
        return None
    whole, rng = whole_network(problem), np.random.default_rng(problem.config.seed + 2)
    checked = draw_networks(problem.limits, state.log_probabilities_at(1.0), CHECKED, rng)
    batches = measured_batches(problem, evaluator)
    return measure_changes(problem.space, whole, evaluator.losses, batches, checked, on_measured)


def measured_batches(problem: Problem, evaluator: Evaluator) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of held-out images that changes are measured on; one in a short search."""
    split = problem.data.heldout
    size = min(IMAGES, len(split))
    asked = count_effect_networks(problem) // count_changes(problem.space, whole_network(problem))
    batches = stream(split, size, problem.config.seed + 2, 0, augment=False, device=evaluator.device)
    return [next(batches) for _ in range(max(1, min(BATCHES, asked, len(split) // size)))]


def rerank_saved(
    run: FinishedRun,
    solutions: Sequence[Solution],
    keep: int | None = None,
    *,
    data: GivenData | None = None,
    loss: LossFunction | None = None,
    display: Display = silent,
) -> tuple[Ranked, ...]:
    """Rank networks with the supernet in the folder of a finished search, on the data of the search.

    More than `keep` networks are screened first. Losses are lowered by what the search's finalists showed of
    the networks' kinds of blocks. Raises the errors of `load_saved_supernet` and `check_rankable`.
    """
    check_rankable(run.folder, run.config)
    px = None if run.family is None else trained_px_of(run, run.family.layout)
    evaluator = supernet_of(run, data, loss).evaluator(run.space, px)
    keep = keep or len(solutions)
    space, images, device, lower_by = run.space, evaluator.data, evaluator.device, run.searched.correction
    with display(len(solutions) + (keep if len(solutions) > keep else 0), "rank") as progress:
        step = progress.step
        screened = screen(space, solutions, images, evaluator.losses, keep, device, step, lower_by)
        return rerank(space, screened, images, evaluator.classify, step, lower_by)


def supernet_of(
    run: FinishedRun, data: GivenData | None = None, loss: LossFunction | None = None
) -> SavedSupernet:
    """Return the supernet of a finished search. Raises the errors of `load_saved_supernet`."""
    digest = run.document.get("supernet_sha256")
    return load_saved_supernet(run.folder, run.config, run.space, data, loss, digest)


def trained_px_of(run: FinishedRun, layout: Layout) -> int:
    """Return the size of the images of a layout in a search over a family."""
    assert run.family is not None
    largest_px = max(run.family.family.resolutions_px)
    return scaled_px(run.config["search"]["resolution_px"], layout.resolution_px, largest_px)


def prefer(losses: Tensor, params: Sequence[int]) -> tuple[list[int], int]:
    """Return the indices of networks in order of preference, and the number of tied networks.

    losses: (networks, images) in nats. A network is tied with that of least loss if its mean loss is higher
    by at most `STANDARD_ERRORS` standard errors of the difference, image by image. Tied networks come first,
    ordered by parameters, largest first, then by loss; the others follow in order of loss.
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
    lower_by: Callable[[CandidateIndices], float] = lambda _: 0.0,
) -> tuple[Solution, ...]:
    """Return the `keep` best networks on one batch of held-out images, in the order of their scores.

    If there are at most `keep` networks, none is evaluated. `on_screened` is called after each network.
    `lower_by` is what each network's losses are lowered by, in nats.
    """
    if len(solutions) <= keep:
        return tuple(solutions)
    size = min(SCREEN_IMAGES, len(data.heldout))
    images, labels = next(stream(data.heldout, size, 0, 0, augment=False, device=device))
    found = []
    for solution in solutions:
        found.append(losses([solution.indices], images, labels) - lower_by(solution.indices))
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
    lower_by: Callable[[CandidateIndices], float] = lambda _: 0.0,
) -> tuple[Ranked, ...]:
    """Return the networks in the order of `prefer` on all held-out images.

    `on_scored` is called after each network. `lower_by` is as in `screen`; scores are the images' own.
    """
    archs, scores = _archs(space, solutions), []
    for arch in archs:
        scores.append(score(arch, data.heldout))
        on_scored()
    sizes = [count_params(lower(space, arch)) for arch in archs]
    losses = [s.losses - lower_by(each.indices) for s, each in zip(scores, solutions, strict=True)]
    order, level = prefer(torch.stack(losses), sizes)
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
            "heldout_balanced_accuracy": r.heldout.balanced_accuracy,
            "heldout_loss": r.heldout.loss,
            "level": r.is_level,
            "params": r.params,
            "amounts": [limit.amount(r.solution.indices) for limit in r.solution.limits],
        }
        for r in ranked
    ]
