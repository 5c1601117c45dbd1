"""Training of whatever has weights: optimiser, schedule, step, evaluation, and the loop around it.

Knows no search: the loop drives anything that is stepped, saves its state and takes it up again.
"""

import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from qnas import run
from qnas.acceleration import PLAIN, UNSCALED, Acceleration
from qnas.augmentation import Augmentation
from qnas.checkpoint import Checkpoints
from qnas.data import Split, batch_count, batches
from qnas.distributed import ALONE, World, joined
from qnas.progress import Progress

GRADIENT_CLIP = 5.0  # of the total norm (QuadraNet's recipe)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """How well a network classifies some images."""

    accuracy: float  # share of 1
    loss: float  # mean cross-entropy in nats
    images: int


@dataclass(frozen=True)
class ImageScores:
    """How well a network classifies each of some images, in their order. On the CPU."""

    losses: Tensor  # (images,) float64, cross-entropy in nats
    right: Tensor  # (images,) bool

    @property
    def score(self) -> Score:
        """Return the figures of all images together."""
        count = len(self.losses)
        return Score(int(self.right.sum()) / count, float(self.losses.mean()), count)


def set_up_process(threads: int) -> None:
    """Set torch's threads (0 leaves them) and keep freed memory. The program's to call, not ours."""
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the C library keep what tensors freed instead of returning it to the system (glibc only).

    A training step frees and asks for the same few megabytes over and over; as fresh pages they cost
    more than the arithmetic on them: a quarter of a step of quadranet-small.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_top_pad, 64 << 20)


