"""Four estimators of the gradient of the architecture parameters.

With independent or shared weights, one candidate is active at each position:

- two-path (ProxylessNAS, arXiv 1812.00332): two candidates are drawn without replacement, and one of them
  is active. The latency's gradient is taken over the same pair. After the update the pair is shifted, so
  that a step moves probability only between the two. Identity gets a latency gradient whenever it is drawn,
  active or not.
- all-paths (`full_v2` of ProxylessNAS): one candidate is drawn; all of them enter the gates' gradient.
- gumbel: as all-paths, but the candidate is drawn by adding noise to the logits, and the gradient is that of
  the softmax of the sum (straight-through Gumbel-softmax, arXiv 1611.01144).

With nested weights, the gradient is exact: the relaxed network itself is run and nothing is sampled.

Except in two-path, the latency's gradient is taken over all candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from qnas.nn.mixed_block import Gated, Route
from qnas.nn.modes import GradientForm
from qnas.nn.supernet import (
    LimitTensors,
    PairSample,
    Supernet,
    expected_latency,
    expected_latency_of_pairs,
    probabilities,
    renormalise_pair,
    sample_pairs,
    straight_through,
)


@dataclass(frozen=True)
class ArchitectureStep:
    """One step of the architecture parameters, over all candidates or over one pair at each position.

    `routes` carry the gradient of the task's loss to the parameters, and `expected` that of the latency. Call
    `after_update` after the optimiser's step.
    """

    routes: list[Route]
    logits: Tensor
    mask: Tensor
    sample: PairSample | None = None  # the pairs
    temperature: float = 1.0

    def expected(self, limits: LimitTensors) -> Tensor:
        """Return the expected amounts, (limits,). Their gradient depends on the form, their values do not."""
        if self.sample is None:
            return expected_latency(self.logits, self.mask, limits.fixed, limits.cells)
        return expected_latency_of_pairs(self.logits, self.mask, limits.fixed, limits.cells, self.sample)

    def after_update(self, supernet: Supernet) -> None:
        """Restore the probabilities of the candidates outside the pairs, in place."""
        if self.sample is not None:
            renormalise_pair(supernet.alpha, self.logits.detach(), self.sample, self.temperature)


def two_path(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Draw a pair of candidates at each position, and the active one of the two."""
    logits = supernet.logits(temperature)
    sample = sample_pairs(logits, supernet.mask, generator)
    return ArchitectureStep(sample.paths, logits, supernet.mask, sample, temperature)


def all_paths(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Draw a candidate at each position by the probabilities."""
    logits = supernet.logits(temperature)
    p = probabilities(logits, supernet.mask)
    active = torch.multinomial(p.detach(), 1, generator=generator)
    return ArchitectureStep(_gated(p, active, supernet.mask), logits, supernet.mask)


def gumbel(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Draw the candidate with the largest logit plus noise, with the distribution of all_paths."""
    logits = supernet.logits(temperature)
    # minus the logarithm of an exponential variable is a Gumbel one
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = probabilities(logits + noise, supernet.mask)  # `logits` applied the temperature
    return ArchitectureStep(_gated(soft, soft.argmax(1, keepdim=True), supernet.mask), logits, supernet.mask)


def exact(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Mix all candidates; the generator is not used."""
    return ArchitectureStep(supernet.mixture(temperature), supernet.logits(temperature), supernet.mask)


GRADIENTS: dict[GradientForm, Callable[[Supernet, float, Generator], ArchitectureStep]] = {
    "two-path": two_path,
    "all-paths": all_paths,
    "gumbel": gumbel,
    "exact": exact,
}


def _gated(soft: Tensor, active: Tensor, mask: Tensor) -> list[Route]:
    """Return routes of all candidates, gated straight-through by `soft`; 0 where there is no choice."""
    gates, counts = straight_through(soft, active), mask.sum(1).tolist()
    return [
        Gated(tuple(range(n)), int(active[i]), gates[i, :n]) if n > 1 else 0 for i, n in enumerate(counts)
    ]
