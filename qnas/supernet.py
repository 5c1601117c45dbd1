"""The supernet: a module for every candidate of every position, and the architecture parameters.

A forward pass is told which paths to run; nothing of an architecture is stored in the modules. The
gradient of the architecture is the two-path form of ProxylessNAS (arXiv 1812.00332): two candidates
are drawn without replacement, one of them is active, and the other's output enters only the gate's
gradient. The latency's gradient is taken over the same pair, so that an update moves probability
between the two alone (`renormalise_pair`) and every candidate, identity too, feels its latency
whenever it is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from qnas.arch import Arch
from qnas.blocks import build_block
from qnas.latency.table import LatencyTable
from qnas.lower import BlockSpec, fill, skeleton
from qnas.space import SearchSpace
from qnas.subnet import build_subnet, module_name, subnet_state

ALPHA_STD = 1e-3  # of the initial architecture parameters, as in ProxylessNAS


@dataclass(frozen=True)
class GatedPair:
    """Two candidates of one position: `gates` is 1 for the active one and 0 for the other."""

    pair: tuple[int, int]
    active: int  # 0 or 1: which of the pair
    gates: Tensor  # (2,), carries the gradient to the architecture


Path = int | GatedPair


class Choice(nn.ModuleDict):
    """The candidates of one position, by name."""

    def __init__(self, blocks: Sequence[tuple[str, BlockSpec]]) -> None:
        super().__init__({name: build_block(block) for name, block in blocks})

    def run_candidate(self, x: Tensor, index: int) -> Tensor:
        """Run one candidate: (B, C_in, H, W) -> (B, C_out, H, W)."""
        y: Tensor = list(self.values())[index](x)
        return y

    def forward(self, x: Tensor, path: Path) -> Tensor:
        """Run the path's candidate; of a pair both, the inactive one for the gates' gradient only."""
        if isinstance(path, int):
            return self.run_candidate(x, path)
        active, inactive = path.active, 1 - path.active
        y = self.run_candidate(x, path.pair[active])
        with torch.no_grad():
            other = self.run_candidate(x, path.pair[inactive])
        return path.gates[active] * y + path.gates[inactive] * other


class Supernet(nn.Module):
    """All networks of a space in one module.

    `alpha` is (positions, most candidates of a position) in float64 on the CPU; entries beyond a
    position's candidates are masked. The weights are every other parameter.
    """

    alpha: nn.Parameter
    mask: Tensor

    def __init__(self, space: SearchSpace, classes: int, generator: Generator) -> None:
        super().__init__()
        self.space = space
        self.parts = nn.ModuleDict()
        for part in skeleton(space, classes=classes):
            if isinstance(part, BlockSpec):
                self.parts[module_name(part)] = build_block(part)
            else:
                blocks = [(c.name, fill(space, part, c)) for c in part.position.candidates]
                self.parts[module_name(blocks[0][1])] = Choice(blocks)
        self.to(memory_format=torch.channels_last)
        counts = [len(p.candidates) for p in space.positions]
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        self.register_buffer("mask", mask, persistent=False)
        alpha = ALPHA_STD * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        self.alpha = nn.Parameter(alpha)

    @property
    def weights(self) -> list[nn.Parameter]:
        """All parameters but the architecture's."""
        return [p for p in self.parameters() if p is not self.alpha]

    def forward(self, x: Tensor, paths: Sequence[Path]) -> Tensor:
        """Run a path a position: (B, channels, H, W) -> (B, classes)."""
        remaining = iter(paths)
        for part in self.parts.values():
            x = part(x, next(remaining)) if isinstance(part, Choice) else part(x)
        assert next(remaining, None) is None, "more paths than positions"
        return x

    def subnet(self, arch: Arch, classes: int) -> nn.Sequential:
        """Return the network of an architecture with a copy of this supernet's weights."""
        network = build_subnet(self.space, arch, classes)
        network.load_state_dict(subnet_state(self.state_dict(), self.space, arch))
        return network


