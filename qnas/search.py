"""The search: train the supernet's weights and its architecture in turn, then solve exactly.

Warm-up trains weights only. After it, an architecture step on held-out images follows every few
weight steps. The state between two steps is explicit, so that a run that was stopped goes on as if
it had not been; batches depend only on the seed and their number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas import run
from qnas.arch import Arch
from qnas.data import ImageData, batch_count, batches
from qnas.derive import Scores, Solution, solve
from qnas.errors import ArchError, CheckpointError, UsageError
from qnas.limits import Limits, check_limits
from qnas.penalty import LATENCY_LOSSES, LatencyLoss, Multiplier, penalised
from qnas.space import SearchSpace
from qnas.supernet import (
    Supernet,
    expected_latency,
    expected_latency_of_pairs,
    latency_tensor,
    log_probabilities,
    renormalise_pair,
    sample_pairs,
    sample_path,
)
from qnas.train import (
    Score,
    evaluate,
    make_optimizer,
    make_schedule,
    recalibrate,
    stream,
    weight_step,
)

# Second: ProxylessNAS has 0.999 for searches of many thousand steps; a short one must forget sooner
# how strong the pressure was on the way to the budget.
ARCH_BETAS = (0.0, 0.99)
FINAL_TEMPERATURE = 0.3
ANNEALED_SHARE = 0.85  # of the search, until the temperature is final; the rest lets the latency settle
CALIBRATION_BATCHES = 8  # for batch norms, before a network of the supernet is evaluated


@dataclass(frozen=True)
class SearchConfig:
    """How long and how strongly to search. A preset names a whole set."""

    preset: str
    resolution_px: int  # of training; the latency is always that of the space's own resolution
    warmup_epochs: int
    search_epochs: int
    batch_size: int
    learning_rate: float
    arch_learning_rate: float
    arch_every: int  # weight steps per architecture step
    weight_decay: float = 0.01
    label_smoothing: float = 0.1  # in weight steps only
    latency_loss: LatencyLoss = "multiplier"
    random_networks: int = 10
    threads: int = 0  # of torch; 0 leaves that to torch, which takes all cores
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("resolution_px", "search_epochs", "batch_size", "arch_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')}: expected at least 1, got {getattr(self, name)}")
        if min(self.warmup_epochs, self.random_networks, self.threads) < 0:
            raise UsageError("warm-up epochs, random networks and threads: expected at least 0")
        if self.latency_loss not in LATENCY_LOSSES:
            raise UsageError(
                f"unknown latency loss {self.latency_loss!r}, expected one of {', '.join(LATENCY_LOSSES)}"
            )


# By what is searched on; `preset_for` chooses. All three are for two CPU cores or one GPU.
PRESETS: dict[str, SearchConfig] = {
    # some 1,150 training images of 8 x 8, shown at 32: two minutes
    "digits": SearchConfig(
        "digits",
        resolution_px=32,
        warmup_epochs=15,
        search_epochs=45,
        batch_size=64,
        learning_rate=2e-3,
        arch_learning_rate=0.1,
        arch_every=2,
        threads=1,  # on maps this small a second one gains little, and loses much on a busy machine
    ),
    # Fashion-MNIST, CIFAR-10
    "small": SearchConfig(
        "small",
        resolution_px=32,
        warmup_epochs=4,
        search_epochs=6,
        batch_size=128,
        learning_rate=2e-3,
        arch_learning_rate=0.05,
        arch_every=3,
    ),
    # folders of photographs
    "photos": SearchConfig(
        "photos",
        resolution_px=128,
        warmup_epochs=10,
        search_epochs=30,
        batch_size=64,
        learning_rate=1e-3,
        arch_learning_rate=0.05,
        arch_every=3,
    ),
}

PRESET_OF_DATA = {
    "digits": "digits",
    "fashion-mnist": "small",
    "cifar10": "small",
    "imagefolder": "photos",
}


@dataclass
class SearchState:
    """All that changes from step to step."""

    supernet: Supernet
    weight_optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LRScheduler
    arch_optimizer: torch.optim.Adam
    multiplier: Multiplier
    generator: torch.Generator  # draws paths and pairs
    step: int = 0  # weight steps taken
    arch_step: int = 0


class Searcher:
    """One search, stepped from outside or run to its end."""

    def __init__(self, space: SearchSpace, limits: Limits, data: ImageData, config: SearchConfig) -> None:
        check_searchable(space, limits)
        self.space, self.limits = space, limits
        self.data, self.config = data, config
        table = limits[0].table
        assert table is not None, "the first limit is a device's"
        self.table, self.limit_ms = table, limits[0].limit
        self.binds = any(limit.binds for limit in limits)
        self.batch_size = min(config.batch_size, len(data.train), len(data.heldout))
        self.steps_per_epoch = batch_count(data.train, self.batch_size, drop_last=True)
        self.warmup_steps = config.warmup_epochs * self.steps_per_epoch
        self.total_steps = self.warmup_steps + config.search_epochs * self.steps_per_epoch
        self.state = self._initial_state()
        self.cells_ms = latency_tensor(table, self.state.supernet.mask)
        self._weights = self.state.supernet.weights
        self._weight_batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._arch_batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def _initial_state(self) -> SearchState:
        generator = torch.Generator().manual_seed(self.config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            supernet = Supernet(self.space, len(self.data.classes), generator)
        optimizer = make_optimizer(supernet.weights, self.config.learning_rate, self.config.weight_decay)
        return SearchState(
            supernet=supernet,
            weight_optimizer=optimizer,
            schedule=make_schedule(optimizer, self.total_steps, self.steps_per_epoch),
            arch_optimizer=torch.optim.Adam(
                [supernet.alpha], lr=self.config.arch_learning_rate, betas=ARCH_BETAS
            ),
            multiplier=Multiplier(),
            generator=generator,
        )

    @property
    def is_warming_up(self) -> bool:
        """Whether only weights are trained so far."""
        return self.state.step < self.warmup_steps

    @property
    def steps_done(self) -> int:
        """Weight steps taken so far."""
        return self.state.step

    @property
    def phase(self) -> str:
        """What the next step does."""
        return "warm-up" if self.is_warming_up else "search"

    def to_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, as plain values and tensors."""
        state = self.state
        return {
            "supernet": state.supernet.state_dict(),
            "weight_optimizer": state.weight_optimizer.state_dict(),
            "schedule": state.schedule.state_dict(),
            "arch_optimizer": state.arch_optimizer.state_dict(),
            "multiplier": asdict(state.multiplier),
            "generator": state.generator.get_state(),
            "step": state.step,
            "arch_step": state.arch_step,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises CheckpointError when it is of another search."""
        state = self.state
        try:
            state.supernet.load_state_dict(saved["supernet"])
            state.weight_optimizer.load_state_dict(saved["weight_optimizer"])
            state.schedule.load_state_dict(saved["schedule"])
            state.arch_optimizer.load_state_dict(saved["arch_optimizer"])
            state.multiplier = Multiplier(**saved["multiplier"])
            state.generator.set_state(saved["generator"])
            state.step, state.arch_step = saved["step"], saved["arch_step"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this search: {run.first_line(error)}"
            ) from error

    @property
    def temperature(self) -> float:
        """What the architecture parameters are divided by: from 1 down as the search goes on.

        Probabilities that stay spread have their expected latency at the budget while the most
        probable network, all identities, is far below it. Sharp ones have both at the budget.
        """
        searched = max(0, self.state.step - self.warmup_steps)
        progress = searched / (ANNEALED_SHARE * (self.total_steps - self.warmup_steps))
        return float(FINAL_TEMPERATURE ** min(1.0, progress))

    @property
    def logits(self) -> Tensor:
        """The architecture parameters over the temperature, (positions, candidates), detached."""
        return self.state.supernet.alpha.detach() / self.temperature

    @property
    def expected_ms(self) -> float:
        """The latency expected of a network drawn from the architecture's probabilities."""
        mask = self.state.supernet.mask
        return float(expected_latency(self.logits, mask, self.table.fixed_ms, self.cells_ms))

    def step(self) -> dict[str, float]:
        """Take a weight step, and an architecture step when it is due; return what to log."""
        state, config = self.state, self.config
        if self._weight_batches is None:
            # started here so that a loaded state is respected
            self._weight_batches = stream(
                self.data.train, self.batch_size, config.seed, state.step, augment=True
            )
            self._arch_batches = stream(
                self.data.heldout, self.batch_size, config.seed + 1, state.arch_step, augment=False
            )
        figures = {"loss": self._weight_step(*next(self._weight_batches))}
        searching = not self.is_warming_up
        state.step += 1
        if searching and (state.step - self.warmup_steps) % config.arch_every == 0:
            assert self._arch_batches is not None
            figures["arch_loss"] = self._arch_step(*next(self._arch_batches))
            state.arch_step += 1
            figures["expected_ms"] = self.expected_ms
            figures["multiplier"] = state.multiplier.value
            figures |= self.describe_probabilities()
        return figures

    def summary(self, row: Mapping[str, float]) -> str:
        """Put a step's figures into a few words."""
        if "expected_ms" in row:
            return f"loss {row['loss']:.3f}, expected {row['expected_ms']:.2f} of {self.limit_ms:.2f} ms"
        return f"loss {row['loss']:.3f}" if self.is_warming_up else ""

    def _weight_step(self, images: Tensor, labels: Tensor) -> float:
        state = self.state
        supernet = state.supernet.train()
        paths = sample_path(self.logits, supernet.mask, state.generator)
        loss = weight_step(
            lambda x: supernet(x, paths),
            self._weights,
            state.weight_optimizer,
            images,
            labels,
            self.config.label_smoothing,
        )
        state.schedule.step()
        return float(loss)

    def _arch_step(self, images: Tensor, labels: Tensor) -> float:
        state, supernet = self.state, self.state.supernet.train()
        alpha, mask, temperature = supernet.alpha, supernet.mask, self.temperature
        sample = sample_pairs(alpha / temperature, mask, state.generator)
        for weight in self._weights:  # no gradients of weights: they are most of a backward pass
            weight.requires_grad_(False)
        task_loss = F.cross_entropy(supernet(images, sample.paths), labels)
        expected_ms = expected_latency_of_pairs(
            alpha / temperature, mask, self.table.fixed_ms, self.cells_ms, sample
        )
        (pull,) = torch.autograd.grad(expected_ms / self.limit_ms, alpha, retain_graph=True)
        strength = state.multiplier.strength(float(pull.norm()))  # 0 where the budget does not bind
        loss = penalised(self.config.latency_loss, task_loss, expected_ms, self.limit_ms, strength)
        (alpha.grad,) = torch.autograd.grad(loss, alpha)
        task_norm = float((alpha.grad - strength * pull).norm())
        before = alpha.detach() / temperature
        state.arch_optimizer.step()
        renormalise_pair(alpha, before, sample, temperature)
        for weight in self._weights:
            weight.requires_grad_(True)
        if self.binds:
            state.multiplier = state.multiplier.after(self.expected_ms, self.limit_ms, task_norm)
        return float(task_loss.detach())

    def describe_probabilities(self) -> dict[str, float]:
        """Return the mean entropy a position (nats) and identity's mean share."""
        mask = self.state.supernet.mask
        log_p = log_probabilities(self.logits, mask)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(~mask, 0.0)).sum(1).mean()
        shares = [
            float(p[i, position.names.index("identity")])
            for i, position in enumerate(self.space.positions)
            if "identity" in position.names
        ]
        return {
            "entropy": float(entropy),
            "identity_share": float(np.mean(shares)) if shares else 0.0,
        }

    @property
    def log_probabilities(self) -> Scores:
        """The logarithm of each candidate's probability, by position: what derivation maximises."""
        log_p = log_probabilities(self.logits, self.state.supernet.mask)
        return tuple(
            tuple(row[: len(position.candidates)].tolist())
            for row, position in zip(log_p, self.space.positions, strict=True)
        )

    def derive(self) -> Solution:
        """Solve for the most probable network within the budget."""
        return solve(self.log_probabilities, self.limits)

    def score(self, arch: Arch) -> Score:
        """Evaluate a network with the supernet's weights on the test images."""
        network = self.state.supernet.subnet(arch, len(self.data.classes)).eval()
        train = batches(self.data.train, 128, seed=0)
        recalibrate(network, network, (b for b, _ in zip(train, range(CALIBRATION_BATCHES), strict=False)))
        return evaluate(network, batches(self.data.test, 256))


def check_searchable(space: SearchSpace, limits: Limits) -> None:
    """Raise, before anything is trained, where there is nothing to search or no way to succeed."""
    if space.is_fixed:
        raise ArchError(f"space {space.name} has one network only: there is nothing to search")
    check_limits(limits)


def preset_for(data_kind: str, **changes: Any) -> SearchConfig:
    """Return the preset of a kind of data set, with the given fields changed; None changes nothing."""
    config = PRESETS[PRESET_OF_DATA[data_kind]]
    return replace(config, **{key: value for key, value in changes.items() if value is not None})
