"""The choice of a network over the layouts of a family, after the last step of a search.

It is that of `search.selection`, with the layout as one more choice. Networks at all layouts are drawn near
the budget and measured, each at its own size of images, with networks of several layouts on the same images.
The additive model has one coefficient more for each resolution and for each width of a stage; candidates'
effects are the same at all.
The best networks of the whole family are solved for (`solver.layouts`), and are screened and ranked together
on the same held-out images, with batch norms measured at each network's own size.

Where no effects are known, the scores are log probabilities, which say nothing of layouts. Then resolutions
and widths get the numbers at which the best networks of all layouts score alike, or as nearly so as sums of
these numbers can, and the images decide.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from qnas.common.progress import Display, silent
from qnas.data.image_data import ImageData
from qnas.data.loading import GivenData
from qnas.runs.finished_run import FinishedRun, check_rankable
from qnas.search.ablation import image_losses
from qnas.search.diversity import choose_diverse, pool_of
from qnas.search.effects import IMAGES, TOGETHER, Effects, Losses, draw_networks, fit_family_effects
from qnas.search.evaluator import Evaluator, evaluator_of
from qnas.search.layout_numbers import LayoutNumbers, fit_layout_numbers
from qnas.search.paths import whole_network
from qnas.search.problem import AtLayout, Problem
from qnas.search.selection import (
    SCREEN_IMAGES,
    Ranked,
    Selection,
    count_effect_networks,
    count_screened,
    effects_of_changes,
    measured_batches,
    prefer,
    supernet_of,
    trained_px_of,
)
from qnas.search.smaller import expected_losses
from qnas.search.state import SearchState
from qnas.solver.layouts import FamilyNetwork, FamilyScores, FamilySolutions, solve_family
from qnas.solver.solve import CandidateIndices, Scores, Solution, solve
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.block_order import block_labels, place_blocks_first
from qnas.spaces.family import Layout, SpaceFamily
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import stream
from qnas.training.losses import LossFunction

Evaluators = Mapping[Layout, Evaluator]  # each with images of the size of its layout
Spaces = Mapping[Layout, SearchSpace]
LowerBy = Callable[[CandidateIndices], float]  # nats that a network's losses are lowered by


@dataclass(frozen=True)
class RankedAt:
    """A network at a layout, with its score on the held-out images."""

    layout: Layout
    ranked: Ranked


@dataclass(frozen=True)
class FamilySelection:
    """The best networks of a search over a family, and the scores that they were solved for."""

    effects: Effects | None  # None: the scores are the log probabilities
    scores: FamilyScores
    found: FamilySolutions
    ranking: tuple[RankedAt, ...]  # the first is the derived network

    def at(self, layout: Layout, space: SearchSpace) -> Selection:
        """Return the networks of one layout, with the scores of its candidates."""
        ranking = tuple(each.ranked for each in self.ranking if each.layout == layout)
        return Selection(self.effects, self.scores.candidates(space), ranking)


def scores_over(rows: Scores, numbers: LayoutNumbers) -> FamilyScores:
    """Return scores whose candidates have the same at all layouts, which add these numbers."""
    return FamilyScores(lambda space: rows, numbers.resolutions, numbers.widths)


def select_of_family(state: SearchState, display: Display = silent) -> FamilySelection:
    """Select the best networks of a finished search over a family, leaving its state unchanged."""
    problem = state.problem
    family, keep, data = problem.family, problem.config.k_best, problem.data
    assert family is not None
    evaluators = {each.layout: evaluator_of(state.at(each.layout)) for each in problem.layouts}
    spaces = {each.layout: each.space for each in problem.layouts}
    with display(count_effect_networks(problem), "measure") as progress:
        measured = effects_of_family(state, evaluators, progress.step_by)
    if measured is None:
        effects, scores = None, level_scores(problem.layouts, state.log_probabilities)
    else:
        effects, nats = measured
        scores = scores_over(effects.scores, nats.negated())
    found = solve_family(family.family, scores, family.limits_of, count_screened(problem))
    networks = found.networks
    if len(networks) > keep:
        with display(len(networks), "screen") as progress:
            networks = screen_layouts(spaces, networks, data, evaluators, keep, progress.step)
    with display(len(networks), "rank") as progress:
        ranking = rank_layouts(spaces, networks, data, evaluators, progress.step)
    return FamilySelection(effects, scores, found, ranking)


def level_scores(layouts: Sequence[AtLayout], log_probabilities: Scores) -> FamilyScores:
    """Return the log probabilities, and the numbers that put each layout's best network at about zero."""
    best = {each.layout: -solve(log_probabilities, each.limits).score for each in layouts}
    return scores_over(log_probabilities, fit_layout_numbers(best))