def log_probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return log softmax of each position's logits, alpha over the temperature; -inf where masked."""
    return torch.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=1)


def probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the candidates' probabilities, (positions, candidates), rows summing to 1."""
    return log_probabilities(logits, mask).exp()


def sample_path(logits: Tensor, mask: Tensor, generator: Generator) -> list[Path]:
    """Draw one candidate a position from its probabilities."""
    p = probabilities(logits.detach(), mask)
    return list(torch.multinomial(p, 1, generator=generator)[:, 0].tolist())


@dataclass(frozen=True)
class PairSample:
    """A pair a position, drawn for one architecture step. Positions without a choice have no row."""

    rows: Tensor  # (n,) the positions that have a choice
    pairs: Tensor  # (n, 2) candidates
    paths: list[Path]
    conditional: Tensor  # (n, 2) softmax over the pair, with gradient to the logits


def sample_pairs(logits: Tensor, mask: Tensor, generator: Generator) -> PairSample:
    """Draw two candidates a position without replacement, and which of the two is active.

    The gates are straight-through: their value is 0 or 1, their gradient that of the pair's softmax,
    so dL/dlogit_i = sum_j dL/dg_j q_j (delta_ij - q_i) over the pair.
    """
    rows = torch.nonzero(mask.sum(1) > 1)[:, 0]
    p = probabilities(logits.detach(), mask)[rows]
    # a candidate whose probability underflowed must not make the draw of a second one impossible
    p = p.clamp_min(1e-30) * mask[rows]
    pairs = torch.multinomial(p, 2, generator=generator)
    conditional = torch.softmax(logits[rows].gather(1, pairs), dim=1)
    active = torch.multinomial(conditional.detach(), 1, generator=generator)
    hard = torch.zeros_like(conditional).scatter(1, active, 1.0)
    gates = (hard + conditional - conditional.detach()).to(torch.get_default_dtype())
    paths: list[Path] = [0] * len(mask)
    for i, row in enumerate(rows.tolist()):
        first, second = pairs[i].tolist()
        paths[row] = GatedPair((first, second), int(active[i]), gates[i])
    return PairSample(rows, pairs, paths, conditional)


@torch.no_grad()
def renormalise_pair(alpha: Tensor, before: Tensor, sample: PairSample, temperature: float = 1.0) -> None:
    """Shift each pair, after an update, so that the other candidates keep their probabilities.

    `before` holds alpha / temperature as it was; only the pairs' entries may have changed. In place.
    """
    rows = sample.rows[:, None]
    old, new = before[rows, sample.pairs], alpha[rows, sample.pairs] / temperature
    shift = torch.logsumexp(new, 1, keepdim=True) - torch.logsumexp(old, 1, keepdim=True)
    alpha[rows, sample.pairs] = (new - shift) * temperature


def latency_tensor(table: LatencyTable, mask: Tensor) -> Tensor:
    """Return the table's milliseconds as (positions, candidates) float64, 0 beyond the candidates."""
    cells = np.zeros(tuple(mask.shape))
    for row, values in zip(cells, table.ms, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(cells)


def expected_latency(logits: Tensor, mask: Tensor, fixed_ms: float, cells_ms: Tensor) -> Tensor:
    """Return E = fixed + sum over positions of sum_i p_i t_i in milliseconds, differentiable."""
    return fixed_ms + (probabilities(logits, mask) * cells_ms).sum()


def expected_latency_of_pairs(
    logits: Tensor, mask: Tensor, fixed_ms: float, cells_ms: Tensor, sample: PairSample
) -> Tensor:
    """Return E as above, with the gradient of moving probability within the sampled pairs only."""
    total = expected_latency(logits.detach(), mask, fixed_ms, cells_ms)
    rows = sample.rows[:, None]
    mass = probabilities(logits.detach(), mask)[rows, sample.pairs].sum(1)
    within = (mass[:, None] * sample.conditional * cells_ms[rows, sample.pairs]).sum()
    return total + within - within.detach()
