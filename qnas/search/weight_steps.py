"""The weight steps of a search: which paths each trains, and on what.

- `path`: drawn paths learn the labels, one unless the settings have more.
- `sandwich`: the largest network of the space learns the labels; the smallest and drawn paths learn its
  answers (the sandwich rule and in-place distillation of BigNAS, arXiv 2003.11142). It teaches, so it need
  not be within the limits. Its answers come from the same forward pass: distillation costs no pass more.
- With nested weights, the whole mixture may learn the labels in place of a path.
- The first steps of a search with pretrained weights train the classifier alone, on the features of the
  largest network: it is the one that the pretrained statistics of its batch norms fit.

Over a family of spaces, each step draws a layout, which all its paths share: its images have the size of that
layout, and even paths are within its limits.

The gradients of a step's paths are accumulated and averaged: AdamW divides them by their own size, and the
bound of their norm means the same for any number of paths.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qnas.nn.mixed_block import Route
from qnas.nn.supernet import even_logits, sample_path
from qnas.search.paths import ends_of
from qnas.search.state import SearchState
from qnas.training.head_first import head_alone
from qnas.training.losses import mean_loss
from qnas.training.optimizer import descend, divergence

Path = Sequence[Route]


class WeightSteps:
    """The weight steps of one search. All that later ones depend on is in the state."""

    def __init__(self, state: SearchState) -> None:
        problem = state.problem
        self.state = state
        # (positions, candidates), of the distribution that even paths are drawn from, of each layout if any
        mask = state.supernet.mask
        self._even_logits = even_logits(problem.limit_tensors, mask)
        self._even_at = {each.layout: even_logits(each.limit_tensors, mask) for each in problem.layouts}
        self._ends = ends_of(problem.space, problem.config.seed)

    def take(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Take a weight step and return its figures: `loss` on the labels, and `distilled_loss` if any.

        images: (B, channels, H, W), labels: (B,), of this process's part of a batch. Both losses are means.
        """
        state, config = self.state, self.state.problem.config
        state.supernet.train()
        even = self._even_logits
        if (layout := state.problem.draw_layout(state.generator)) is not None:
            images, even = layout.resized(images), self._even_at[layout.layout]
        if state.step < state.problem.schedule.head_steps:
            with head_alone(state.supernet):
                return self._descend(images, labels, [self._ends.largest(state.step)])
        if config.weights == "nested" and config.nested_weight_steps == "mixture":
            with torch.no_grad():
                mixture = state.supernet.mixture(state.temperature)
            return self._descend(images, labels, [mixture])
        drawn = [self._draw(even) for _ in range(config.drawn_paths)]
        if config.weight_steps == "path":
            return self._descend(images, labels, drawn)
        return self._descend(images, labels, [self._ends.largest(state.step)], [*drawn, self._ends.smallest])

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
                    logits = state.supernet(images, path)
                    loss = mean_loss(loss_function, logits, labels, smoothing)
                yield loss
            answers = logits.detach()
            for path in distilled:
                with acceleration.autocast():
                    loss = divergence(state.supernet(images, path), answers)
                yield loss

        count = len(taught) + len(distilled)
        found = descend(state.weight_optimizer, losses(), count, scaler=state.scaler, world=problem.world)
        figures = {"loss": float(found[: len(taught)].mean())}
        return figures | ({"distilled_loss": float(found[len(taught) :].mean())} if distilled else {})
