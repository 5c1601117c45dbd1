"""The supernet: all networks of a space in one module, and the architecture parameters.

`qnas.nn.mixed_block` holds the weights of a position's candidates and runs them. A forward pass takes a
route for each position, and the width of each stage where a family has several; the modules store no
architecture. The weights are those of the widest network. Narrower ones have slices of them, in the blocks
between positions too. This module holds the architecture parameters, the probabilities that follow from them,
the sampling of paths, and the expected latency.

With independent and shared weights, a position has one parameter for each candidate, and the softmax of these
is the candidates' probabilities. With nested weights, it has parameters for each kernel, for each expansion,
and for block or identity, and a candidate's probability is the product of three probabilities.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qnas.common.errors import UsageError
from qnas.nn.blocks import build_block
from qnas.nn.mixed_block import (
    Choice,
    FactoredMixture,
    Gated,
    Grid,
    NestedChoice,
    Route,
    SharedChoice,
    grid_of,
    make_choice,
)
from qnas.nn.modes import WeightsMode
from qnas.nn.slices import Borrower
from qnas.nn.subnet import build_subnet, module_name, subnet_state
from qnas.solver.distributions import max_entropy_strengths
from qnas.solver.limits import Limits
from qnas.spaces.arch import Arch
from qnas.spaces.block_order import Labels, block_labels, take_first_places
from qnas.spaces.family import Layout, SpaceFamily, layout_of
from qnas.spaces.lower import BlockSpec, Slot, skeleton
from qnas.spaces.space import SearchSpace

ALPHA_STD = 1e-3  # standard deviation of initial architecture parameters, as in ProxylessNAS


class Supernet(nn.Module):
    """All networks of a space in one module.

    `alpha` holds the architecture parameters, float64 on the CPU, one row for each position: (positions,
    candidates), or (positions, kernels + expansions + 2) with nested weights. Surplus entries of a row have
    no effect. All other parameters are weights. With a `family` whose stages have several widths, `space` is
    that of its largest layout, and the networks are those at all widths. Raises UsageError if `weights` does
    not fit the space or the family.

    `pretrained` are the names of the parameters that `pretrained.start.start_from` has set; none otherwise.
    """

    alpha: nn.Parameter
    pretrained: frozenset[str]
    mask: Tensor  # (positions, candidates): which candidates exist

    def __init__(
        self,
        space: SearchSpace,
        classes: int,
        generator: Generator,
        weights: WeightsMode = "independent",
        family: SpaceFamily | None = None,
    ) -> None:
        super().__init__()
        if family is not None and family.has_widths and weights != "shared":
            raise UsageError(
                f"`weights={weights!r}`: {family.name} has several widths, whose weights are slices of the "
                "largest: search with `weights='shared'`"
            )
        self.space, self.family, self.classes = space, family, classes
        self.pretrained = frozenset()
        self.labels = block_labels(space)
        self.parts = nn.ModuleDict()
        self._widest: dict[str, _Key] = {}
        for part in skeleton(space, classes=classes):
            self._widest[_key(part)[0]] = _key(part)
            if isinstance(part, BlockSpec):
                self.parts[module_name(part)] = build_block(part)
            else:
                self.parts[module_name(part.position)] = make_choice(space, part, weights)
        # the parts at other widths, which borrow tensors and modes: no submodules, as there may be thousands
        self._narrower: dict[_Key, nn.Module] = {}
        self._chains: dict[tuple[int, ...], list[nn.Module]] = {}
        self.to(memory_format=torch.channels_last)
        mask = candidate_mask(space)
        self.register_buffer("mask", mask, persistent=False)
        self.factors = Factors([grid_of(space, p) for p in space.positions]) if weights == "nested" else None
        shape = (len(mask), mask.shape[1] if self.factors is None else sum(self.factors.sizes))
        alpha = ALPHA_STD * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.alpha = nn.Parameter(alpha)

    @property
    def weights(self) -> list[nn.Parameter]:
        """All parameters except the architecture parameters."""
        return [p for p in self.parameters() if p is not self.alpha]

    def logits(self, temperature: float = 1.0) -> Tensor:
        """Return the logits of each position's candidates, (positions, candidates)."""
        scaled = self.alpha / temperature
        return scaled if self.factors is None else self.factors(scaled)

    def mixture(self, temperature: float = 1.0) -> list[Route]:
        """Return the differentiable mixture of all candidates at each position; nested weights only."""
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

    def forward(self, x: Tensor, routes: Sequence[Route], channels: tuple[int, ...] | None = None) -> Tensor:
        """Run one route at each position: (B, channels, H, W) -> (B, classes).

        `channels` are the widths of the stages, by default the largest. If each route has one active
        candidate, the routes whose active candidate is a block run in the first positions of their stage
        (`qnas.spaces.block_order`).
        """
        remaining = iter(_blocks_first(self.labels, routes))
        for part in self._parts_at(channels):
            x = part(x, next(remaining)) if isinstance(part, Choice) else part(x)
        assert next(remaining, None) is None, "more routes than positions"
        return x

    def _parts_at(self, channels: tuple[int, ...] | None) -> Iterable[nn.Module]:
        """Return the modules of all parts at these widths, which are made when they are first needed."""
        if channels is None or channels == layout_of(self.space).channels:
            return self.parts.values()
        if channels not in self._chains:
            assert self.family is not None, "a space has one width"
            space = self.family.at(Layout(self.space.input.resolution_px, channels))
            self._chains[channels] = [
                self._part_at(space, part) for part in skeleton(space, classes=self.classes)
            ]
        return self._chains[channels]

    def _part_at(self, space: SearchSpace, part: BlockSpec | Slot) -> nn.Module:
        """Return the module of a part in the space of another layout, whose weights are slices."""
        key = _key(part)
        if key not in self._narrower:
            whole = self.parts[key[0]]
            if key == self._widest[key[0]]:
                self._narrower[key] = whole
            elif isinstance(part, Slot):
                assert isinstance(whole, SharedChoice)
                self._narrower[key] = whole.narrowed(space, part)
            else:
                self._narrower[key] = Borrower(part, whole, part.name)
        return self._narrower[key]

    def subnet(self, arch: Arch, classes: int, space: SearchSpace | None = None) -> nn.Sequential:
        """Return the network of an architecture with copies of this supernet's weights.

        `space` is that of the architecture's layout in the family, by default the largest.
        """
        space = self.space if space is None else space
        network = build_subnet(space, arch, classes)
        network.load_state_dict(subnet_state(self.state_dict(), space, arch))
        return network


