"""The problem of a search, constant from its first step to its last, and its schedule."""

from dataclasses import dataclass

from qnas.data.batches import batch_count
from qnas.data.image_data import ImageData
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.nn.supernet import limit_tensors
from qnas.search.config import SearchConfig
from qnas.solver.limits import Limits
from qnas.solver.solve import check_searchable
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


class Problem:
    """A space, the limits on its networks, the images, and how to search.

    Without an `objective`, it is that of the configuration. Raises ArchError or InfeasibleBudgetError where
    there is nothing to search, UsageError where the machine, the number of processes or the batch size does
    not fit.
    """

    def __init__(
        self,
        space: SearchSpace,
        limits: Limits,
        data: ImageData,
        config: SearchConfig,
        world: World,
        objective: Objective | None,
        pretrained: PretrainedNetwork | None = None,
    ) -> None:
        check_searchable(space, limits)
        self.pretrained = pretrained  # what the supernet's weights start from
        self.space, self.data, self.config, self.world = space, data, config, world
        self.limits = limits
        self.limit_ms = limits[0].limit  # latency limit on the first device
        self.binds = any(limit.binds for limit in limits)  # whether some network of the space exceeds one
        self.limit_tensors = limit_tensors(limits)
        self.batch_size = config.batch_size
        check_batch(self.batch_size, len(data.train), world)
        self.arch_batch_size = heldout_batch(self.batch_size, len(data.heldout), world)
        epoch = batch_count(data.train, self.batch_size, drop_last=True)
        warmup_steps = config.warmup_epochs * epoch
        total_steps = warmup_steps + config.search_epochs * epoch
        self.schedule = Schedule(
            epoch, warmup_steps, total_steps, config.arch_every, config.arch_learning_rate
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
