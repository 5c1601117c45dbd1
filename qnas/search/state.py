"""The state of a search: everything that changes from step to step, so that a search can be resumed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from qnas.nn.supernet import Supernet, expected_latency, largest_ratio, log_probabilities
from qnas.search.diagnostics import Watch, make_watch
from qnas.search.penalty import Multiplier
from qnas.search.problem import Problem
from qnas.solver.solve import Scores
from qnas.training.acceleration import compile_blocks
from qnas.training.losses import guessing_loss
from qnas.training.optimizer import PathAdamW, make_optimizer, make_schedule

# Second: ProxylessNAS has 0.999 for searches of many thousand steps; a short one must forget sooner
# how strong the pressure was on the way to the budget.
ARCH_BETAS = (0.0, 0.99)


@dataclass
class SearchState:
    """The weights, the architecture parameters, their optimisers, and the number of steps taken."""

    problem: Problem
    supernet: Supernet
    weights: list[nn.Parameter]  # all parameters but the architecture's
    weight_optimizer: PathAdamW
    scaler: GradScaler  # of the weights' loss; has an effect in float16 only
    weight_schedule: torch.optim.lr_scheduler.LRScheduler
    arch_optimizer: torch.optim.Adam
    multiplier: Multiplier
    generator: torch.Generator  # draws paths and pairs
    watch: Watch
    step: int = 0  # weight steps taken
    arch_step: int = 0

    @property
    def temperature(self) -> float:
        """The divisor of the architecture parameters at this step."""
        return self.problem.schedule.temperature(self.step)

    @property
    def logits(self) -> Tensor:
        """The logits of the candidates' probabilities, (positions, candidates), detached."""
        return self.supernet.logits(self.temperature).detach()

    @property
    def expected(self) -> Tensor:
        """The expected amounts of a network drawn from the probabilities, (limits,)."""
        fixed, cells, _ = self.problem.limit_tensors
        return expected_latency(self.logits, self.supernet.mask, fixed, cells)

    @property
    def expected_ratio(self) -> float:
        """The expected amount over its limit, for the limit where this is largest."""
        return float(largest_ratio(self.expected, self.problem.limit_tensors.limit))

    @property
    def log_probabilities(self) -> Scores:
        """The logarithm of each candidate's probability, by position."""
        return self.log_probabilities_at(self.temperature)

    def log_probabilities_at(self, temperature: float) -> Scores:
        """Return the logarithm of each candidate's probability at another temperature, by position."""
        log_p = log_probabilities(self.supernet.logits(temperature).detach(), self.supernet.mask)
        return tuple(
            tuple(row[: len(position.candidates)].tolist())
            for row, position in zip(log_p, self.problem.space.positions, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        return {
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.weight_schedule.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "multiplier": asdict(self.multiplier),
            "watch": self.watch.to_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "arch_step": self.arch_step,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.supernet.load_state_dict(saved["supernet"])
        self.weight_optimizer.load_state_dict(saved["weight_optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.weight_schedule.load_state_dict(saved["schedule"])
        self.arch_optimizer.load_state_dict(saved["arch_optimizer"])
        self.multiplier = Multiplier(**saved["multiplier"])
        self.watch.load(saved["watch"])
        self.generator.set_state(saved["generator"])
        self.step, self.arch_step = saved["step"], saved["arch_step"]


def initial_state(problem: Problem) -> SearchState:
    """Return the state of a search before its first step."""
    config, schedule, data = problem.config, problem.schedule, problem.data
    classes = len(data.classes)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        supernet = Supernet(problem.space, classes, generator, config.weights)
    supernet.parts.to(problem.acceleration.device)  # the architecture parameters stay on the CPU
    if config.compile:
        compile_blocks(supernet)
    optimizer = make_optimizer(supernet.weights, config.learning_rate, config.weight_decay)
    return SearchState(
        problem=problem,
        supernet=supernet,
        weights=supernet.weights,
        weight_optimizer=optimizer,
        scaler=problem.acceleration.scaler(),
        weight_schedule=make_schedule(optimizer, schedule.total_steps, schedule.steps_per_epoch),
        arch_optimizer=torch.optim.Adam([supernet.alpha], lr=config.arch_learning_rate, betas=ARCH_BETAS),
        multiplier=Multiplier(),
        generator=generator,
        watch=make_watch(
            problem.space,
            problem.limits,
            weight_steps=schedule.total_steps,
            arch_steps=schedule.arch_steps,
            guess=guessing_loss(problem.objective.loss, data.train.labels, classes),
            multiplier_bound=Multiplier().bound,
        ),
    )
