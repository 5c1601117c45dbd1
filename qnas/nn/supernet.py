"""The supernet: all networks of a space in one module, and the architecture parameters.

`qnas.nn.mixed_block` keeps the weights of a position's candidates and runs them. A forward pass takes a
route for each position; the modules store no architecture. This module has the architecture parameters, the
probabilities that follow from them, the sampling of paths, and the expected latency.

With independent and shared weights a position has a parameter for each candidate, and their softmax is
the candidates' probability. With nested weights it has them for each kernel, each expansion and for
block or identity, and a candidate's probability is the product of three.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from qnas.nn.blocks import build_block
from qnas.nn.mixed_block import (
    Choice,
    FactoredMixture,
    Gated,
    Grid,
    NestedChoice,
    Route,
    grid_of,
    make_choice,
)
from qnas.nn.modes import WeightsMode
from qnas.nn.subnet import build_subnet, module_name, subnet_state
from qnas.solver.distributions import max_entropy_strengths
from qnas.solver.limits import Limits
from qnas.spaces.arch import Arch
from qnas.spaces.block_order import Labels, block_labels, take_first_places
from qnas.spaces.lower import BlockSpec, skeleton
from qnas.spaces.space import SearchSpace

ALPHA_STD = 1e-3  # of the initial architecture parameters, as in ProxylessNAS


class Supernet(nn.Module):
    """All networks of a space in one module.

    `alpha` holds a row of parameters a position in float64 on the CPU: (positions, most candidates of a
    position), with nested weights (positions, kernels + expansions + 2). Entries that a position has no
    use for have no effect. The weights are every other parameter. Raises UsageError where a space's
    weights cannot be nested.
    """

    alpha: nn.Parameter
    mask: Tensor  # (positions, candidates): which candidates there are

    def __init__(
        self, space: SearchSpace, classes: int, generator: Generator, weights: WeightsMode = "independent"
    ) -> None:
        super().__init__()
        self.space = space
        self.labels = block_labels(space)
        self.parts = nn.ModuleDict()
        for part in skeleton(space, classes=classes):
            if isinstance(part, BlockSpec):
                self.parts[module_name(part)] = build_block(part)
            else:
                name = part.position.name.replace(".", "_")
                self.parts[name] = make_choice(space, part, weights)
        self.to(memory_format=torch.channels_last)
        mask = candidate_mask(space)
        self.register_buffer("mask", mask, persistent=False)
        self.factors = Factors([grid_of(space, p) for p in space.positions]) if weights == "nested" else None
        shape = (len(mask), mask.shape[1] if self.factors is None else sum(self.factors.sizes))
        alpha = ALPHA_STD * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.alpha = nn.Parameter(alpha)

    @property
    def weights(self) -> list[nn.Parameter]:
        """All parameters but the architecture's."""
        return [p for p in self.parameters() if p is not self.alpha]

    def logits(self, temperature: float = 1.0) -> Tensor:
        """Return the logits of each position's candidates, (positions, candidates)."""
        scaled = self.alpha / temperature
        return scaled if self.factors is None else self.factors(scaled)

    def mixture(self, temperature: float = 1.0) -> list[Route]:
        """Return the route of all candidates in their probabilities, with gradient; nested weights only."""
        assert self.factors is not None, "only nested weights have it"
        kernels, expansions, blocks = (
            shares.exp() for shares in self.factors.log_shares(self.alpha / temperature)
        )
        routes: list[Route] = []
        for i, part in enumerate(part for part in self.parts.values() if isinstance(part, NestedChoice)):
            grid = part.grid
            mixed = FactoredMixture(
                kernels[i, : len(grid.kernels)], expansions[i, : len(grid.expansions)], blocks[i, 0]
            )
            routes.append(mixed if len(grid.places) > 1 else 0)
        return routes

    def forward(self, x: Tensor, routes: Sequence[Route]) -> Tensor:
        """Run a route a position: (B, channels, H, W) -> (B, classes).

        Of routes with one active candidate a position, those whose candidate is a block run in the first
        positions of their stage (`qnas.spaces.block_order`).
        """
        remaining = iter(_blocks_first(self.labels, routes))
        for part in self.parts.values():
            x = part(x, next(remaining)) if isinstance(part, Choice) else part(x)
        assert next(remaining, None) is None, "more routes than positions"
        return x

    def subnet(self, arch: Arch, classes: int) -> nn.Sequential:
        """Return the network of an architecture with a copy of this supernet's weights."""
        network = build_subnet(self.space, arch, classes)
        network.load_state_dict(subnet_state(self.state_dict(), self.space, arch))
        return network


