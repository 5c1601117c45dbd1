"""The choice of a network after the last step of a search: effects, exact solve, screening, ranking."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qnas.common.progress import Display, silent
from qnas.data.given import GivenData
from qnas.runs.finished_run import FinishedRun, check_rankable
from qnas.search.effects import IMAGES, NETWORKS_PER_EFFECT, Effects, count_effects, measure_effects
from qnas.search.evaluator import Evaluator, evaluator_of, saved_evaluator
from qnas.search.problem import Problem
from qnas.search.rerank import Ranked, rerank, screen
from qnas.search.state import SearchState
from qnas.solver.solve import Scores, Solution, solve_best
from qnas.training.loop import stream
from qnas.training.losses import LossFunction

# Weight steps for each network that effects are measured by: its pass forward of up to 128 images is at most
# two thirds of a step of the presets, so that measuring adds at most a sixth to a search.
STEPS_PER_NETWORK = 4
# The same of screened networks, of up to 1,024 images.
STEPS_PER_SCREENED = 32
SCREENED_PER_RANKED = 16


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

    More than `keep` networks are screened first. Raises CheckpointError where the run does not record what a
    ranking needs, and what `saved_evaluator` does.
    """
    check_rankable(run.folder, run.config)
    evaluator = saved_evaluator(run.folder, run.config, run.space, data, loss)
    keep = keep or len(solutions)
    space, images, device = run.space, evaluator.data, evaluator.device
    with display(len(solutions) + (keep if len(solutions) > keep else 0), "rank") as progress:
        screened = screen(space, solutions, images, evaluator.losses, keep, device, progress.step)
        return rerank(space, screened, images, evaluator.classify, progress.step)