class PathAdamW(torch.optim.AdamW):
    """AdamW that looks at the weights which the last backward pass reached, not at all there are.

    A sampled path reaches a few of a supernet's hundreds or thousands of tensors; to ask every other one
    for its gradient, three times a step, takes longer the more candidates there are. A group may have a
    `rate_share`, with which its rate is multiplied, and an `l1`, by which, times the rate, its weights
    shrink to zero after a step (the proximal step of an L1 penalty, decoupled as AdamW's decay is).
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], learning_rate: float) -> None:
        # fused: one call for all tensors, a third of the time for a supernet's hundreds
        super().__init__([dict(group) for group in groups], lr=learning_rate, fused=True)
        self._reached: dict[int, nn.Parameter] = {}
        self._group_of: list[int] = []
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
                place = len(self._group_of)
                self._group_of.append(number)
                weight.register_post_accumulate_grad_hook(partial(self._reached.__setitem__, place))

    @property
    def used(self) -> list[nn.Parameter]:
        """The weights that have a gradient, in the order of the groups, whatever the backward pass's."""
        return [self._reached[place] for place in sorted(self._reached)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; in place they cannot be set to zero."""
        assert set_to_none, "a weight without a gradient is left as it is, one of gradient 0 decays"
        for weight in self._reached.values():
            weight.grad = None
        self._reached.clear()

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would walk twice
        """Update the weights that have a gradient."""
        whole = [(group["params"], group["lr"]) for group in self.param_groups]
        reached: list[list[nn.Parameter]] = [[] for _ in whole]
        for place in sorted(self._reached):
            reached[self._group_of[place]].append(self._reached[place])
        try:
            for group, weights in zip(self.param_groups, reached, strict=True):
                group["params"] = weights
                # the group's own rate stays the schedule's, whose end is one rate for all groups
                group["lr"] *= group.get("rate_share", 1.0)
            super().step()
            for group in self.param_groups:
                self._shrink(group["params"], group["lr"] * group.get("l1", 0.0))
        finally:
            for group, (weights, rate) in zip(self.param_groups, whole, strict=True):
                group["params"], group["lr"] = weights, rate

    @staticmethod
    @torch.no_grad()
    def _shrink(weights: Iterable[nn.Parameter], by: float) -> None:
        if by > 0:
            for weight in weights:
                weight.copy_(F.softshrink(weight, by))


@dataclass(frozen=True)
class ReLinear:
    """How the quadratic part of a network is let in (Fan et al., arXiv 2110.06081).

    `weights` are those in the quadratic products. `gamma` is their rate as a share of the others': under
    AdamW, which divides a gradient by its own size, a scale of the gradient itself would change nothing.
    `alpha` adds to their decay (L2), `beta` shrinks them to zero (L1), both at their own rate.
    """

    weights: Sequence[nn.Parameter]
    gamma: float
    alpha: float
    beta: float


def make_optimizer(
    weights: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    relinear: ReLinear | None = None,
) -> PathAdamW:
    """Return AdamW with decay on weight matrices and kernels only, not on norms and biases."""
    quadratic = {id(weight) for weight in relinear.weights} if relinear else set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for weight in weights:
        if id(weight) not in quadratic:
            (decayed if weight.ndim > 1 else plain).append(weight)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if relinear:
        groups.append(
            {
                "params": list(relinear.weights),
                "weight_decay": weight_decay + relinear.alpha,
                "rate_share": relinear.gamma,
                "l1": relinear.beta,
            }
        )
    return PathAdamW(groups, learning_rate)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int) -> LRScheduler:
    """Return a schedule a step: linear warm-up from a tenth, then a cosine down to 1% of the rate."""
    warmup_steps = min(max(1, warmup_steps), max(1, steps - 1))
    base = optimizer.param_groups[0]["lr"]
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup_steps), eta_min=0.01 * base)
    return _Schedule(optimizer, [warmup, cosine], milestones=[warmup_steps])


class _Schedule(SequentialLR):
    """torch's schedule; that of torch 2.8 warns of its own use of an old argument."""

    def step(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The epoch parameter in", category=UserWarning)
            super().step()


@dataclass(frozen=True)
class Teacher:
    """A network whose answers are learnt beside the labels (distillation, arXiv 1503.02531)."""

    forward: Forward  # (B, channels, H, W) normalised as the data are -> (B, classes)
    weight: float  # of its loss; the labels' has the rest
    temperature: float

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return the divergence from the teacher's answers, softened by the temperature, in nats.

        Times the temperature's square, so that its gradients keep their size.
        """
        with torch.no_grad():
            answers = self.forward(images)
        ours, theirs = (F.log_softmax(x.float() / self.temperature, 1) for x in (logits, answers))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


def weight_step(
    forward: Forward,
    optimizer: PathAdamW,
    images: Tensor,
    labels: Tensor,
    label_smoothing: float,
    *,
    acceleration: Acceleration = PLAIN,
    scaler: GradScaler = UNSCALED,
    world: World = ALONE,
    gradient_clip: float = GRADIENT_CLIP,
    parts: int = 1,
    teacher: Teacher | None = None,
) -> Tensor:
    """Take one optimiser step on a batch; return the mean loss, detached.

    images: (B, channels, H, W); labels: (B,), or shares of the classes (B, classes); on the acceleration's
    device, and of several processes this one's part. The batch is taken in so many `parts`, which must be
    equal, and their gradients are accumulated. Weights that `forward` did not use are left as they are,
    and are not looked at.
    """
    optimizer.zero_grad()
    losses = []
    pieces = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    for number, (some, theirs) in enumerate(pieces, 1):
        with world.averaging(forward, now=number == len(pieces)):
            with acceleration.autocast():
                logits = forward(some)
                loss = F.cross_entropy(logits, theirs, label_smoothing=label_smoothing)
                if teacher is not None:
                    loss = (1 - teacher.weight) * loss + teacher.weight * teacher.loss(some, logits)
            scaler.scale(loss / len(pieces)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        losses.append(loss.detach())
    loss, used = torch.stack(losses).mean(), optimizer.used
    world.average([loss, *(w.grad for w in used if w.grad is not None)])
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(used, gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss


def evaluate(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Score a network that is in evaluation mode."""
    return evaluate_images(forward, batches).score


@torch.no_grad()
def evaluate_images(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> ImageScores:
    """Score a network that is in evaluation mode on each image."""
    losses, right = [], []
    for images, labels in batches:
        logits = forward(images)
        losses.append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
        right.append((logits.argmax(1) == labels).cpu())
    assert losses, "no images to evaluate on"
    return ImageScores(torch.cat(losses), torch.cat(right))


@torch.no_grad()
def recalibrate(module: nn.Module, forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the batch norms' statistics anew on these batches; no other state changes.

    Statistics gathered while other paths ran upstream do not fit this one. Nothing happens where
    there is no batch normalisation.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    for images, _ in batches:
        forward(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of what is put through, as in training, and keep none of them.

    For comparing many paths of a supernet, each of which would need statistics of its own.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.train(training)
            norm.track_running_stats = tracks


def stream(
    split: Split,
    batch_size: int,
    seed: int,
    start: int,
    *,
    augment: bool,
    augmentation: Augmentation | None = None,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, from number `start` of a sequence that depends on the seed only.

    `augmentation`, `device` and `part` as in `data.batches`.
    """
    epoch, skip = divmod(start, batch_count(split, batch_size, drop_last=True))
    while True:
        yield from batches(
            split,
            batch_size,
            seed=seed,
            epoch=epoch,
            augment=augment,
            augmentation=augmentation,
            drop_last=True,
            start=skip,
            device=device,
            part=part,
        )
        epoch, skip = epoch + 1, 0


class Stepper(Protocol):
    """What the loop drives: a search or the training of a network."""

    total_steps: int

    @property
    def steps_done(self) -> int:
        """Steps taken so far, those of former processes included."""

    @property
    def phase(self) -> str:
        """What the next step does, for the progress bar."""

    def step(self) -> Mapping[str, Any]:
        """Take a step; return what to log: figures, and `warnings` where there are any."""

    def summary(self, row: Mapping[str, float]) -> str:
        """Put the figures of a step into a few words; empty keeps those of the step before."""

    def to_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, as plain values and tensors."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over such a state."""


@dataclass(frozen=True)
class Interval:
    """When an undisturbed run saves its state: after so many steps or seconds, whichever is first."""

    steps: int = 500
    seconds: float = 60.0


def run_to_end(
    stepper: Stepper,
    folder: Path,
    *,
    seed: int,
    resume: bool,
    quiet: bool,
    interval: Interval = Interval(),
    world: World = ALONE,
) -> None:
    """Take all steps in a run folder, with metrics, checkpoints and a progress bar.

    Of several processes only the main one reads and writes there; all stop after the same step.
    What is drawn from torch's own random numbers, by a module of one's own for instance, depends on
    the seed and the steps alone. Raises CheckpointError where no saved state is whole, Interrupted
    once the state is saved after Ctrl-C or SIGTERM, ProcessError where another process is gone.
    """
    checkpoints = Checkpoints(folder)
    with (
        joined(world),
        _own_random_numbers(seed),
        run.interruptible() as signals,
        Progress(stepper.total_steps, stepper.phase, quiet=quiet or not world.is_main) as progress,
        world.watched(),
    ):
        saved = world.from_main(checkpoints.load() if resume and world.is_main else None)
        if saved is not None:
            stepper.load(saved["stepper"])
            _set_random_state(saved["random"])
        if checkpoints.damage:
            went_back = f"went back to the one before it, of step {stepper.steps_done}"
            print(f"qnas: warning: {checkpoints.damage}: {went_back}", file=sys.stderr)
        metrics = None
        if world.is_main:
            metrics = run.Metrics(folder / run.METRICS, keep_bytes=saved["metrics_bytes"] if saved else 0)
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
                or stepper.steps_done == stepper.total_steps  # what follows may take minutes
                or stepper.steps_done - saved_step >= interval.steps
                or time.monotonic() - saved_at >= interval.seconds
            ):
                # the lines first: a checkpoint must not know of more of them than there are
                state = {"metrics_bytes": metrics.sync(), "random": _random_state()}
                checkpoints.save({"stepper": stepper.to_dict(), **state})
                saved_step, saved_at = stepper.steps_done, time.monotonic()
            if stops:
                raise run.interrupted(folder)
        if world.any(bool(signals)):  # came as the last state was saved
            raise run.interrupted(folder)
        world.check_same(stepper.to_dict())


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Seed torch's own random numbers, and give the caller's back at the end."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _random_state() -> dict[str, Any]:
    """Return the state of torch's own random numbers; no step draws from numpy's or Python's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