def effects_of_family(
    state: SearchState, evaluators: Evaluators, on_measured: Callable[[int], None] = lambda _: None
) -> tuple[Effects, LayoutNumbers] | None:
    """Measure what candidates, resolutions and widths add to the held-out loss; None as `measure_effects`.

    The state stays unchanged, so a second call returns the same.
    """
    problem = state.problem
    if problem.config.weight_steps == "whole":
        return _effects_of_changes(state, evaluators, on_measured)
    split, seed = problem.data.heldout, problem.config.seed + 2  # draws differ from those of the steps
    device = next(iter(evaluators.values())).device
    return measure_family_effects(
        problem.layouts,
        state.log_probabilities_at(1.0),
        {layout: evaluator.losses for layout, evaluator in evaluators.items()},
        stream(split, min(IMAGES, len(split)), seed, 0, augment=False, device=device),
        count_effect_networks(problem),
        np.random.default_rng(seed),
        on_measured,
    )


def _effects_of_changes(
    state: SearchState, evaluators: Evaluators, on_measured: Callable[[int], None]
) -> tuple[Effects, LayoutNumbers] | None:
    """Measure what changes of the whole network add to its held-out loss: its blocks, and its layout.

    Blocks are changed at the lowest resolution of the widest layouts, where they take least time.
    """
    problem = state.problem
    at = min(problem.layouts, key=lambda each: (-sum(each.channels), each.layout.resolution_px))
    effects = effects_of_changes(state.at(at.layout), evaluators[at.layout], on_measured)
    if effects is None:
        return None
    whole, batches = whole_network(problem), measured_batches(problem, evaluators[at.layout])
    losses, log_macs = [], []
    for each in problem.layouts:
        losses += list(image_losses([whole], evaluators[each.layout].losses, batches, on_measured))
        log_macs.append(math.log(count_macs(lower(each.space, arch_from_indices(each.space, whole)))))
    nats = expected_losses(np.stack(losses), np.array(log_macs)).tolist()
    layouts = [each.layout for each in problem.layouts]
    return effects, fit_layout_numbers(dict(zip(layouts, nats, strict=True)))


