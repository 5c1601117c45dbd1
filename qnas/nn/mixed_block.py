"""The module of one position with its candidate operations, and the routes through it.

There are three weight sharing modes:

- independent: a module for each candidate, as in ProxylessNAS (arXiv 1812.00332);
- shared: the largest module of each kind of block. A candidate's weights are slices of its tensors: the
  centres of kernels and the leading channels (as in Once-for-All, arXiv 1908.09791). Identity has no weights.
  QuadraBlocks with different neurons are different kinds and share nothing, not even pointwise convolutions:
  their inputs are distributed differently, and factors of a product do not serve as terms of a sum;
- nested: shared weights, where the candidates form a grid of kernels and expansions. All candidates together
  cost one pass of the largest (`qnas.nn.kernels.block`).

A nested mixture mixes each half of the block by itself: x + (1 - P(identity)) sum_k P(k)
mixer_k(x), then the same with the expansions. It is not a mixture of whole blocks with one probability
each: the channel half gets the mixed mixers' output, and P(k, e) is the product P(k) P(e) (1 -
P(identity)). If all three probabilities are 0 or 1, both mixtures are a single block.

If weights are slices, a sampled path has a gradient of zero in the rest of a tensor. An optimiser with
momentum still changes the rest.

A module takes the route to run as an argument and stores no architecture.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qnas.common.errors import UsageError
from qnas.nn.blocks import QuadraBlock, build_block
from qnas.nn.kernels.block import nested_channel_half, nested_mixer_half
from qnas.nn.modes import WeightsMode
from qnas.nn.slices import Borrower
from qnas.spaces.blocks import BLOCKS
from qnas.spaces.lower import BlockSpec, Slot, fill
from qnas.spaces.neurons import DEFAULT_NEURON
from qnas.spaces.space import Candidate, Position, SearchSpace


@dataclass(frozen=True)
class Gated:
    """Several candidates, one of them active: its gate is 1 and the other gates are 0.

    The output is that of the active candidate. The outputs of the others only enter the gates' gradient,
    dL/dg_k = sum(o_k . dL/dy), and are computed in the backward pass, which saves memory.
    """

    candidates: tuple[int, ...]
    active: int  # index in `candidates`
    gates: Tensor  # (candidates,), carries the gradient to the architecture


@dataclass(frozen=True)
class Mixture:
    """All candidates of a position, weighted by their shares as in DARTS (arXiv 1806.09055)."""

    shares: Tensor  # (candidates,)


@dataclass(frozen=True)
class FactoredMixture:
    """All candidates of a position with nested weights."""

    kernels: Tensor  # (kernels,) shares, smallest kernel first, with sum 1
    expansions: Tensor  # (expansions,) shares, likewise
    block: Tensor  # scalar: the share that is not identity


Route = int | Gated | Mixture | FactoredMixture  # a number is the index of a candidate that runs alone


class Choice(nn.Module, ABC):
    """The module of one position, with all its candidates."""

    @abstractmethod
    def run_candidate(self, x: Tensor, index: int) -> Tensor:
        """Run one candidate: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """Run a route: (B, C_in, H, W) -> (B, C_out, H, W)."""
        if isinstance(route, int):
            return self.run_candidate(x, route)
        if isinstance(route, Gated):
            y = self.run_candidate(x, route.candidates[route.active])
            gated: Tensor = _Gate.apply(y, route.gates, x.detach(), self, route)
            return gated
        if isinstance(route, Mixture):
            outputs = (share.to(x) * self.run_candidate(x, i) for i, share in enumerate(route.shares))
            return torch.stack(list(outputs)).sum(0)
        assert isinstance(self, NestedChoice), "only nested weights have a factored mixture"
        return self.run_mixture(x, route)


