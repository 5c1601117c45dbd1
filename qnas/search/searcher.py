"""The search: the supernet's weights and its architecture are trained in turn.

The warm-up trains weights only. After it, an architecture step on held-out images follows every few
weight steps. Paths are sampled evenly among networks within the limits from beginning to end, so that all
networks are trained alike. Batches depend only on the seed and their number, so that a resumed search equals
an uninterrupted one.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from qnas.data.image_data import ImageData
from qnas.nn.supernet import even_logits
from qnas.search.config import SearchConfig
from qnas.search.figures import budget_figures, probability_figures, rounded_probabilities, sight
from qnas.search.problem import make_problem
from qnas.search.state import initial_state
from qnas.search.steps import take_arch_step, take_weight_step
from qnas.solver.limits import Limits
from qnas.spaces.space import SearchSpace
from qnas.training.loop import check_finite, stream
from qnas.training.losses import Objective
from qnas.training.processes import ALONE, World

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
    ) -> None:
        self.problem = make_problem(space, limits, data, config, world, objective)
        self.state = initial_state(self.problem)
        self.schedule = self.problem.schedule
        self.total_steps = self.schedule.total_steps
        self._even_logits = even_logits(self.problem.limit_tensors, self.state.supernet.mask)
        self._weight_batches: Batches | None = None
        self._arch_batches: Batches | None = None

    @property
    def is_warming_up(self) -> bool:
        """Whether only weights are trained so far."""
        return self.schedule.is_warming_up(self.state.step)

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

        The log has figures, and `warnings` where something goes wrong. Raises TrainingError where a loss
        is not finite.
        """
        state = self.state
        if self._weight_batches is None or self._arch_batches is None:
            self._weight_batches, self._arch_batches = self._streams()
        loss = self._weight_step(*next(self._weight_batches))
        check_finite(loss, state.step + 1)
        figures: dict[str, Any] = {"loss": loss}
        warnings = state.watch.after_weight_step(loss)
        state.step += 1
        if self.schedule.has_arch_step(state.step):
            figures["arch_loss"], figures["arch_accuracy"] = self._arch_step(*next(self._arch_batches))
            check_finite(figures["arch_loss"], state.step)
            state.arch_step += 1
            figures |= budget_figures(state) | probability_figures(state)
            if self.schedule.is_snapshot(state.arch_step):
                figures["probabilities"] = rounded_probabilities(state)
            warnings += state.watch.after_arch_step(sight(state, figures))
        return figures | ({"warnings": warnings} if warnings else {})

    def summary(self, row: Mapping[str, float]) -> str:
        """Describe a step's figures for the progress."""
        if "expected_ms" in row:
            return (
                f"loss {row['loss']:.3f}, held-out {row['arch_accuracy']:.1%}, expected "
                f"{row['expected_ms']:.2f} of {self.problem.limit_ms:.2f} ms"
            )
        return f"loss {row['loss']:.3f}" if self.is_warming_up else ""

    def _streams(self) -> tuple[Batches, Batches]:
        """Return the batches of weight and architecture steps, from those that the state is at."""
        problem, state, seed = self.problem, self.state, self.problem.config.seed
        ours = partial(
            stream,
            batch_size=problem.batch_size,
            device=problem.acceleration.device,
            part=problem.world.part,
        )
        return (
            ours(problem.data.train, seed=seed, start=state.step, augment=True),
            ours(problem.data.heldout, seed=seed + 1, start=state.arch_step, augment=False),
        )

    def _weight_step(self, images: Tensor, labels: Tensor) -> float:
        return take_weight_step(self.state, self._even_logits, images, labels)

    def _arch_step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        return take_arch_step(self.state, images, labels)
