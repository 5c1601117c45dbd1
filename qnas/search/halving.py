"""Successive halving, synchronous (Jamieson and Talwalkar, arXiv 1502.07943): rungs, and who stays.

All networks are trained to the end of the first rung, the best of them to the end of the second, and so on;
those of the last rung are trained for all epochs. A rung multiplies the epochs by the factor by which it
divides the networks, so each rung takes about the same time.

Nothing here imports torch, so that the command line can check settings with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """A rung: so many networks are trained until each has so many epochs behind it."""

    networks: int
    epochs: int  # since the start of a network's training, not of the rung


def count_rungs(networks: int, factor: int) -> int:
    """Return the number of rungs: the last one has at least two networks, if there are two.

    >>> [count_rungs(networks, 2) for networks in (1, 2, 3, 4, 7, 8)]
    [1, 1, 1, 2, 2, 3]
    """
    rungs = 1
    while networks // factor**rungs >= 2:
        rungs += 1
    return rungs


def plan_rungs(networks: int, epochs: int, factor: int) -> tuple[Rung, ...]:
    """Return the rungs of so many networks, of which those in the last one are trained for all epochs.

    >>> plan_rungs(8, 12, 2)
    (Rung(networks=8, epochs=3), Rung(networks=4, epochs=6), Rung(networks=2, epochs=12))
    """
    count = count_rungs(networks, factor)
    assert epochs >= count, (epochs, count)
    rungs: list[Rung] = []
    for number in range(count):
        before = rungs[-1].epochs if rungs else 0
        # rounding must leave an epoch for this rung and for each that follows
        until = max(before + 1, round(epochs / factor ** (count - 1 - number)))
        until = min(until, epochs - (count - 1 - number))
        rungs.append(Rung(networks // factor**number, until))
    return tuple(rungs)


def count_epochs(rungs: Sequence[Rung]) -> int:
    """Return the epochs of all networks together.

    >>> count_epochs(plan_rungs(8, 12, 2))
    48
    """
    before = [0, *(rung.epochs for rung in rungs)]
    return sum(rung.networks * (rung.epochs - start) for rung, start in zip(rungs, before, strict=False))


def epochs_within(networks: int, factor: int, most: int) -> int:
    """Return the most epochs of the last rung with which all networks together take at most `most` epochs.

    It is at least the number of rungs, which then take more.

    >>> epochs_within(8, 2, 48), epochs_within(8, 2, 5)
    (12, 3)
    """
    epochs = count_rungs(networks, factor)
    while count_epochs(plan_rungs(networks, epochs + 1, factor)) <= most:
        epochs += 1
    return epochs


def best_first(accuracies: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the places of networks by falling accuracy; of equal ones, by rising loss, then in order."""
    return sorted(range(len(accuracies)), key=lambda i: (-accuracies[i], losses[i], i))