_Key = tuple[str, int, int]


def _key(part: BlockSpec | Slot) -> _Key:
    """Return the name of a part's module, and its channels before and after it."""
    if isinstance(part, Slot):
        return module_name(part.position), part.position.c_in, part.position.c_out
    return module_name(part), part.layers[0].c_in, part.layers[-1].c_out


def _blocks_first(labels: Labels, routes: Sequence[Route]) -> list[Route]:
    """Return the routes with blocks first. Mixtures, which have no active candidate, stay in place."""
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
    """Translate a route from a position whose candidates have labels `here` to one with labels `there`."""
    if here == there:
        return route
    if isinstance(route, Gated):
        return replace(route, candidates=tuple(there.index(here[c]) for c in route.candidates))
    assert isinstance(route, int)
    return there.index(here[route])


class Factors(nn.Module):
    """The map from parameters of kernels, expansions and block or identity to candidates' probabilities.

    If all parameters are equal, all candidates of a position are equally likely.
    """

    kernel_mask: Tensor  # (positions, kernels)
    expansion_mask: Tensor  # (positions, expansions)
    block_mask: Tensor  # (positions, 2)
    prior: Tensor  # (positions, 2): the logarithm of the number of blocks, and 0
    kernel: Tensor  # (positions, candidates): index of the candidate's kernel
    expansion: Tensor  # (positions, candidates): index of its expansion
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
        places = pad_sequence(
            [torch.tensor([(*(p or (0, 0)), int(p is None)) for p in grid.places]) for grid in grids],
            batch_first=True,
        )
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
        # added after dividing by the temperature, so that equally likely candidates stay so as it falls
        parts = (kernels, expansions, blocks + self.prior)
        return [log_probabilities(part, mask) for part, mask in zip(parts, masks, strict=True)]

    def forward(self, scaled: Tensor) -> Tensor:
        """Return each candidate's log-probability, the sum over its factors: (positions, candidates)."""
        kernels, expansions, blocks = self.log_shares(scaled)
        of_block = kernels.gather(1, self.kernel) + expansions.gather(1, self.expansion)
        return torch.where(self.identity == 1, 0.0, of_block) + blocks.gather(1, self.identity)


