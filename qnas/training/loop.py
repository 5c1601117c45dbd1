"""The loop that drives a search or a training: steps, metrics, checkpoints, interruption and resuming."""

import ctypes
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qnas.common.errors import CheckpointError, TrainingError, one_line
from qnas.common.progress import Display, silent
from qnas.data.batches import batch_count, batches
from qnas.data.image_data import Split
from qnas.runs.checkpoint import Checkpoints
from qnas.runs.metrics import Metrics
from qnas.runs.names import METRICS_FILE
from qnas.runs.run_folder import interrupted, interruptible
from qnas.training.processes import ALONE, World, joined
from qnas.training.saved_state import check_form

# of a state that has another form than it should
_FORM_ERRORS = (LookupError, RuntimeError, TypeError, ValueError, AttributeError)


def set_up_process(threads: int) -> None:
    """Set torch's threads (0 keeps their number) and let the C library keep freed memory (glibc only)."""
    if threads:
        torch.set_num_threads(threads)
    # a training step frees and requests the same few megabytes over and over; fresh pages for them cost
    # more than the arithmetic on them, a quarter of a step of quadranet-small
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc accepts
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_top_pad, 64 << 20)


def stream(
    split: Split, batch_size: int, seed: int, start: int, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, from number `start` of a sequence that depends on the seed only.

    `options` are those of `data.batches`: augment, augmentation, device, part, balanced.
    """
    epoch, skip = divmod(start, batch_count(split, batch_size, drop_last=True))
    while True:
        yield from batches(split, batch_size, seed=seed, epoch=epoch, drop_last=True, start=skip, **options)
        epoch, skip = epoch + 1, 0


class Stepper(Protocol):
    """The search or training that the loop drives."""

    total_steps: int

    @property
    def steps_done(self) -> int:
        """Steps taken so far, including those before a resume."""

    @property
    def phase(self) -> str:
        """The phase of the next step."""

    def step(self) -> Mapping[str, Any]:
        """Take a step; return what to log: figures, and `warnings` where there are any."""

    def summary(self, row: Mapping[str, float]) -> str:
        """Describe the figures of a step for the progress; an empty text keeps the last one."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state between two steps, as plain values and tensors."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `to_dict`."""


@dataclass(frozen=True)
class Interval:
    """The interval at which a run saves its state: steps or seconds, whichever comes first."""

    steps: int = 500
    seconds: float = 60.0


def run_to_end(
    stepper: Stepper,
    folder: Path,
    *,
    seed: int,
    resume: bool,
    display: Display = silent,
    interval: Interval = Interval(),
    world: World = ALONE,
) -> None:
    """Take all steps in a run folder, with metrics, checkpoints and progress.

    With several processes, only the main one reads and writes there; all stop after the same step.
    Draws from torch's global random state, for instance by a user's module, depend only on the seed and
    the steps. Raises CheckpointError where no saved state is intact and of this run, Interrupted once the
    state is saved after Ctrl-C or SIGTERM, ProcessError where another process has ended.
    """
    checkpoints = Checkpoints(folder)
    with (
        joined(world),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        interruptible() as signals,
        (display if world.is_main else silent)(stepper.total_steps, stepper.phase) as progress,
        world.watched(),
    ):
        torch.manual_seed(seed)
        saved = world.from_main(checkpoints.load() if resume and world.is_main else None)
        if saved is not None:
            _restore(stepper, saved, folder)
        if checkpoints.damage:
            step = stepper.steps_done
            progress.warn(f"{checkpoints.damage}: went back to the one before it, of step {step}")
        kept = saved["metrics_bytes"] if saved else 0
        metrics = Metrics(folder / METRICS_FILE, keep_bytes=kept) if world.is_main else None
        progress.skip(stepper.steps_done)
        saved_step, saved_at = stepper.steps_done, time.monotonic()
        while stepper.steps_done < stepper.total_steps:
            progress.phase(stepper.phase)
            row = stepper.step()
            if metrics is not None:
                metrics.write({"step": stepper.steps_done, **row})
                for warning in row.get("warnings", []):
                    progress.warn(warning)
            progress.step(stepper.summary(row))
            stops = world.any(bool(signals))
            if metrics is not None and (
                stops
                or stepper.steps_done == stepper.total_steps  # the work after the loop may take minutes
                or stepper.steps_done - saved_step >= interval.steps
                or time.monotonic() - saved_at >= interval.seconds
            ):
                # metrics first: a checkpoint must not count more bytes of them than are on disk
                metrics_bytes = metrics.sync()
                # torch's global random states; no step draws from those of numpy or Python
                random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
                state = {"metrics_bytes": metrics_bytes, "random": random}
                checkpoints.save({"stepper": stepper.to_dict(), **state})
                saved_step, saved_at = stepper.steps_done, time.monotonic()
            if stops:
                raise interrupted(folder)
        if world.any(bool(signals)):  # a signal came while the last state was saved
            raise interrupted(folder)
        world.check_same(stepper.to_dict())


def _restore(stepper: Stepper, saved: Mapping[str, Any], folder: Path) -> None:
    """Set a stepper and torch's random states to a saved state. Raises CheckpointError if it is another's."""
    fresh = {"stepper": stepper.to_dict(), "metrics_bytes": 0, "random": {"cpu": torch.get_rng_state()}}
    try:
        random = saved["random"]
        if not isinstance(random, dict) or not isinstance(random["cuda"], list):
            raise TypeError("no random states")
        cuda = random["cuda"][: torch.cuda.device_count()]
        check_form({**saved, "random": {"cpu": random["cpu"]}}, fresh)
        stepper.load(saved["stepper"])
        if not 0 <= stepper.steps_done <= stepper.total_steps or saved["metrics_bytes"] < 0:
            raise ValueError(f"{stepper.steps_done} of {stepper.total_steps} steps")
        torch.set_rng_state(random["cpu"])
        torch.cuda.set_rng_state_all(cuda)
    except _FORM_ERRORS as error:
        problem = one_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{folder}: the checkpoint is not of this run: {problem}") from error


def check_finite(
    loss: float, step: int, remedy: str = "A larger `batch_size` or another `seed` may help"
) -> None:
    """Raise TrainingError where a loss is not finite, before the state is saved."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the loss is {loss} and the weights are lost; the last checkpoint is of an earlier "
            f"step. {remedy}; if it happens at the first steps, check the images"
        )
