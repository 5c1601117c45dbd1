"""The problem of a search: everything that stays the same from its first step to its last."""

from dataclasses import dataclass

from qnas.data.batches import batch_count
from qnas.data.image_data import ImageData
from qnas.nn.supernet import LimitTensors, candidate_mask, limit_tensors
from qnas.search.config import SearchConfig
from qnas.search.schedule import Schedule
from qnas.solver.limits import Limits
from qnas.solver.solve import check_searchable
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import Acceleration, choose_acceleration
from qnas.training.losses import Objective, make_objective
from qnas.training.processes import World


@dataclass(frozen=True, eq=False)
class Problem:
    """A space, the limits on its networks, the images, and how to search."""

    space: SearchSpace
    limits: Limits  # of which the first is a latency
    limit_tensors: LimitTensors
    data: ImageData
    config: SearchConfig
    objective: Objective
    schedule: Schedule
    batch_size: int
    acceleration: Acceleration
    world: World

    @property
    def limit_ms(self) -> float:
        """The latency limit on the first device."""
        return self.limits[0].limit

    @property
    def binds(self) -> bool:
        """Whether some network of the space exceeds a limit."""
        return any(limit.binds for limit in self.limits)


def make_problem(
    space: SearchSpace,
    limits: Limits,
    data: ImageData,
    config: SearchConfig,
    world: World,
    objective: Objective | None = None,
) -> Problem:
    """Return the problem of a search; without an objective, with the one that the configuration names.

    Raises ArchError or InfeasibleBudgetError where there is nothing to search, UsageError where the
    machine or the number of processes does not fit.
    """
    check_searchable(space, limits)
    batch_size = min(config.batch_size, len(data.train), len(data.heldout))
    world.check_batch(batch_size)
    epoch = batch_count(data.train, batch_size, drop_last=True)
    warmup_steps = config.warmup_epochs * epoch
    total_steps = warmup_steps + config.search_epochs * epoch
    return Problem(
        space=space,
        limits=limits,
        limit_tensors=limit_tensors(limits, candidate_mask(space)),
        data=data,
        config=config,
        objective=objective
        or make_objective(config.loss, config.metric, data.train.labels, len(data.classes)),
        schedule=Schedule(epoch, warmup_steps, total_steps, config.arch_every, config.arch_learning_rate),
        batch_size=batch_size,
        acceleration=choose_acceleration(config.torch_device, config.precision, world.local_rank),
        world=world,
    )
