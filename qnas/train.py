"""Training of whatever has weights: optimiser, schedule, one step, evaluation. Knows no search."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

GRADIENT_CLIP = 5.0  # of the total norm (QuadraNet's recipe)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """How well a network classifies some images."""

    accuracy: float  # share of 1
    loss: float  # mean cross-entropy in nats
    images: int


def make_optimizer(
    weights: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW with decay on weight matrices and kernels only, not on norms and biases."""
    decayed, plain = [], []
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