def _blocks_first(labels: Labels, routes: Sequence[Route]) -> list[Route]:
    """Return the routes as they run; mixtures, in which no candidate is the active one, stay in place."""
    active = []
    for route in routes:
        if isinstance(route, Gated):
            active.append(route.candidates[route.active])
        elif isinstance(route, int):
            active.append(route)
        else:
            return list(routes)
    moved = list(routes)
    for i, place in enumerate(take_first_places(labels, active)):
        moved[place] = _renumbered(routes[i], labels[i], labels[place])
    return moved


def _renumbered(route: Route, here: Sequence[int], there: Sequence[int]) -> Route:
    """Return a route of one position, of candidates with these labels, as one of another."""
    if here == there:
        return route
    if isinstance(route, Gated):
        return replace(route, candidates=tuple(there.index(here[c]) for c in route.candidates))
    assert isinstance(route, int)
    return there.index(here[route])


class Factors(nn.Module):
    """The map from parameters of kernels, expansions and block or identity to probabilities of candidates.

    Parameters that are all equal make all candidates of a position equally likely.
    """

    kernel_mask: Tensor  # (positions, kernels)
    expansion_mask: Tensor  # (positions, expansions)
    block_mask: Tensor  # (positions, 2)
    prior: Tensor  # (positions, 2): the logarithm of how many blocks there are, and 0
    kernel: Tensor  # (positions, candidates): the place of the candidate's kernel
    expansion: Tensor  # (positions, candidates)
    identity: Tensor  # (positions, candidates): 1 for identity, 0 for blocks

    def __init__(self, grids: Sequence[Grid]) -> None:
        super().__init__()
        kernels = [len(grid.kernels) for grid in grids]
        expansions = [len(grid.expansions) for grid in grids]
        blocks = [1 + (None in grid.places) for grid in grids]
        products = torch.tensor([kernels[i] * expansions[i] for i in range(len(grids))])
        prior = torch.stack([products.double().log(), torch.zeros(len(grids))], 1)
        self.register_buffer("prior", prior, persistent=False)
        self.sizes = [max(kernels), max(expansions), 2]
        width = max(len(grid.places) for grid in grids)
        places = torch.zeros(len(grids), width, 3, dtype=torch.int64)
        for i, grid in enumerate(grids):
            for j, place in enumerate(grid.places):
                places[i, j] = torch.tensor((0, 0, 1) if place is None else (*place, 0))
        counts = zip(
            ("kernel_mask", "expansion_mask", "block_mask"), (kernels, expansions, blocks), strict=True
        )
        for (name, there), size in zip(counts, self.sizes, strict=True):
            self.register_buffer(name, torch.arange(size) < torch.tensor(there)[:, None], persistent=False)
        for name, which in zip(("kernel", "expansion", "identity"), places.unbind(2), strict=True):
            self.register_buffer(name, which, persistent=False)

    def log_shares(self, scaled: Tensor) -> list[Tensor]:
        """Return the log-probabilities of kernels, of expansions, and of block and identity."""
        masks = (self.kernel_mask, self.expansion_mask, self.block_mask)
        kernels, expansions, blocks = torch.split(scaled, self.sizes, dim=1)
        # added after the temperature has divided: as it falls, what was equally likely stays so
        parts = (kernels, expansions, blocks + self.prior)
        return [log_probabilities(part, mask) for part, mask in zip(parts, masks, strict=True)]

    def forward(self, scaled: Tensor) -> Tensor:
        """Return the log-probability of each candidate, the sum of its factors': (positions, candidates)."""
        kernels, expansions, blocks = self.log_shares(scaled)
        of_block = kernels.gather(1, self.kernel) + expansions.gather(1, self.expansion)
        return torch.where(self.identity == 1, 0.0, of_block) + blocks.gather(1, self.identity)


def log_probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return log softmax of each position's logits, alpha over the temperature; -inf where masked."""
    return torch.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=1)


def probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the candidates' probabilities, (positions, candidates), rows summing to 1."""
    return log_probabilities(logits, mask).exp()


def sample_path(logits: Tensor, mask: Tensor, generator: Generator) -> list[Route]:
    """Draw one candidate a position from its probabilities."""
    p = probabilities(logits.detach(), mask)
    return list(torch.multinomial(p, 1, generator=generator)[:, 0].tolist())


@dataclass(frozen=True)
class PairSample:
    """A pair a position, drawn for one architecture step. Positions without a choice have no row."""

    rows: Tensor  # (n,) the positions that have a choice
    pairs: Tensor  # (n, 2) candidates
    paths: list[Route]
    conditional: Tensor  # (n, 2) softmax over the pair, with gradient to the logits


