"""Effects of candidates by one change at a time, around the one network that a search has trained.

Where weight steps train the whole network alone (`search.weight_steps`), networks drawn near the budget are
far from what was trained: all are poor, and their losses say little about single candidates. Here the
trained network is changed at one position at a time, and the difference of the losses on the same images is
the candidate's effect. Blocks are left out from the end of a stage, one more at a time, since a stage's
first block is worth most (`spaces.block_order`). What a layout adds is measured with the trained network
itself, at each layout within the limits.

A change of several sizes, such as kernel and expansion, counts as the sum of the changes of one size each,
so that few are measured, on more images. Differences on some hundred images are noisy, and the solver picks
those that look best. So what is known beforehand counts as well: smaller networks are worse
(`search.smaller`), nothing that was not trained is better than what was, and a smaller size costs no less
than a larger one that is still below the network's own.

Effects add up for the solver, which overstates or understates what several changes do together. A few
networks drawn near the budget tell how well the sums predict their losses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from qnas.search.effects import TIE, Effects, Losses
from qnas.search.smaller import Floats, assumed_costs, errors_of, expected_costs
from qnas.solver.solve import CandidateIndices
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.block_order import block_labels, place_blocks_first, runs_of
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import Candidate, Position, SearchSpace

BATCHES = 4  # of images, at most, that each change is measured on
CHECKED = 20  # drawn networks whose losses the sums of effects are compared with


@dataclass(frozen=True)
class Change:
    """A network that differs from the trained one: in the candidate of a position, or in its last blocks."""

    position: int
    candidate: int
    network: CandidateIndices


def changes_of(space: SearchSpace, whole: CandidateIndices) -> tuple[list[Change], list[list[Change]]]:
    """Return the networks with one other block, and for each run of positions those with fewer blocks.

    `whole` has a block at every position that may have one. Other blocks are those that no sum of changes of
    one size stands for. The networks with fewer blocks of a run leave out the last one, the last two and so
    on, as far as identities are candidates.
    """
    labels = block_labels(space)
    assert all(row[i] or not any(row) for row, i in zip(labels, whole, strict=True)), "blocks everywhere"
    exchanged = [
        Change(at, i, (*whole[:at], i, *whole[at + 1 :]))
        for at, (position, row) in enumerate(zip(space.positions, labels, strict=True))
        for i, label in enumerate(row)
        if label and i != whole[at] and len(single_steps(position, whole[at], i)) == 1
    ]
    shortened = []
    for run in runs_of(labels):
        network, own = list(whole), []
        for at in reversed(run):
            if 0 not in labels[at] or not any(labels[at]):
                break
            network[at] = labels[at].index(0)
            own.append(Change(at, network[at], tuple(network)))
        shortened.append(own)
    return exchanged, shortened


def single_steps(position: Position, own: int, other: int) -> list[int]:
    """Return the candidates that differ from a position's own in one size, and together make the other.

    Where there are none, the other itself.
    """
    first, last = position.candidates[own], position.candidates[other]
    differing = differing_sizes(first, last)
    places = {candidate: i for i, candidate in enumerate(position.candidates)}
    steps = [
        Candidate(block=first.block, **{**first.parameters, name: last.sizes[name]}) for name in differing
    ]
    if len(steps) < 2 or not all(step in places for step in steps):
        return [other]
    return [places[step] for step in steps]


def differing_sizes(first: Candidate, last: Candidate) -> list[str]:
    """Return the sizes in which two candidates of one kind differ; none for those of two kinds."""
    if first.kind != last.kind:
        return []
    return [name for name, value in first.sizes.items() if value != last.sizes[name]]


def count_changes(space: SearchSpace, whole: CandidateIndices) -> int:
    """Return the number of networks that differ from the trained one."""
    exchanged, shortened = changes_of(space, whole)
    return len(exchanged) + sum(map(len, shortened))


def measure_changes(
    space: SearchSpace,
    whole: CandidateIndices,
    losses: Losses,
    images_and_labels: Sequence[tuple[Tensor, Tensor]],
    checked: Sequence[CandidateIndices] = (),
    on_measured: Callable[[int], None] = lambda _: None,
) -> Effects:
    """Measure what each candidate adds to the held-out loss of the trained network.

    `images_and_labels` are the batches that every network is evaluated on. `checked` are networks within the
    limits, whose losses tell what the sums of effects explain; without them, `explained` is 0. `on_measured`
    is called with the number of networks after each batch.
    """
    exchanged, shortened = changes_of(space, whole)
    networks = [whole, *(c.network for c in exchanged), *(c.network for row in shortened for c in row)]
    found = dict(zip(networks, image_losses(networks, losses, images_and_labels, on_measured), strict=True))
    labels = block_labels(space)
    measured: list[dict[int, float]] = [{} for _ in space.positions]
    of_kind: dict[str, list[Change]] = {}
    for change in exchanged:
        of_kind.setdefault(_kind_of_change(space, whole, change), []).append(change)
    for changes in of_kind.values():
        costs = _costs_between(space, [(whole, change.network) for change in changes], found)
        for change, cost in zip(changes, costs, strict=True):
            measured[change.position][change.candidate] = cost
    nats = [
        costs_of(position, own, of_position, row)
        for position, own, of_position, row in zip(space.positions, whole, measured, labels, strict=True)
    ]
    pairs = [pair for row in shortened for pair in pairwise((whole, *(change.network for change in row)))]
    of_blocks = iter(_costs_between(space, pairs, found))
    for row in shortened:
        # from the last block to the first, each is worth no less than the one behind it
        rising = isotonic_regression(list(islice(of_blocks, len(row)))) if row else []
        for place, (change, cost) in enumerate(zip(row, rising, strict=True)):
            nats[change.position][change.candidate] = float(cost) + TIE * (place + 1)
    # by convention, candidates without layers have 0
    for own, of_labels in zip(nats, labels, strict=True):
        if 0 in of_labels and any(of_labels):
            left_out = own[of_labels.index(0)]
            own[:] = [value - left_out if label else 0.0 for value, label in zip(own, of_labels, strict=True)]
    scores = tuple(map(tuple, nats))
    explained = 0.0
    if checked:
        checked = [place_blocks_first(labels, network) for network in checked]
        true = image_losses(checked, losses, images_and_labels[:1], on_measured).mean(1)
        sums = np.array([sum(row[i] for row, i in zip(scores, n, strict=True)) for n in checked])
        left = (true - true.mean()) - (sums - sums.mean())
        explained = max(0.0, 1 - float(left @ left) / max(float(np.var(true) * len(true)), 1e-30))
    return Effects(scores, explained, len(networks) + len(checked))


def _kind_of_change(space: SearchSpace, whole: CandidateIndices, change: Change) -> str:
    """Return the size that a change is of; changes of another kind of block are one kind."""
    candidates = space.positions[change.position].candidates
    differing = differing_sizes(candidates[whole[change.position]], candidates[change.candidate])
    return " ".join(differing)


def _costs_between(
    space: SearchSpace,
    pairs: Sequence[tuple[CandidateIndices, CandidateIndices]],
    found: Mapping[CandidateIndices, Floats],
) -> list[float]:
    """Return the nats that the second network of each pair costs beside the first, by losses of images.

    The pairs are changes of one kind. One that saves no MACs costs what was measured, and no less than zero.
    """
    if not pairs:
        return []
    log_macs = {
        network: math.log(count_macs(lower(space, arch_from_indices(space, network))))
        for network in {network for pair in pairs for network in pair}
    }
    saved = np.array([log_macs[first] - log_macs[last] for first, last in pairs])
    differences = np.stack([found[last] - found[first] for first, last in pairs])
    measured, errors, smaller = differences.mean(1), errors_of(differences), saved > 0
    loss = float(np.mean([found[first].mean() for first, _ in pairs]))
    costs = np.maximum(measured, 0.0)
    if smaller.any():
        least = max(0.0, float(measured[smaller].mean()))
        means = np.maximum(assumed_costs(loss, saved[smaller]), least)
        costs[smaller] = expected_costs(measured[smaller], errors[smaller], means)
    return [float(cost) for cost in costs]


def costs_of(
    position: Position, own: int, measured: Mapping[int, float], labels: Sequence[int]
) -> list[float]:
    """Return the nats that each block of a position costs in place of its own one, by measured changes.

    None is below zero, and smaller sizes cost no less than larger ones below the network's own. A tie goes to
    the own block. Candidates without layers have 0.
    """
    known = {i: max(0.0, value) for i, value in measured.items()}
    first = position.candidates[own]
    for name, value in first.sizes.items():
        smaller = {
            candidate.sizes[name]: i
            for i, candidate in enumerate(position.candidates)
            if i in known and differing_sizes(first, candidate) == [name] and candidate.sizes[name] < value
        }
        places = [smaller[size] for size in sorted(smaller, reverse=True)]
        if places:
            rising = isotonic_regression([known[i] for i in places])
            known |= dict(zip(places, map(float, rising), strict=True))
    return [
        sum(known[step] + TIE for step in single_steps(position, own, i)) if label and i != own else 0.0
        for i, label in enumerate(labels)
    ]


def image_losses(
    networks: Sequence[CandidateIndices],
    losses: Losses,
    images_and_labels: Sequence[tuple[Tensor, Tensor]],
    on_measured: Callable[[int], None] = lambda _: None,
) -> Floats:
    """Return the loss of each network on each image of all batches, (networks, images)."""
    parts = []
    for images, labels in images_and_labels:
        rows = []
        for network in networks:
            rows.append(losses([network], images, labels)[0].double().numpy())
            on_measured(1)
        parts.append(np.stack(rows))
    return np.concatenate(parts, axis=1)
