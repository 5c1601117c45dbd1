"""Effects of candidates on the held-out loss, measured on sampled networks with the supernet's weights.

Probabilities are a poor score to derive by. They mix the pressure of the latency with the task, so that
the most probable network leaves latency unused. Their part of the task is the slope of the loss at the
gates, which is almost zero for a trained block that is active, however important the block is.
So the effects are measured after the search. Networks near the budget are drawn by its probabilities and
run on held-out images with the supernet's weights. A candidate's effect is what it adds to the loss in the
additive model that fits these losses best. Derivation minimises the sum of effects within the limits.

Networks that are compared with each other are run on the same images, as images differ more than networks
do. The blocks of each stage are moved to its first positions (`spaces.block_order`), so that the candidate
at a stage's third position is its third block. The first block of a stage is worth many times the third,
which is the largest difference between networks of one latency: with blocks at any position, the same
model explains half as much. The model is a ridge regression whose strength is chosen by leaving each network
out: a candidate has a coefficient for itself and one for its stage, and so has being a block at all, which
has one for its position too. Within a stage a further block is taken to be worth at most what the one
before it is: of all placements of a network the one that was measured then scores best.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import RidgeCV
from torch import Tensor

from qnas.solver.distributions import sample_near
from qnas.solver.limits import Limits
from qnas.solver.solve import CandidateIndices, Scores, solve
from qnas.spaces.block_order import block_labels, place_blocks_first, runs_of
from qnas.spaces.lower import BlockSpec, fill, skeleton
from qnas.spaces.space import SearchSpace

# What 128 images say of a network is mostly noise, which many networks average out: with 8 an effect, the
# best that a supernet of quadranet-tiny knew was not among the 20 that were solved for.
NETWORKS_PER_EFFECT = 32
TOGETHER = 10  # networks that are run on the same images
IMAGES = 128
WINDOW = 0.7  # of the latency of the most probable network: drawn networks take at least this
TIE = 1e-7  # nats by which the earlier of two places is preferred that are worth the same
STRENGTHS = np.geomspace(0.03, 300, 13)  # of the ridge

# cross-entropies in nats, (networks, B), of networks by number on images (B, C, H, W) with labels (B,)
Losses = Callable[[Sequence[CandidateIndices], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Effects:
    """The nats that each candidate adds to the held-out loss."""

    # [position][candidate], negative where the loss falls, 0 for candidates without layers; at a stage's
    # second position they are those of its second block
    nats: Scores
    explained: float  # share of the variance between networks on the same images, leave-one-out
    networks: int  # measured

    @property
    def scores(self) -> Scores:
        """Return what derivation maximises: by how much each candidate lowers the loss."""
        return tuple(tuple(-nats for nats in row) for row in self.nats)


def count_effects(space: SearchSpace) -> int:
    """Return how many effects there are to tell apart."""
    return sum(len(position.candidates) - 1 for position in space.positions)


def measure_effects(
    space: SearchSpace,
    limits: Limits,
    log_probabilities: Scores,
    losses: Losses,
    images_and_labels: Iterator[tuple[Tensor, Tensor]],
    networks: int,
    rng: np.random.Generator,
    on_measured: Callable[[int], None] = lambda _: None,
) -> Effects | None:
    """Draw networks within the limits by their probabilities, run them and fit the effects.

    Their blocks are put first. A batch is taken for every `TOGETHER` networks; `on_measured` is called with
    the number of networks after each. None where too few networks are found, or where the model does not
    predict the networks that it was not fitted to.
    """
    labels, found = block_labels(space), draw_networks(limits, log_probabilities, networks, rng)
    drawn = [place_blocks_first(labels, network) for network in found]
    if len(set(drawn)) <= TOGETHER:
        return None
    measured, groups = [], []
    for start in range(0, len(drawn), TOGETHER):
        together = drawn[start : start + TOGETHER]
        measured += losses(together, *next(images_and_labels)).mean(1).tolist()
        groups += [start] * len(together)
        on_measured(len(together))
    effects = fit_effects(space, drawn, np.array(measured), np.array(groups))
    return effects if effects.explained > 0 else None


def draw_networks(
    limits: Limits, log_probabilities: Scores, networks: int, rng: np.random.Generator
) -> list[CandidateIndices]:
    """Draw networks within all limits by their probabilities; fewer where they are rare.

    Their latencies on the first device lie between a share of that of the most probable network within
    the limits and its limit: what effects are depends on how large a network is already.
    """
    table = limits[0].table
    assert table is not None, "the first limit is a device's"
    weights = tuple(tuple(np.exp(row).tolist()) for row in log_probabilities)
    least_ms = WINDOW * solve(log_probabilities, limits).latency_ms
    most_ms = min(limits[0].limit, table.slowest_ms * (1 + 1e-9))
    return sample_near(table, least_ms, most_ms, networks, rng, within=limits[1:], weights=weights)


def fit_effects(
    space: SearchSpace,
    networks: Sequence[CandidateIndices],
    losses: NDArray[np.float64],
    groups: NDArray[np.int64],
) -> Effects:
    """Fit the additive model to losses (n,) of networks, of which those of a group saw the same images.

    The networks have their blocks first (`place_blocks_first`).
    """
    columns, places = _columns(space)
    design = np.zeros((len(networks), 1 + max(number for row in columns for own in row for number in own)))
    for row, network in zip(design, networks, strict=True):
        for i, choice in enumerate(network):
            row[columns[i][choice]] += 1
    design, centred = _within_groups(design, groups), _within_groups(losses, groups)
    ridge = RidgeCV(alphas=STRENGTHS, fit_intercept=False).fit(design, centred)
    coefficients = ridge.coef_.copy()
    for run in runs_of(block_labels(space)):
        own = [places[i] for i in run]
        falling = isotonic_regression(coefficients[own])  # nats rise: further blocks lower the loss less
        coefficients[own] = falling + TIE * np.arange(len(own))
    nats = tuple(tuple(float(coefficients[numbers].sum()) for numbers in row) for row in columns)
    # the best score is minus the mean squared error of networks that were left out
    explained = 1 + float(ridge.best_score_) / max(float(np.mean(centred**2)), 1e-30)
    return Effects(nats, explained, len(networks))


def _columns(space: SearchSpace) -> tuple[list[list[list[int]]], list[int]]:
    """Return the coefficients that make up each candidate's effect, and each position's own one."""
    numbers: dict[Any, int] = {}
    columns, places = [], []
    slots = [part for part in skeleton(space) if not isinstance(part, BlockSpec)]
    for i, slot in enumerate(slots):
        stage = ("stage", slot.position.stage)
        places.append(numbers.setdefault(("position", i), len(numbers)))
        row = []
        for candidate in slot.position.candidates:
            kinds: list[Any] = ["block", candidate, (stage, "block"), (stage, candidate), ("position", i)]
            is_block = bool(fill(space, slot, candidate).layers)
            row.append([numbers.setdefault(kind, len(numbers)) for kind in kinds if is_block])
        columns.append(row)
    return columns, places


def _within_groups(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return values (n, ...) less the mean of their group."""
    centred = values.copy()
    for group in np.unique(groups):
        centred[groups == group] -= values[groups == group].mean(0)
    return centred