def measure_family_effects(
    layouts: Sequence[AtLayout],
    log_probabilities: Scores,
    losses: Mapping[Layout, Losses],
    images_and_labels: Iterator[tuple[Tensor, Tensor]],
    networks: int,
    rng: np.random.Generator,
    on_measured: Callable[[int], None] = lambda _: None,
) -> tuple[Effects, LayoutNumbers] | None:
    """Draw networks at all layouts, as many at each, evaluate them and fit effects; see `measure_effects`.

    Networks of the layouts take turns, so that those on the same images are of several layouts.
    """
    space, each = layouts[0].space, -(-networks // len(layouts))
    labels = block_labels(space)  # the same at all layouts
    drawn = []
    for at in layouts:
        found = draw_networks(at.limits, log_probabilities, each, rng)
        drawn.append([(at.layout, place_blocks_first(labels, network)) for network in found])
    in_turn = [place for places in zip_longest(*drawn) for place in places if place is not None]
    in_turn = in_turn[:networks]
    if len(set(in_turn)) <= TOGETHER:
        return None
    measured, groups = [], []
    for start in range(0, len(in_turn), TOGETHER):
        together = in_turn[start : start + TOGETHER]
        images, labels_of = next(images_and_labels)
        for layout, network in together:
            measured += losses[layout]([network], images, labels_of).mean(1).tolist()
        groups += [start] * len(together)
        on_measured(len(together))
    effects, numbers = fit_family_effects(
        space,
        [network for _, network in in_turn],
        [layout for layout, _ in in_turn],
        np.array(measured),
        np.array(groups),
    )
    return (effects, numbers) if effects.explained > 0 else None


def screen_layouts(
    spaces: Spaces,
    networks: Sequence[FamilyNetwork],
    data: ImageData,
    evaluators: Evaluators,
    keep: int,
    on_screened: Callable[[], None] = lambda: None,
    lower_by: LowerBy = lambda _: 0.0,
) -> tuple[FamilyNetwork, ...]:
    """Return the `keep` best networks on one batch of held-out images, in the order of their scores.

    As `selection.screen`, each network at its own layout.
    """
    if len(networks) <= keep:
        return tuple(networks)
    size = min(SCREEN_IMAGES, len(data.heldout))
    device = next(iter(evaluators.values())).device
    images, labels = next(stream(data.heldout, size, 0, 0, augment=False, device=device))
    found = []
    for each in networks:
        indices = each.solution.indices
        found.append(evaluators[each.layout].losses([indices], images, labels) - lower_by(indices))
        on_screened()
    order, _ = prefer(torch.cat(found), [_params(spaces[each.layout], each) for each in networks])
    return tuple(networks[i] for i in sorted(order[:keep]))


def rank_layouts(
    spaces: Spaces,
    networks: Sequence[FamilyNetwork],
    data: ImageData,
    evaluators: Evaluators,
    on_scored: Callable[[], None] = lambda: None,
    lower_by: LowerBy = lambda _: 0.0,
) -> tuple[RankedAt, ...]:
    """Return the networks in the order of `selection.prefer` on all held-out images, each at its layout."""
    scores, archs = [], []
    for each in networks:
        archs.append(arch_from_indices(spaces[each.layout], each.solution.indices))
        scores.append(evaluators[each.layout].classify(archs[-1], data.heldout))
        on_scored()
    sizes = [_params(spaces[each.layout], each) for each in networks]
    losses = [s.losses - lower_by(each.solution.indices) for s, each in zip(scores, networks, strict=True)]
    order, level = prefer(torch.stack(losses), sizes)
    return tuple(
        RankedAt(
            networks[i].layout,
            Ranked(networks[i].solution, archs[i], scores[i].score, sizes[i], is_level=place < level),
        )
        for place, i in enumerate(order)
    )


def _params(space: SearchSpace, network: FamilyNetwork) -> int:
    return count_params(lower(space, arch_from_indices(space, network.solution.indices)))


def rank_saved_layouts(
    run: FinishedRun,
    networks: Sequence[FamilyNetwork],
    keep: int | None = None,
    *,
    data: GivenData | None = None,
    loss: LossFunction | None = None,
    display: Display = silent,
) -> tuple[RankedAt, ...]:
    """Rank networks of a finished search's family with its supernet, each at the size of its layout.

    As `selection.rerank_saved`, which says what it raises.
    """
    check_rankable(run.folder, run.config)
    assert run.family is not None
    saved = supernet_of(run, data, loss)
    layouts = {each.layout for each in networks}
    spaces = {layout: run.family.family.at(layout) for layout in layouts}
    evaluators = {
        layout: saved.evaluator(space, trained_px_of(run, layout)) for layout, space in spaces.items()
    }
    keep, lower_by, images = keep or len(networks), run.searched.correction, saved.data
    with display(len(networks) + (keep if len(networks) > keep else 0), "rank") as progress:
        step = progress.step
        screened = screen_layouts(spaces, networks, images, evaluators, keep, step, lower_by)
        return rank_layouts(spaces, screened, images, evaluators, step, lower_by)


def choose_over_layouts(
    problem: Problem,
    selection: FamilySelection,
    rows: Scores,
    count: int,
    solved: int,
    known: Sequence[tuple[Layout, CandidateIndices]],
) -> tuple[tuple[Layout, Solution], ...]:
    """Return up to `count` diverse networks over the layouts, as `choose_diverse` does.

    They are of the layouts of the `solved` best networks of the family, of at most `count`, and of half as
    many others, those of the highest bounds: a supernet that is trained for minutes may be wrong about a
    resolution or a width too. `rows` are the candidates' scores. `known` networks are left out; without any,
    the first of the ranking comes first.
    """
    family = problem.family
    assert family is not None
    scores = replace(selection.scores, candidates=lambda space: rows)
    found = solve_family(family.family, scores, family.limits_of, solved)
    first = None if known else selection.ranking[0]
    leading = [*([first.layout] if first else []), *(each.layout for each in found.networks)]
    others = {each.layout for each in family.within} - set(leading)
    rest = sorted((each for each in found.verdicts if each.layout in others), key=lambda each: -each.bound)
    layouts = list(dict.fromkeys(leading))[:count] + [each.layout for each in rest[: count // 2]]
    pools = []
    for layout in layouts:
        own = problem.at(layout)
        leads = first.ranked.solution.indices if first and layout == first.layout else None
        without = [network for of, network in known if of == layout]
        pool = pool_of(own.space, rows, own.limits, solved, first=leads, without=without)
        at = np.tile(_coordinates(family.family, layout), (len(pool.networks), 1))
        pools.append(replace(pool, points=np.hstack([pool.points, at])))
    chosen = choose_diverse(pools, count, [scores.constant(layout) for layout in layouts])
    return tuple((layouts[number], each) for number, each in chosen)


def _coordinates(family: SpaceFamily, layout: Layout) -> list[float]:
    """Return the features of a layout: its resolution and widths, as shares of the largest."""
    stages = len(family.widths)
    widths = (c / max(row) / stages for c, row in zip(layout.channels, family.widths, strict=True))
    return [layout.resolution_px / max(family.resolutions_px), *widths]
