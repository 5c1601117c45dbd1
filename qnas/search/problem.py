"""The problem of a search, constant from its first step to its last, and its schedule."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from qnas.data.batches import batch_count
from qnas.data.image_data import ImageData
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.nn.supernet import LimitTensors, limit_tensors
from qnas.search.config import SearchConfig
from qnas.search.sizes import check_sizes, resize, scaled_px
from qnas.solver.layouts import LimitsOf, Within
from qnas.solver.limits import Limits
from qnas.solver.solve import check_searchable
from qnas.spaces.family import Layout, SpaceFamily, layout_of
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import choose_acceleration
from qnas.training.batch_sizes import check_batch, heldout_batch
from qnas.training.losses import Objective, make_objective
from qnas.training.processes import World

FINAL_TEMPERATURE = 0.3
# Share of the search after which the temperature is final. From then on, the expected latency is kept at the
# budget (`penalty.settle`) and the architecture's learning rate falls linearly to this share of itself
# (FINAL_RATE), since decisions that are still open depend on noise.
ANNEALED_SHARE = 0.85
FINAL_RATE = 0.3
SNAPSHOTS = 60  # times that a search logs all probabilities, spread evenly over it


@dataclass(frozen=True)
class Schedule:
    """The schedule of a search, as a function of the weight steps taken."""

    steps_per_epoch: int
    warmup_steps: int
    total_steps: int
    arch_every: int  # weight steps for each architecture step
    learning_rate: float  # of the architecture, initially
    head_steps: int = 0  # of the warm-up, which train the classifier alone

    @property
    def arch_steps(self) -> int:
        """The number of architecture steps."""
        return (self.total_steps - self.warmup_steps) // self.arch_every

    def has_arch_step(self, step: int) -> bool:
        """Whether an architecture step follows this weight step, counted from 1."""
        searched = step - self.warmup_steps
        return searched > 0 and searched % self.arch_every == 0

    def is_snapshot(self, arch_step: int) -> bool:
        """Whether all probabilities are logged: after the first and last step, and regularly between."""
        return arch_step in (1, self.arch_steps) or arch_step % max(1, self.arch_steps // SNAPSHOTS) == 0

    def progress(self, step: int) -> float:
        """Return how far the search is, from 0 during the warm-up to 1 at its end."""
        return max(0, step - self.warmup_steps) / (self.total_steps - self.warmup_steps)

    def is_settling(self, step: int) -> bool:
        """Whether the search is in its last part, in which the expected latency is kept at the budget."""
        return self.progress(step) >= ANNEALED_SHARE

    def arch_learning_rate(self, step: int) -> float:
        """Return the learning rate of the architecture parameters."""
        settled = max(0.0, self.progress(step) - ANNEALED_SHARE) / (1 - ANNEALED_SHARE)
        return self.learning_rate * (1 - (1 - FINAL_RATE) * settled)

    def temperature(self, step: int) -> float:
        """Return the divisor of the architecture parameters, which falls from 1 during the search.

        With spread-out probabilities, the expected latency can be at the budget while the most probable
        network, all identities, is far below it. With sharp probabilities, both are at the budget.
        """
        return float(FINAL_TEMPERATURE ** min(1.0, self.progress(step) / ANNEALED_SHARE))


@dataclass(frozen=True)
class FamilySearch:
    """A family of spaces to search, and its layouts that have networks within the limits."""

    family: SpaceFamily
    limits_of: LimitsOf
    within: tuple[Within, ...]  # at least one


@dataclass(frozen=True, eq=False)
class AtLayout:
    """A layout of a search: its limits as tensors, the size of its images, and the widths of its stages."""

    layout: Layout
    space: SearchSpace
    limits: Limits
    limit_tensors: LimitTensors
    trained_px: int

    @property
    def channels(self) -> tuple[int, ...]:
        """The widths of the stages."""
        return self.layout.channels

    def resized(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) at the size of this layout."""
        return resize(images, self.trained_px)


class Problem:
    """A space, the limits on its networks, the images, and how to search.

    With a `family`, the space is that of its largest layout, and the limits are those on the mean amounts
    over the layouts; `at` returns the problem of one layout. Without an `objective`, it is that of the
    configuration. Raises ArchError or InfeasibleBudgetError where there is nothing to search, UsageError
    where the machine, the number of processes, the batch size or the size of the images does not fit.
    """

    def __init__(
        self,
        space: SearchSpace,
        limits: Limits,
        data: ImageData,
        config: SearchConfig,
        world: World,
        objective: Objective | None,
        family: FamilySearch | None = None,
        pretrained: PretrainedNetwork | None = None,
    ) -> None:
        if family is None:
            check_searchable(space, limits)
        else:
            check_sizes(space, family.family.resolutions_px, data.resolution_px)
        self.pretrained = pretrained  # what the supernet's weights start from
        self.space, self.data, self.config, self.world = space, data, config, world
        self._set_limits(limits)
        self.family, self.layout = family, layout_of(space)
        self.layouts = _layouts(family, data.resolution_px)
        self.trained_px = data.resolution_px
        self.batch_size = config.batch_size
        check_batch(self.batch_size, len(data.train), world)
        self.arch_batch_size = heldout_batch(self.batch_size, len(data.heldout), world)
        epoch = batch_count(data.train, self.batch_size, drop_last=True)
        warmup_steps = config.warmup_epochs * epoch
        total_steps = warmup_steps + config.search_epochs * epoch
        self.schedule = Schedule(
            epoch,
            warmup_steps,
            total_steps,
            config.arch_every,
            config.arch_learning_rate,
            config.head_epochs * epoch,
        )
        self.objective = objective or make_objective(
            config.loss,
            config.metric,
            data.train.labels,
            len(data.classes),
            config.class_weights,
            config.sampler,
        )
        self.acceleration = choose_acceleration(config.torch_device, config.precision, world.local_rank)

    def _set_limits(self, limits: Limits) -> None:
        self.limits = limits
        self.limit_ms = limits[0].limit  # latency limit on the first device
        self.binds = any(limit.binds for limit in limits)  # whether some network of the space exceeds one
        self.limit_tensors = limit_tensors(limits)

    def at(self, layout: Layout) -> "Problem":
        """Return the problem of one layout of the family: the same images and schedule."""
        (own,) = (each for each in self.layouts if each.layout == layout)
        found = copy(self)
        found.space, found.layout, found.trained_px = own.space, own.layout, own.trained_px
        found._set_limits(own.limits)
        return found

    def draw_layout(self, generator: torch.Generator) -> AtLayout | None:
        """Draw the layout of a step, all equally likely; None, without a draw, where there is no family."""
        if not self.layouts:
            return None
        return self.layouts[int(torch.randint(len(self.layouts), (1,), generator=generator))]


def _layouts(family: FamilySearch | None, resolution_px: int) -> tuple[AtLayout, ...]:
    """Return the layouts of a family; the largest resolution of all has images of `resolution_px`."""
    if family is None:
        return ()
    largest_px = max(family.family.resolutions_px)
    return tuple(
        AtLayout(
            each.layout,
            each.space,
            each.limits,
            limit_tensors(each.limits),
            scaled_px(resolution_px, each.layout.resolution_px, largest_px),
        )
        for each in family.within
    )
