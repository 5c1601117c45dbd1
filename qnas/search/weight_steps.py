"""The weight steps of a search: which paths each trains, and on what.

- `path`: drawn paths learn the labels, one unless the settings have more.
- `sandwich`: the largest network of the space learns the labels; the smallest and drawn paths learn its
  answers (the sandwich rule and in-place distillation of BigNAS, arXiv 2003.11142). It teaches, so it need
  not be within the limits. Its answers come from the same forward pass: distillation costs no pass more.
- `whole`: the pretrained network itself learns the labels, or without one the largest network. All others
  are slices of it. A few thousand images fine-tune one network, and do not teach a hundred drawn ones: the
  network that is found then starts from features that are still good.
- With nested weights, the whole mixture may learn the labels in place of a path.
- The first steps of a search with pretrained weights train the classifier alone, on the features of the
  pretrained network: it is the one that the statistics of its batch norms fit.

Over a family of spaces, each step draws a layout: its images have the size of that layout, drawn paths have
its widths, and even ones are within its limits. The largest network of a sandwich has the greatest widths,
and the smallest the least.

The gradients of a step's paths are accumulated and averaged: AdamW divides them by their own size, and the
bound of their norm means the same for any number of paths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qnas.nn.mixed_block import Route
from qnas.nn.supernet import even_logits, sample_path
from qnas.search.paths import ends_of, whole_network
from qnas.search.problem import AtLayout
from qnas.search.state import SearchState
from qnas.spaces.family import Layout
from qnas.training.head_first import head_alone
from qnas.training.losses import mean_loss
from qnas.training.optimizer import descend, divergence


@dataclass(frozen=True)
class Path:
    """A path through the supernet, with the widths of the stages; None: the largest."""

    routes: Sequence[Route]
    channels: tuple[int, ...] | None = None


class WeightSteps:
    """The weight steps of one search. All that later ones depend on is in the state."""

    def __init__(self, state: SearchState) -> None:
        problem = state.problem
        self.state = state
        # (positions, candidates), of the distribution that even paths are drawn from, of each layout if any
        mask = state.supernet.mask
        self._even_logits = even_logits(problem.limit_tensors, mask)
        self._even_at: dict[Layout, Tensor] = {}  # found when a layout is first drawn, as there may be many
        self._ends = ends_of(problem.space, problem.config.seed)
        self._whole = Path(whole_network(problem))
        family = problem.family
        self._narrowest = None if family is None else tuple(map(min, family.family.widths))

    def take(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Take a weight step and return its figures: `loss` on the labels, and `distilled_loss` if any.

        images: (B, channels, H, W), labels: (B,), of this process's part of a batch. Both losses are means.
        """
        state, config = self.state, self.state.problem.config
        state.train()
        even, channels = self._even_logits, None
        if (layout := state.problem.draw_layout(state.generator)) is not None:
            images, even, channels = layout.resized(images), self._even(layout), layout.channels
        largest = Path(self._ends.largest(state.step))
        if state.step < state.problem.schedule.head_steps:
            with head_alone(state.supernet):
                return self._descend(images, labels, [self._whole])
        if config.weight_steps == "whole":
            return self._descend(images, labels, [self._whole])
        if config.weights == "nested" and config.nested_weight_steps == "mixture":
            with torch.no_grad():
                mixture = state.supernet.mixture(state.temperature)
            return self._descend(images, labels, [Path(mixture)])
        drawn = [Path(self._draw(even), channels) for _ in range(config.drawn_paths)]
        if config.weight_steps == "path":
            return self._descend(images, labels, drawn)
        smallest = Path(self._ends.smallest, self._narrowest)
        return self._descend(images, labels, [largest], [*drawn, smallest])

    def _even(self, at: AtLayout) -> Tensor:
        """Return the logits that even paths at a layout are drawn by."""
        if at.layout not in self._even_at:
            self._even_at[at.layout] = even_logits(at.limit_tensors, self.state.supernet.mask)
        return self._even_at[at.layout]

    def _draw(self, even: Tensor) -> list[Route]:
        """Draw the next path; `even` are the logits of paths that are drawn evenly."""
        state = self.state
        if state.fair_paths is not None:
            return state.fair_paths.draw(state.generator)
        is_even = state.problem.config.paths == "even"
        logits = even if is_even else state.logits
        return sample_path(logits, state.supernet.mask, state.generator)

    def _descend(
        self, images: Tensor, labels: Tensor, taught: Sequence[Path], distilled: Sequence[Path] = ()
    ) -> dict[str, float]:
        """Take an optimiser step by paths that learn the labels, and others that learn the last's answers."""
        state, problem = self.state, self.state.problem
        acceleration, smoothing = problem.acceleration, problem.config.label_smoothing
        loss_function = problem.objective.training_loss

        def losses() -> Iterator[Tensor]:
            for path in taught:
                with acceleration.autocast():
                    logits = state.supernet(images, path.routes, path.channels)
                    loss = mean_loss(loss_function, logits, labels, smoothing)
                yield loss
            answers = logits.detach()
            for path in distilled:
                with acceleration.autocast():
                    loss = divergence(state.supernet(images, path.routes, path.channels), answers)
                yield loss

        count = len(taught) + len(distilled)
        found = descend(state.weight_optimizer, losses(), count, scaler=state.scaler, world=problem.world)
        figures = {"loss": float(found[: len(taught)].mean())}
        return figures | ({"distilled_loss": float(found[len(taught) :].mean())} if distilled else {})
