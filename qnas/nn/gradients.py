"""The gradient of the architecture parameters, in four forms.

With independent or shared weights one candidate a position is active:

- two-path, of ProxylessNAS (arXiv 1812.00332): two candidates are drawn without replacement, one of
  them is active. The latency's gradient is taken over the same pair, and after the update the pair is
  shifted, so that the step moves probability between the two alone. Identity feels its latency whenever
  it is drawn, active or not;
- all-paths, its `full_v2`: one candidate is drawn, all of them enter the gates' gradient;
- gumbel: as all-paths, with the draw by noise added to the logits and the gradient of the softmax of
  the sum (straight-through Gumbel-softmax, arXiv 1611.01144).

With nested weights, exact: the relaxed network is run as it is and nothing is drawn.

All but two-path take the latency's gradient over all candidates.
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
    """One step of the architecture parameters, of all candidates or within a pair a position.

    Its `routes` carry the gradient of the task's loss to the parameters, `expected` that of the latency;
    `after_update` has to follow the optimiser's step.
    """

    routes: list[Route]
    logits: Tensor
    mask: Tensor
    sample: PairSample | None = None  # the pairs
    temperature: float = 1.0

    def expected(self, limits: LimitTensors) -> Tensor:
        """Return the expected amounts, (limits,), of which only the gradient depends on the form."""
        if self.sample is None:
            return expected_latency(self.logits, self.mask, limits.fixed, limits.cells)
        return expected_latency_of_pairs(self.logits, self.mask, limits.fixed, limits.cells, self.sample)

    def after_update(self, supernet: Supernet) -> None:
        """Give the candidates outside the pairs their probabilities back, in place."""
        if self.sample is not None:
            renormalise_pair(supernet.alpha, self.logits.detach(), self.sample, self.temperature)


def two_path(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Draw a pair a position, and one of it as active."""
    logits = supernet.logits(temperature)
    sample = sample_pairs(logits, supernet.mask, generator)
    return ArchitectureStep(sample.paths, logits, supernet.mask, sample, temperature)


def all_paths(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Draw a candidate a position by its probability."""
    logits = supernet.logits(temperature)
    p = probabilities(logits, supernet.mask)
    active = torch.multinomial(p.detach(), 1, generator=generator)
    return ArchitectureStep(_gated(p, active, supernet.mask), logits, supernet.mask)


def gumbel(supernet: Supernet, temperature: float, generator: Generator) -> ArchitectureStep:
    """Draw a candidate a position as the largest of logit plus noise, which has the same distribution."""
    logits = supernet.logits(temperature)
    # minus the logarithm of an exponential variable is a Gumbel one
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = probabilities(logits + noise, supernet.mask)  # the search's temperature divided the logits before
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
    """Return all candidates a position, gated straight-through by `soft`; 0 where there is no choice."""
    gates, counts = straight_through(soft, active), mask.sum(1).tolist()
    return [
        Gated(tuple(range(n)), int(active[i]), gates[i, :n]) if n > 1 else 0 for i, n in enumerate(counts)
    ]