def log_probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the log softmax of each position's logits, which include the temperature; -inf where masked."""
    return torch.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=1)


def probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the candidates' probabilities, (positions, candidates), rows summing to 1."""
    return log_probabilities(logits, mask).exp()


def sample_path(logits: Tensor, mask: Tensor, generator: Generator) -> list[Route]:
    """Draw one candidate at each position by the probabilities."""
    p = probabilities(logits.detach(), mask)
    return list(torch.multinomial(p, 1, generator=generator)[:, 0].tolist())


@dataclass(frozen=True)
class PairSample:
    """A pair of candidates for each position that has a choice, drawn for one architecture step."""

    rows: Tensor  # (n,) the positions with a choice
    pairs: Tensor  # (n, 2) candidates
    paths: list[Route]
    conditional: Tensor  # (n, 2) softmax over the pair, with gradient to the logits


def sample_pairs(logits: Tensor, mask: Tensor, generator: Generator) -> PairSample:
    """Draw two candidates at each position without replacement, and the active one of the two.

    The gates are straight-through: their values are 0 or 1, and their gradient is that of the pair's softmax
    q, so dL/dlogit_i = sum_j dL/dg_j q_j (delta_ij - q_i) over the pair.
    """
    rows = torch.nonzero(mask.sum(1) > 1)[:, 0]
    p = probabilities(logits.detach(), mask)[rows]
    # if a probability underflowed, a second candidate must still be drawn
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
    """Shift each pair after an update so that the other candidates keep their probabilities.

    `before` holds alpha / temperature before the update, which may only have changed the pairs. In place.
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
    """The limits of a search as tensors, each limit in its own unit."""

    fixed: Tensor  # (limits,) what the fixed layers of every network take
    cells: Tensor  # (limits, positions, candidates), 0 beyond the candidates
    limit: Tensor  # (limits,)


def limit_tensors(limits: Limits) -> LimitTensors:
    """Convert limits to float64 tensors."""
    cells = [[torch.tensor(row, dtype=torch.float64) for row in limit.cells] for limit in limits]
    return LimitTensors(
        torch.tensor([limit.fixed for limit in limits], dtype=torch.float64),
        torch.stack([pad_sequence(rows, batch_first=True) for rows in cells]),
        torch.tensor([limit.limit for limit in limits], dtype=torch.float64),
    )


def expected_latency(logits: Tensor, mask: Tensor, fixed: Tensor | float, cells: Tensor) -> Tensor:
    """Return E = fixed + sum over positions of sum_i p_i t_i, differentiable, in the cells' unit.

    For one limit: fixed is a number, cells (positions, candidates), E a scalar. For several limits: fixed
    (limits,), cells (limits, positions, candidates), E (limits,).
    """
    return fixed + (probabilities(logits, mask) * cells).sum((-2, -1))


def expected_latency_of_pairs(
    logits: Tensor, mask: Tensor, fixed: Tensor | float, cells: Tensor, sample: PairSample
) -> Tensor:
    """Return the expected latency, differentiable only with respect to shifts within the sampled pairs."""
    total = expected_latency(logits.detach(), mask, fixed, cells)
    rows = sample.rows[:, None]
    mass = probabilities(logits.detach(), mask)[rows, sample.pairs].sum(1)
    within = (mass[:, None] * sample.conditional * cells[..., rows, sample.pairs]).sum((-2, -1))
    return total + within - within.detach()


def even_logits(limits: LimitTensors, mask: Tensor) -> Tensor:
    """Return the logits of the maximum-entropy probabilities whose expected amounts are within the limits.

    (positions, candidates), float64. See `qnas.solver.distributions`.
    """
    fixed, amounts, limit = (part.numpy() for part in limits)
    strengths = max_entropy_strengths(fixed, amounts, limit, mask.numpy())
    cells = limits.cells / limits.limit[:, None, None]
    return -(torch.from_numpy(strengths)[:, None, None] * cells).sum(0)


def largest_ratio(expected: Tensor, limit: Tensor) -> Tensor:
    """Return the largest E / limit, a scalar: the pressure on a search that must keep all limits."""
    return (expected / limit).max()