def sample_pairs(logits: Tensor, mask: Tensor, generator: Generator) -> PairSample:
    """Draw two candidates a position without replacement, and which of the two is active.

    The gates are straight-through: their value is 0 or 1, their gradient that of the pair's softmax q,
    so dL/dlogit_i = sum_j dL/dg_j q_j (delta_ij - q_i) over the pair.
    """
    rows = torch.nonzero(mask.sum(1) > 1)[:, 0]
    p = probabilities(logits.detach(), mask)[rows]
    # a candidate whose probability underflowed must not make the draw of a second one impossible
    p = p.clamp_min(1e-30) * mask[rows]
    pairs = torch.multinomial(p, 2, generator=generator)
    conditional = torch.softmax(logits[rows].gather(1, pairs), dim=1)
    active = torch.multinomial(conditional.detach(), 1, generator=generator)
    gates = straight_through(conditional, active)
    paths: list[Route] = [0] * len(mask)
    for i, row in enumerate(rows.tolist()):
        first, second = pairs[i].tolist()
        paths[row] = Gated((first, second), int(active[i]), gates[i])
    return PairSample(rows, pairs, paths, conditional)


def straight_through(soft: Tensor, active: Tensor) -> Tensor:
    """Return gates that are 1 at `active`, (n, 1), and 0 elsewhere, with the gradient of `soft`, (n, k)."""
    return torch.zeros_like(soft).scatter(1, active, 1.0) + soft - soft.detach()


@torch.no_grad()
def renormalise_pair(alpha: Tensor, before: Tensor, sample: PairSample, temperature: float = 1.0) -> None:
    """Shift each pair, after an update, so that the other candidates keep their probabilities.

    `before` holds alpha / temperature as it was; only the pairs' entries may have changed. In place.
    """
    rows = sample.rows[:, None]
    old, new = before[rows, sample.pairs], alpha[rows, sample.pairs] / temperature
    shift = torch.logsumexp(new, 1, keepdim=True) - torch.logsumexp(old, 1, keepdim=True)
    alpha[rows, sample.pairs] = (new - shift) * temperature


def candidate_mask(space: SearchSpace) -> Tensor:
    """Return a mask of the candidates that exist, (positions, most candidates of a position), bool."""
    counts = [len(p.candidates) for p in space.positions]
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


class LimitTensors(NamedTuple):
    """Limits side by side, each in its own unit."""

    fixed: Tensor  # (limits,) what every network takes
    cells: Tensor  # (limits, positions, candidates), 0 beyond the candidates
    limit: Tensor  # (limits,)


def limit_tensors(limits: Limits, mask: Tensor) -> LimitTensors:
    """Return limits as float64 tensors."""
    return LimitTensors(
        torch.tensor([limit.fixed for limit in limits], dtype=torch.float64),
        torch.stack([_cells(limit.cells, mask) for limit in limits]),
        torch.tensor([limit.limit for limit in limits], dtype=torch.float64),
    )


def _cells(rows: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    cells = torch.zeros(mask.shape, dtype=torch.float64)
    for row, values in zip(cells, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return cells


def expected_latency(logits: Tensor, mask: Tensor, fixed: Tensor | float, cells: Tensor) -> Tensor:
    """Return E = fixed + sum over positions of sum_i p_i t_i, differentiable, in the cells' unit.

    Of one device: fixed a number, cells (positions, candidates), E a scalar. Of several limits: fixed
    (limits,), cells (limits, positions, candidates), E (limits,).
    """
    return fixed + (probabilities(logits, mask) * cells).sum((-2, -1))


def expected_latency_of_pairs(
    logits: Tensor, mask: Tensor, fixed: Tensor | float, cells: Tensor, sample: PairSample
) -> Tensor:
    """Return E as above, with the gradient of moving probability within the sampled pairs only."""
    total = expected_latency(logits.detach(), mask, fixed, cells)
    rows = sample.rows[:, None]
    mass = probabilities(logits.detach(), mask)[rows, sample.pairs].sum(1)
    within = (mass[:, None] * sample.conditional * cells[..., rows, sample.pairs]).sum((-2, -1))
    return total + within - within.detach()


def even_logits(limits: LimitTensors, mask: Tensor) -> Tensor:
    """Return the logits of the most even probabilities whose expected amounts are within the limits.

    (positions, candidates), float64: the distribution of maximum entropy, `qnas.solver.distributions`.
    """
    fixed, amounts, limit = (part.numpy() for part in limits)
    strengths = max_entropy_strengths(fixed, amounts, limit, mask.numpy())
    cells = limits.cells / limits.limit[:, None, None]
    return -(torch.from_numpy(strengths)[:, None, None] * cells).sum(0)


def largest_ratio(expected: Tensor, limit: Tensor) -> Tensor:
    """Return the largest of E / limit, a scalar, which is the pressure on a search that keeps all limits."""
    return (expected / limit).max()
