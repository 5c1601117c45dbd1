"""The search: training of the supernet's weights and its architecture parameters in turn.

The warm-up trains weights only (`search.weight_steps`). After it, an architecture step on held-out images
follows every few weight steps. Batches depend only on the seed and their number, so a resumed search equals
an uninterrupted one.

Over a family of spaces, each step draws a layout. Its images have the size of that layout, and its paths
have the widths. Weight steps draw paths within the limits of the layout. All layouts share the architecture
parameters. Their expected amounts are those of a network at a drawn layout: the means over the layouts, which
the search keeps within the limits.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qnas.data.image_data import ImageData
from qnas.nn.gradients import GRADIENTS
from qnas.nn.modes import gradient_for
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.nn.supernet import expected_latency, largest_ratio
from qnas.search.config import SearchConfig
from qnas.search.penalty import penalised, settle
from qnas.search.problem import FamilySearch, Problem
from qnas.search.state import SearchState
from qnas.search.weight_steps import WeightSteps
from qnas.solver.limits import Limits
from qnas.spaces.space import SearchSpace
from qnas.training.batch_sizes import check_batch_norms
from qnas.training.loop import check_finite, stream
from qnas.training.losses import Objective, mean_loss
from qnas.training.processes import ALONE, World

SETTLING_LOGIT = 0.5  # largest change of a logit in one step of settling

Batches = Iterator[tuple[Tensor, Tensor]]


class Searcher:
    """One search, stepped by `loop.run_to_end`: its problem, its state, and its streams of images."""

    def __init__(
        self,
        space: SearchSpace,
        limits: Limits,
        data: ImageData,
        config: SearchConfig,
        world: World = ALONE,
        objective: Objective | None = None,
        family: FamilySearch | None = None,
        pretrained: PretrainedNetwork | None = None,
    ) -> None:
        self.problem = Problem(space, limits, data, config, world, objective, family, pretrained)
        self.state = SearchState(self.problem)
        batch_size, arch_batch_size = self.problem.batch_size, self.problem.arch_batch_size
        supernet = self.state.supernet
        check_batch_norms(supernet, batch_size, f"`batch_size={batch_size}`", world)
        check_batch_norms(supernet, arch_batch_size, f"{len(data.heldout)} held-out images", world)
        self.schedule = self.problem.schedule
        self.total_steps = self.schedule.total_steps
        self._weight_steps = WeightSteps(self.state)
        self._weight_batches: Batches | None = None
        self._arch_batches: Batches | None = None

    @property
    def is_warming_up(self) -> bool:
        """Whether only weights are trained so far."""
        return self.state.step < self.schedule.warmup_steps

    @property
    def steps_done(self) -> int:
        """Weight steps taken so far."""
        return self.state.step

    @property
    def phase(self) -> str:
        """The phase of the next step."""
        return "warm-up" if self.is_warming_up else "search"

    def to_dict(self) -> dict[str, Any]:
        """Return the state between two steps, as plain values and tensors."""
        return self.state.to_dict()

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.state.load(saved)

    def step(self) -> dict[str, Any]:
        """Take a weight step, and an architecture step when it is due; return what to log.

        The log has figures, and `warnings` if any. Raises TrainingError where a loss is not finite.
        """
        state = self.state
        if self._weight_batches is None or self._arch_batches is None:
            self._weight_batches, self._arch_batches = self._streams()
        figures: dict[str, Any] = dict(self._weight_step(*next(self._weight_batches)))
        for loss in figures.values():
            check_finite(loss, state.step + 1)
        warnings = state.watch.after_weight_step(figures["loss"])
        state.step += 1
        if self.schedule.has_arch_step(state.step):
            figures |= self._arch_step(*next(self._arch_batches))
            check_finite(figures["arch_loss"], state.step)
            state.arch_step += 1
            figures |= state.figures()
            if self.schedule.is_snapshot(state.arch_step):
                rows = state.log_probabilities
                figures["probabilities"] = [[round(math.exp(log_p), 4) for log_p in row] for row in rows]
            warnings += state.watch.after_arch_step(state.sight(figures))
        return figures | ({"warnings": warnings} if warnings else {})

    def summary(self, row: Mapping[str, float]) -> str:
        """Describe a step's figures for the progress display."""
        if "expected_ms" in row:
            return (
                f"loss {row['loss']:.3f}, held-out {row['arch_accuracy']:.1%}, expected "
                f"{row['expected_ms']:.2f} of {self.problem.limit_ms:.2f} ms"
            )
        return f"loss {row['loss']:.3f}" if self.is_warming_up else ""

    def _streams(self) -> tuple[Batches, Batches]:
        """Return the batches of weight and architecture steps, starting from the state's steps."""
        problem, state, seed = self.problem, self.state, self.problem.config.seed
        size, arch_size = problem.batch_size, problem.arch_batch_size
        data, balanced = problem.data, problem.config.sampler == "balanced"
        on: dict[str, Any] = {"device": problem.acceleration.device, "part": problem.world.part}
        return (
            stream(data.train, size, seed, state.step, augment=True, balanced=balanced, **on),
            stream(data.heldout, arch_size, seed + 1, state.arch_step, augment=False, **on),
        )

    def _weight_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Train the weights of the step's paths; return the figures."""
        figures = self._weight_steps.take(images, labels)
        self.state.weight_schedule.step()
        return figures

    def _arch_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Move the architecture parameters; return the loss of the task and the accuracies on the batch."""
        problem, state = self.problem, self.state
        state.train()
        supernet = state.supernet
        config, limits, world = problem.config, problem.limit_tensors, problem.world
        channels = None
        if (layout := problem.draw_layout(state.generator)) is not None:
            images, channels = layout.resized(images), layout.channels
        draw = GRADIENTS[gradient_for(config.weights, config.gradient)]
        step = draw(supernet, state.temperature, state.generator)
        for weight in state.weights:  # weights need no gradients here, which are most of a backward pass
            weight.requires_grad_(False)
        with problem.acceleration.autocast_unscaled():
            logits = supernet(images, step.routes, channels)
            task_loss = mean_loss(problem.objective.ranking_loss, logits, labels)
        # of several limits, the one exceeded most is penalised, as if it were the device's
        ratio = largest_ratio(step.expected(limits), limits.limit)
        (pull,) = torch.autograd.grad(ratio, supernet.alpha, retain_graph=True)
        strength = state.multiplier.strength(float(pull.norm()))  # 0 where the budget does not bind
        limit_ms = problem.limit_ms
        loss = penalised(config.latency_loss, task_loss, ratio * limit_ms, limit_ms, strength)
        (supernet.alpha.grad,) = torch.autograd.grad(loss, supernet.alpha)
        world.average([supernet.alpha.grad])  # the latency's part is the same in all processes
        task_loss, counts = task_loss.detach(), _count_right(logits.detach(), labels)
        world.average([task_loss, counts])
        task_norm = float((supernet.alpha.grad - strength * pull).norm())
        state.arch_optimizer.param_groups[0]["lr"] = problem.schedule.arch_learning_rate(state.step)
        state.arch_optimizer.step()
        step.after_update(supernet)
        for weight in state.weights:
            weight.requires_grad_(True)
        if problem.binds:
            state.multiplier = state.multiplier.after(state.expected_ratio * limit_ms, limit_ms, task_norm)
            if problem.schedule.is_settling(state.step) and config.latency_loss == "multiplier":
                _settle(state)
        right, images = counts
        return {
            "arch_loss": float(task_loss),
            "arch_accuracy": float(right.sum() / images.sum()),
            "arch_balanced_accuracy": float((right / images)[images > 0].mean()),
        }


def _settle(state: SearchState) -> None:
    supernet, temperature = state.supernet, state.temperature
    fixed, cells, limit = state.problem.limit_tensors

    def ratio() -> Tensor:
        expected = expected_latency(supernet.logits(temperature), supernet.mask, fixed, cells)
        return largest_ratio(expected, limit)

    settle(supernet.alpha, ratio, SETTLING_LOGIT * temperature)


def _count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the images of each class that are classified correctly, and all of them: (2, classes)."""
    classes = logits.shape[1]
    right = labels[logits.argmax(1) == labels]
    return torch.stack([torch.bincount(of, minlength=classes) for of in (right, labels)]).float()
