"""The state of a search: everything that changes from step to step, so that a search can be resumed."""

from collections.abc import Mapping
from copy import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qnas.common.errors import UsageError
from qnas.nn.pretrained.start import start_from
from qnas.nn.supernet import Supernet, expected_latency, largest_ratio, log_probabilities
from qnas.search.config import PRETRAINED, SearchConfig
from qnas.search.diagnostics import Sight, make_watch
from qnas.search.paths import FairPaths
from qnas.search.penalty import Multiplier
from qnas.search.problem import Problem
from qnas.solver.solve import Scores
from qnas.spaces.family import Layout
from qnas.training.acceleration import compile_blocks
from qnas.training.losses import guessing_loss
from qnas.training.optimizer import Slow, make_optimizer, make_schedule
from qnas.training.saved_state import check_optimizer, check_unchanged

# The second is 0.999 in ProxylessNAS, whose searches have many thousand steps. A short search must forget
# sooner how strong the pressure was on the way to the budget.
ARCH_BETAS = (0.0, 0.99)


def _pretrained(supernet: Supernet, config: SearchConfig) -> Slow | None:
    """Return the pretrained weights with their own rate, or None. Raises UsageError where there are none."""
    asked = config.changed(PRETRAINED)
    if asked and not supernet.pretrained:
        raise UsageError(f"{asked}: the supernet has no pretrained weights: leave it out")
    if config.pretrained_rate == 1:
        return None
    weights = [weight for name, weight in supernet.named_parameters() if name in supernet.pretrained]
    return Slow(weights, config.pretrained_rate)


class SearchState:
    """The weights, the architecture parameters, their optimisers, and the number of steps taken."""

    def __init__(self, problem: Problem) -> None:
        config, schedule, classes = problem.config, problem.schedule, len(problem.data.classes)
        self.problem = problem
        self.step = self.arch_step = 0  # weight steps and architecture steps taken
        self.generator = torch.Generator().manual_seed(config.seed)  # draws paths and pairs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            family = None if problem.family is None else problem.family.family
            self.supernet = Supernet(problem.space, classes, self.generator, config.weights, family)
            if problem.pretrained is not None:
                start_from(self.supernet, problem.pretrained)
        # the architecture parameters stay on the CPU
        self.supernet.parts.to(problem.acceleration.device)
        if config.compile:
            compile_blocks(self.supernet)
        self.weights = self.supernet.weights  # all parameters except the architecture's
        self.fair_paths = (
            FairPaths(problem.space, problem.limit_tensors, self.supernet.mask, config.seed)
            if config.paths == "fair"
            else None
        )
        self.weight_optimizer = make_optimizer(
            self.weights, config.learning_rate, config.weight_decay, slow=_pretrained(self.supernet, config)
        )
        self.scaler = problem.acceleration.scaler()  # of the weights' loss, with an effect in float16 only
        self.weight_schedule = make_schedule(
            self.weight_optimizer, schedule.total_steps, schedule.steps_per_epoch, schedule.head_steps
        )
        self.arch_optimizer = torch.optim.Adam(
            [self.supernet.alpha], lr=config.arch_learning_rate, betas=ARCH_BETAS
        )
        self.multiplier = Multiplier()
        self.watch = make_watch(
            problem.space,
            problem.limits,
            weight_steps=schedule.total_steps,
            arch_steps=schedule.arch_steps,
            guess=guessing_loss(problem.objective.training_loss, problem.data.train.labels, classes),
            multiplier_bound=self.multiplier.bound,
        )

    def at(self, layout: Layout) -> "SearchState":
        """Return a view of the state at one layout of the family: with its space and its limits."""
        found = copy(self)
        found.problem = self.problem.at(layout)
        return found

    def train(self) -> None:
        """Set the supernet to training, if it is not: a walk over its modules takes a tenth of a step."""
        if not self.supernet.training:
            self.supernet.train()

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

    def figures(self) -> dict[str, float]:
        """Return the figures that are logged after an architecture step.

        They are the expected amounts of all limits, the multiplier and the temperature; the mean entropy per
        position (nats), and the mean probability of identity where it is one of several candidates.
        """
        problem, expected, mask = self.problem, self.expected, self.supernet.mask
        ratios = (expected / problem.limit_tensors.limit).tolist()
        log_p = log_probabilities(self.logits, mask)
        identities = self._shares().get("identity", [])
        return {
            "expected_ms": float(expected[0]),
            "limit_ms": problem.limit_ms,
            **{f"of_limit_{limit.name}": ratio for limit, ratio in zip(problem.limits, ratios, strict=True)},
            "multiplier": self.multiplier.value,
            "temperature": self.temperature,
            "entropy": float(-(log_p.exp() * log_p.masked_fill(~mask, 0.0)).sum(1).mean()),
            "identity_share": sum(identities) / len(identities) if identities else 0.0,
        }

    def sight(self, figures: Mapping[str, float]) -> Sight:
        """Return the input of the diagnostics after an architecture step with these figures."""
        schedule = self.problem.schedule
        choices = sum(len(position.names) > 1 for position in self.problem.space.positions)
        return Sight(
            progress=schedule.progress(self.step),
            settling=schedule.is_settling(self.step),
            ratio=self.expected_ratio,
            shares={name: sum(found) / choices for name, found in self._shares().items()},
            **{name: figures[name] for name in ("multiplier", "entropy", "identity_share")},
        )

    def _shares(self) -> dict[str, list[float]]:
        """Return each candidate's probability at every position where it is one of several, by name."""
        p = log_probabilities(self.logits, self.supernet.mask).exp().tolist()
        found: dict[str, list[float]] = {}
        for row, position in zip(p, self.problem.space.positions, strict=True):
            if len(position.names) > 1:
                for name, share in zip(position.names, row, strict=False):
                    found.setdefault(name, []).append(share)
        return found

    def _parts(self) -> dict[str, Any]:
        """Return the parts that have a `state_dict`, by their names in a checkpoint."""
        return {
            "supernet": self.supernet,
            "weight_optimizer": self.weight_optimizer,
            "scaler": self.scaler,
            "schedule": self.weight_schedule,
            "arch_optimizer": self.arch_optimizer,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        fair = {} if self.fair_paths is None else {"fair_counts": list(self.fair_paths.counts)}
        return {name: part.state_dict() for name, part in self._parts().items()} | {
            **fair,
            "multiplier": asdict(self.multiplier),
            "watch": self.watch.to_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "arch_step": self.arch_step,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state. Raises ValueError where it is not of this search."""
        check_optimizer(saved["weight_optimizer"], self.weight_optimizer, "weight_optimizer")
        check_optimizer(saved["arch_optimizer"], self.arch_optimizer, "arch_optimizer")
        check_unchanged(saved["schedule"], self.weight_schedule.state_dict(), "schedule")
        if saved["step"] < 0 or saved["arch_step"] < 0:
            raise ValueError(f"step {saved['step']}, architecture step {saved['arch_step']}")
        if self.fair_paths is not None:
            if min(saved["fair_counts"]) < 0:
                raise ValueError(f"fair_counts: {min(saved['fair_counts'])} blocks at a place")
            self.fair_paths.counts = list(saved["fair_counts"])
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        self.multiplier = Multiplier(**saved["multiplier"])
        self.watch.load(saved["watch"])
        self.generator.set_state(saved["generator"])
        self.step, self.arch_step = saved["step"], saved["arch_step"]
