"""Training of whatever has weights: optimiser, schedule, step, evaluation, and the loop around it.

Knows no search: the loop drives anything that is stepped, saves its state and takes it up again.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from qnas import run
from qnas.data import Split, batch_count, batches
from qnas.errors import Interrupted
from qnas.progress import Progress

CHECKPOINT_STEPS = 500  # between two checkpoints of an undisturbed run
GRADIENT_CLIP = 5.0  # of the total norm (QuadraNet's recipe)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """How well a network classifies some images."""

    accuracy: float  # share of 1
    loss: float  # mean cross-entropy in nats
    images: int


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


def make_optimizer(
    weights: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW with decay on weight matrices and kernels only, not on norms and biases."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for weight in weights:
        (decayed if weight.ndim > 1 else plain).append(weight)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # fused: one call for all tensors, a third of the time for a supernet's hundreds
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int) -> LRScheduler:
    """Return a schedule a step: linear warm-up from a tenth, then a cosine down to 1% of the rate."""
    warmup_steps = min(max(1, warmup_steps), max(1, steps - 1))
    base = optimizer.param_groups[0]["lr"]
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup_steps), eta_min=0.01 * base)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])


def weight_step(
    forward: Forward,
    weights: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Take one optimiser step on a batch; return the mean loss, detached.

    images: (B, channels, H, W); labels: (B,). Weights that `forward` did not use are left as they are.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(forward(images), labels, label_smoothing=label_smoothing)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    used = [w for w in weights if w.grad is not None]
    nn.utils.clip_grad_norm_(used, GRADIENT_CLIP)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Score a network that is in evaluation mode."""
    correct, loss, count = 0, 0.0, 0
    for images, labels in batches:
        logits = forward(images)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    assert count > 0, "no images to evaluate on"
    return Score(correct / count, loss / count, count)


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


def stream(
    split: Split, batch_size: int, seed: int, start: int, *, augment: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, from number `start` of a sequence that depends on the seed only."""
    epoch, skip = divmod(start, batch_count(split, batch_size, drop_last=True))
    while True:
        yield from batches(
            split, batch_size, seed=seed, epoch=epoch, augment=augment, drop_last=True, start=skip
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

    def step(self) -> dict[str, float]:
        """Take a step; return what to log."""

    def summary(self, row: Mapping[str, float]) -> str:
        """Put the figures of a step into a few words; empty keeps those of the step before."""

    def to_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, as plain values and tensors."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over such a state."""


def run_to_end(stepper: Stepper, folder: Path, *, resume: bool, quiet: bool) -> None:
    """Take all steps in a run folder, with metrics, checkpoints and a progress bar.

    Raises CheckpointError where a saved state is damaged, Interrupted once the state is saved after
    Ctrl-C or SIGTERM.
    """
    saved = run.load_checkpoint(folder) if resume else None
    if saved is not None:
        stepper.load(saved)
    metrics = run.Metrics(folder / run.METRICS, keep_bytes=saved["metrics_bytes"] if saved else 0)

    def save() -> None:
        run.save_checkpoint(folder, {**stepper.to_dict(), "metrics_bytes": metrics.size_bytes})

    with (
        run.interruptible() as signals,
        Progress(stepper.total_steps, stepper.phase, quiet=quiet) as progress,
    ):
        progress.skip(stepper.steps_done)
        while stepper.steps_done < stepper.total_steps:
            progress.phase(stepper.phase)
            row = stepper.step()
            metrics.write({"step": stepper.steps_done, **row})
            progress.step(stepper.summary(row))
            if signals:
                save()
                raise Interrupted(f"the state is saved in {folder}: --resume goes on from it")
            # after the last step too: what follows may take minutes
            if stepper.steps_done % CHECKPOINT_STEPS == 0 or stepper.steps_done == stepper.total_steps:
                save()
