"""Effects of candidates on the held-out loss, estimated from sampled networks with the supernet's weights.

Probabilities are a poor score to derive by. They include the pressure of the latency, so the most probable
network leaves latency unused. And they follow the slope of the loss at the gates, which is almost zero for
a trained block that is active, however important the block is. Effects are therefore measured after the
search. Networks near the budget are drawn by the probabilities and evaluated on held-out images with the
supernet's weights. An additive model is fitted to their losses; a candidate's effect is what it adds to the
loss in this model. Derivation minimises the sum of effects within the limits.

Networks that are compared with each other see the same images, since losses differ more between images than
between networks. The blocks of each stage are moved to its first positions (`spaces.block_order`), so the
candidate at a stage's third position is its third block. A stage's first block is worth many times its
third, which is the largest difference between networks of one latency: with blocks at any position, the same
model explains half as much. The model is a ridge regression whose strength is chosen by leave-one-out
cross-validation. It has a coefficient for each candidate and one more for each stage. Any block also counts
in coefficients for blocks: one overall, one for each stage and one for each position. Within a stage, a
block is worth at most as much as the one before it, so the measured placement of a network scores best.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import RidgeCV
from torch import Tensor

from qnas.search.layout_numbers import LayoutChoice, LayoutNumbers, numbers_of, open_choices
from qnas.solver.distributions import sample_near
from qnas.solver.limits import Limits, beside_latency
from qnas.solver.solve import CandidateIndices, Scores, solve
from qnas.spaces.block_order import block_labels, place_blocks_first, runs_of
from qnas.spaces.family import Layout
from qnas.spaces.lower import BlockSpec, fill, skeleton
from qnas.spaces.space import SearchSpace

# The loss on 128 images is mostly noise, which averages out over many networks: with 8 per effect, the best
# network by the supernet of quadranet-tiny was not among the 20 that were solved for.
NETWORKS_PER_EFFECT = 32
TOGETHER = 10  # networks that are evaluated on the same images
IMAGES = 128
WINDOW = 0.7  # share of the most probable network's latency that drawn networks have at least
TIE = 1e-7  # nats by which the earlier of two equally good positions is preferred
STRENGTHS = np.geomspace(0.03, 300, 13)  # of the ridge

# networks by candidate indices, images (B, C, H, W), labels (B,) -> losses in nats (networks, B)
Losses = Callable[[Sequence[CandidateIndices], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Effects:
    """The nats that each candidate adds to the held-out loss."""

    # [position][candidate], negative where the loss falls, 0 for candidates without layers; those of a
    # stage's second position are the effects of its second block
    nats: Scores
    explained: float  # share of the variance between networks on the same images, leave-one-out
    networks: int  # number of measured networks

    @property
    def scores(self) -> Scores:
        """The scores that derivation maximises: how much each candidate lowers the loss."""
        return tuple(tuple(-nats for nats in row) for row in self.nats)


def count_effects(space: SearchSpace) -> int:
    """Return the number of effects to estimate."""
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
    """Draw networks within the limits by their probabilities, evaluate them and fit the effects.

    Blocks are moved to the first positions. Every `TOGETHER` networks share a batch, after which
    `on_measured` is called with their number. Returns None where too few networks are found, or where the
    model does not predict networks left out of its fit.
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
    """Draw networks within all limits by their probabilities; fewer if such networks are rare.

    Latencies on the first device lie between a share of the latency of the most probable network within
    the limits, and the device's limit: effects depend on how large a network already is.
    """
    table = limits[0].table
    assert table is not None, "the first limit is a device's"
    weights = tuple(tuple(np.exp(row).tolist()) for row in log_probabilities)
    least_ms = WINDOW * solve(log_probabilities, limits).latency_ms
    most_ms = min(limits[0].slowest_within_ms, table.slowest_ms * (1 + 1e-9))
    return sample_near(
        table, least_ms, most_ms, networks, rng, within=beside_latency(limits), weights=weights
    )


def fit_effects(
    space: SearchSpace,
    networks: Sequence[CandidateIndices],
    losses: NDArray[np.float64],
    groups: NDArray[np.int64],
) -> Effects:
    """Fit the additive model to losses (n,) of networks; networks of one group (n,) saw the same images.

    The networks have their blocks in the first positions (`place_blocks_first`).
    """
    effects, _ = _fit(space, networks, losses, groups)
    return effects


def fit_family_effects(
    space: SearchSpace,
    networks: Sequence[CandidateIndices],
    layouts: Sequence[Layout],
    losses: NDArray[np.float64],
    groups: NDArray[np.int64],
) -> tuple[Effects, LayoutNumbers]:
    """Fit the additive model to networks (n,) at these layouts (n,), each with choices of its own.

    The model has a coefficient for each resolution, and for each width of a stage. Returns the effects, which
    are the same at all layouts, and the nats that resolutions and widths add. `space` is that of any layout;
    the rest is as in `fit_effects`.
    """
    effects, nats = _fit(space, networks, losses, groups, open_choices(layouts))
    return effects, numbers_of(nats, len(layouts[0].channels))


def _fit(
    space: SearchSpace,
    networks: Sequence[CandidateIndices],
    losses: NDArray[np.float64],
    groups: NDArray[np.int64],
    others: Sequence[tuple[LayoutChoice, ...]] = (),
) -> tuple[Effects, dict[LayoutChoice, float]]:
    """Fit the model, with a coefficient more for each different choice in `others` (n,); return these too."""
    columns, places = _columns(space)
    first = 1 + max(number for row in columns for own in row for number in own)
    known = dict.fromkeys(choice for choices in others for choice in choices)
    values = {choice: first + at for at, choice in enumerate(known)}
    design = np.zeros((len(networks), first + len(values)))
    for row, network in zip(design, networks, strict=True):
        for i, choice in enumerate(network):
            row[columns[i][choice]] += 1
    for row, choices in zip(design, others, strict=False):
        row[[values[choice] for choice in choices]] = 1
    design, centred = _within_groups(design, groups), _within_groups(losses, groups)
    ridge = RidgeCV(alphas=STRENGTHS, fit_intercept=False).fit(design, centred)
    coefficients = ridge.coef_.copy()
    for run in runs_of(block_labels(space)):
        own = [places[i] for i in run]
        falling = isotonic_regression(coefficients[own])  # nats rise: further blocks lower the loss less
        coefficients[own] = falling + TIE * np.arange(len(own))
    nats = tuple(tuple(float(coefficients[numbers].sum()) for numbers in row) for row in columns)
    # the best score is minus the mean squared error of left-out networks
    explained = 1 + float(ridge.best_score_) / max(float(np.mean(centred**2)), 1e-30)
    of_others = {choice: float(coefficients[number]) for choice, number in values.items()}
    return Effects(nats, explained, len(networks)), of_others


def _columns(space: SearchSpace) -> tuple[list[list[list[int]]], list[int]]:
    """Return the numbers of the coefficients in each candidate's effect, and of each position's own one."""
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
    """Return values (n, ...) minus the mean of their group."""
    centred = values.copy()
    for group in np.unique(groups):
        centred[groups == group] -= values[groups == group].mean(0)
    return centred