class _Gate(torch.autograd.Function):
    """The active candidate's output unchanged, with a gradient of the gates from all candidates' outputs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, x: Tensor, choice: Choice, route: Gated) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.choice, ctx.route = choice, route
        device = x.device.type
        ctx.casts = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x = ctx.saved_tensors
        route: Gated = ctx.route
        products = []
        with torch.autocast(x.device.type, **ctx.casts):  # not active in backward passes
            for i, index in enumerate(route.candidates):
                output = y if i == route.active else ctx.choice.run_candidate(x, index)
                dtype = torch.promote_types(grad.dtype, torch.float32)
                products.append((grad * output).sum(dtype=dtype))
        return grad, torch.stack(products).to(route.gates), None, None, None


class IndependentChoice(Choice):
    """A module for each candidate, named after it."""

    def __init__(self, blocks: Sequence[tuple[str, BlockSpec]]) -> None:
        super().__init__()
        for name, block in blocks:
            self.add_module(name, build_block(block))

    def run_candidate(self, x: Tensor, index: int) -> Tensor:
        """See Choice."""
        y: Tensor = list(self.children())[index](x)
        return y


class LentChoice(Choice):
    """Candidates without tensors of their own, each a slice of a largest module of its kind (`nn.slices`)."""

    def __init__(self, space: SearchSpace, slot: Slot, lenders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict()
        for candidate in slot.position.candidates:
            block = fill(space, slot, candidate)
            self.candidates[candidate.name] = Borrower(block, lenders.get(block.kind), candidate.name)

    def run_candidate(self, x: Tensor, index: int) -> Tensor:
        """See Choice. Batch norm statistics are slices too, and are updated in place."""
        y: Tensor = list(self.candidates.children())[index](x)
        return y


class SharedChoice(LentChoice):
    """The largest module of each kind of block (`shared`), of which the candidates are slices.

    Candidates at narrower widths are slices of the same modules: `narrowed`.
    """

    def __init__(self, space: SearchSpace, slot: Slot) -> None:
        candidates = slot.position.candidates
        alone = sorted({c.block for c in candidates if not BLOCKS[c.block].shares_weights})
        if alone:
            raise UsageError(
                f"block {', '.join(alone)} does not say which of its parameters are slices of the largest: "
                "search with `weights='independent'`"
            )
        # drawn once for each candidate, the last of a kind counts: searches keep their results
        lenders = {
            candidate.kind: build_block(block)
            for candidate in candidates
            if (block := fill(space, slot, _largest(candidate.kind, candidates))).layers
        }
        super().__init__(space, slot, lenders)
        self.shared = nn.ModuleDict(lenders)  # `subnet.subnet_state` relies on this name

    def narrowed(self, space: SearchSpace, slot: Slot) -> LentChoice:
        """Return the candidates of a slot with no more channels, whose weights are slices of these."""
        return LentChoice(space, slot, dict(self.shared.items()))


def _largest(kind: str, candidates: Sequence[Candidate]) -> Candidate:
    """Return a candidate of a kind with the maximum of each size (kernel, expansion)."""
    same = [c for c in candidates if c.kind == kind]
    sizes = {name: max(c.sizes[name] for c in same) for name in same[0].sizes}
    return Candidate(block=same[0].block, **{**same[0].parameters, **sizes})


@dataclass(frozen=True)
class Grid:
    """Candidates that are the product of kernels and expansions, and possibly identity."""

    kernels: tuple[int, ...]  # ascending
    expansions: tuple[int, ...]  # ascending
    # for each candidate, the indices of its kernel and expansion; None for identity
    places: tuple[tuple[int, int] | None, ...]


def grid_of(space: SearchSpace, position: Position) -> Grid:
    """Return a position's candidates as a grid. A single candidate always forms one.

    Raises UsageError if the weights of this position cannot be nested.
    """
    candidates = position.candidates
    if len(candidates) == 1:
        return Grid((1,), (1,), ((0, 0),))
    blocks = [c for c in candidates if c.block != "identity"]
    are_quadra = len({c.kind for c in blocks}) == 1 and _can_be_nested(space, blocks[0])
    sizes = [(c.sizes["kernel"], c.sizes["expansion"]) if are_quadra else (1, 1) for c in blocks]
    kernels, expansions = (tuple(sorted({size[i] for size in sizes})) for i in (0, 1))
    if not are_quadra or len(blocks) != len(kernels) * len(expansions) or not blocks:
        raise UsageError(
            f"position {position.name} of space {space.name} cannot have nested weights: its candidates "
            f"({', '.join(position.names)}; {space.norm}, {space.activation}) are not all combinations of "
            "kernels and expansions of QuadraBlocks (neuron quadranet) with layer normalisation and GELU; "
            "`weights='shared'` takes all blocks that say how their weights are shared"
        )
    places = tuple(
        None
        if c.block == "identity"
        else (kernels.index(c.sizes["kernel"]), expansions.index(c.sizes["expansion"]))
        for c in candidates
    )
    return Grid(kernels, expansions, places)


def _can_be_nested(space: SearchSpace, candidate: Candidate) -> bool:
    """Whether it is a QuadraBlock with QuadraNet's neuron, layer normalisation and GELU."""
    words = space.settle(candidate)
    nested = {"neuron": DEFAULT_NEURON, "norm": "layernorm", "act": "gelu"}
    return candidate.block == "quadra" and words | nested == words


class NestedChoice(SharedChoice):
    """Shared weights with candidates that form a grid and can all run in one pass."""

    def __init__(self, space: SearchSpace, slot: Slot) -> None:
        super().__init__(space, slot)
        self.grid = grid_of(space, slot.position)

    def run_mixture(self, x: Tensor, route: FactoredMixture) -> Tensor:
        """Run the relaxed block: (B, C, H, W) -> (B, C, H, W)."""
        block = cast(QuadraBlock, next(iter(self.shared.values())))  # of the only kind
        mixer, channels, eps = block.halves()
        kernels, expansions, share = (
            shares.to(block.expand.weight) for shares in (route.kernels, route.expansions, route.block)
        )
        x = nested_mixer_half(x, *mixer, share * kernels, self.grid.kernels, eps=eps)
        # the probability that each hidden channel is used: (expansions,) -> (E,)
        at_least, sizes = expansions.flip(0).cumsum(0).flip(0), self.grid.expansions
        added = [x.shape[1] * (e - before) for e, before in zip(sizes, (0, *sizes), strict=False)]
        gates = at_least.repeat_interleave(torch.tensor(added, device=at_least.device))
        return nested_channel_half(x, *channels, gates, share, eps=eps)


def make_choice(space: SearchSpace, slot: Slot, weights: WeightsMode) -> Choice:
    """Build the module of a position with random weights. Raises UsageError if `weights` does not fit."""
    if weights == "independent":
        candidates = slot.position.candidates
        return IndependentChoice([(c.name, fill(space, slot, c)) for c in candidates])
    return (NestedChoice if weights == "nested" else SharedChoice)(space, slot)
