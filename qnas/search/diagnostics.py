"""Diagnostics of a search while it runs: stalls, collapses and unstable training.

A search that stalls or collapses still ends with a network within its budget, and so looks like a success.
Each step's figures are therefore compared with a reference that follows from the budget: the share of
identity and the entropy of the maximum-entropy probabilities whose expected amounts are the limits
(`undecided`). A search that learns moves away, but not far beyond that share, nor to zero entropy at once.

A condition is reported once, and again only after it has cleared. Nothing depends on wall-clock time, so a
resumed search reports the same as an uninterrupted one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import entr, softmax

from qnas.nn.supernet import candidate_mask, limit_tensors
from qnas.runs.plots import UNSETTLED
from qnas.solver.distributions import max_entropy_strengths
from qnas.solver.limits import Limit, Limits
from qnas.spaces.space import SearchSpace

OFF_TARGET = 0.25  # share of the limit: a larger violation that does not change is a stall
MOVED = 0.1  # share of the violation: a smaller change counts as none
GUESSING = 0.99  # share of the loss of guessing: a higher loss halfway through the training is guessing
RISEN = 1.5  # factor on the lowest loss
DECIDED = 0.01  # share of the maximum entropy: with less, all positions are decided
ONE_CANDIDATE = 0.95  # mean probability over all positions that have a choice
EARLY = 0.4  # share of the search in which nothing should be decided
MOST_TILT = 1e4  # largest difference of logits within a position


@dataclass(frozen=True)
class Undecided:
    """Figures of the maximum-entropy probabilities whose expected amount is a limit."""

    identity_share: float  # mean over the positions that have identity
    entropy: float  # nats, mean over positions


@dataclass(frozen=True)
class Sight:
    """The figures after an architecture step."""

    progress: float  # of the search, 0 to 1
    settling: bool
    ratio: float  # the largest expected amount over its limit
    multiplier: float
    entropy: float  # nats, mean over positions
    identity_share: float  # mean over the positions that have identity
    shares: Mapping[str, float]  # candidate's name -> mean probability over the positions with a choice


@dataclass
class Watch:
    """The conditions of one search, and the figures of earlier steps that they depend on."""

    arch_window: int  # architecture steps without movement that make a stall
    bound_window: int  # architecture steps in a row at the multiplier's bound that are too many
    weight_window: int  # weight steps whose mean loss is compared
    weight_windows: int  # number of them in the whole training
    guess: float  # the loss of guessing
    multiplier_bound: float
    expects: Undecided | None  # None where the budget does not bind
    violations: list[float] = field(default_factory=list)  # of the last arch_window steps
    at_bound: int = 0  # architecture steps in a row
    losses: list[float] = field(default_factory=list)  # of the current window
    lowest_loss: float = math.inf  # mean of a window
    windows: int = 0  # weight windows so far
    reported: list[str] = field(default_factory=list)  # conditions that were reported and have not cleared

    def after_weight_step(self, loss: float) -> list[str]:
        """Record the loss of a weight step; return new warnings."""
        self.losses.append(loss)
        if len(self.losses) < self.weight_window:
            return []
        mean = math.fsum(self.losses) / len(self.losses)
        self.losses, self.windows = [], self.windows + 1
        self.lowest_loss = min(self.lowest_loss, mean)
        guesses = 2 * self.windows >= self.weight_windows and self.lowest_loss > GUESSING * self.guess
        return self._new(
            {
                "guessing": guesses
                and f"the loss is still that of guessing, {self.guess:.2f} nats: the labels may not "
                "belong to the images, or the training is too short",
                "rising": not guesses
                and mean > RISEN * self.lowest_loss
                and f"the loss has risen to {mean:.2f} nats from {self.lowest_loss:.2f}: the paths that the "
                "search prefers are trained too little (a longer warm-up helps), or the training is unstable "
                "(a larger batch helps)",
            }
        )

    def after_arch_step(self, sight: Sight) -> list[str]:
        """Record the figures after an architecture step; return new warnings."""
        if self.expects is None:
            return []
        violation = sight.ratio - 1
        self.violations = [*self.violations, violation][-self.arch_window :]
        self.at_bound = self.at_bound + 1 if abs(sight.multiplier) >= self.multiplier_bound else 0
        distances = [abs(v) for v in self.violations]
        stalls = len(distances) == self.arch_window and max(distances) - min(distances) < MOVED * distances[0]
        stalls = stalls and min(distances) >= (UNSETTLED if sight.settling else OFF_TARGET)
        # halfway between the reference's share and identities only
        most = (1 + self.expects.identity_share) / 2
        name, share = max(sight.shares.items(), key=lambda item: item[1], default=("", 0.0))
        early = sight.progress < EARLY
        gone = early and sight.entropy < DECIDED * self.expects.entropy
        return self._new(
            {
                "stall": stalls
                and f"the expected amount has stood at {sight.ratio:.0%} of the limit for "
                f"{self.arch_window} architecture steps: the search is too short to reach it",
                "bound": self.at_bound >= self.bound_window
                and f"the multiplier has been at its bound, {sight.multiplier:+g}, for {self.at_bound} "
                "architecture steps: the latency outweighs the task (a longer search helps)",
                "identities": sight.identity_share > most
                and f"identity has {sight.identity_share:.0%} of the probability, where the limit asks for "
                f"{self.expects.identity_share:.0%}: the search collapses; its blocks may be trained too "
                "little before it starts (a longer warm-up helps)",
                "one candidate": early
                and name != "identity"
                and share > ONE_CANDIDATE
                and f"{name} has {share:.0%} of the probability everywhere at {sight.progress:.0%} of the "
                "search: other candidates are no longer tried (a longer warm-up helps)",
                "decided": gone
                and f"the probabilities are decided at {sight.progress:.0%} of the search (entropy "
                f"{sight.entropy:.3f} nats): later steps change nothing (a longer warm-up helps)",
            }
        )

    def _new(self, conditions: Mapping[str, str | bool]) -> list[str]:
        """Return the messages of conditions that hold and did not before."""
        found = []
        for name, message in conditions.items():
            if not message and name in self.reported:
                self.reported.remove(name)
            elif isinstance(message, str) and name not in self.reported:
                self.reported.append(name)
                found.append(message)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the state that later steps depend on, as plain values."""
        return {name: getattr(self, name) for name in REMEMBERED}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a state from `to_dict`."""
        for name in REMEMBERED:
            value = saved[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)


REMEMBERED = ("violations", "at_bound", "losses", "lowest_loss", "windows", "reported")


def make_watch(
    space: SearchSpace,
    limits: Limits,
    *,
    weight_steps: int,
    arch_steps: int,
    guess: float,
    multiplier_bound: float,
) -> Watch:
    """Return the watch of a search before its first step."""
    bound = [undecided(space, limit) for limit in limits if limit.binds]
    weight_window = max(10, weight_steps // 20)
    return Watch(
        arch_window=max(20, arch_steps // 8),
        bound_window=max(60, arch_steps // 4),  # reaching a distant budget takes about 40
        weight_window=weight_window,
        weight_windows=weight_steps // weight_window,
        guess=guess,
        multiplier_bound=multiplier_bound,
        # of several limits, the one that requires the most identities
        expects=max(bound, key=lambda expected: expected.identity_share, default=None),
    )


def undecided(space: SearchSpace, limit: Limit) -> Undecided:
    """Return the figures of the maximum-entropy probabilities whose expected amount is a limit.

    If uniform probabilities are below the limit, larger cells get larger probabilities.
    """
    mask = candidate_mask(space)
    fixed, cells, most = (part.numpy() for part in limit_tensors((limit,)))
    tilt = MOST_TILT / (max(max(row) - min(row) for row in limit.cells) / limit.limit)
    (strength,) = max_entropy_strengths(fixed, cells, most, mask.numpy(), (-tilt, tilt), tolerance=1e-9)
    p = softmax(np.where(mask, -strength / limit.limit * cells[0], -np.inf), axis=1)
    identities = [
        row[position.names.index("identity")]
        for row, position in zip(p, space.positions, strict=True)
        if "identity" in position.names
    ]
    return Undecided(float(np.mean(identities)) if identities else 0.0, float(entr(p).sum(1).mean()))
