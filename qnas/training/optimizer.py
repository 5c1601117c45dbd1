"""One optimiser step on a batch: AdamW for sampled paths, its schedule, and the loss of distillation."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from qnas.training.acceleration import PLAIN, UNSCALED, Acceleration
from qnas.training.losses import LossFunction, cross_entropy, mean_loss
from qnas.training.processes import ALONE, World
from qnas.training.scoring import Forward

GRADIENT_CLIP = 5.0  # of the total norm (QuadraNet's recipe)


class PathAdamW(torch.optim.AdamW):
    """AdamW that visits only the weights which the last backward pass reached.

    A sampled path reaches a few of a supernet's hundreds or thousands of tensors; checking all others for
    gradients, three times a step, takes longer the more candidates there are. A group's learning rate is
    multiplied by its `rate_share`, if any. After a step, its weights shrink towards zero by its `l1`, if any,
    times the rate (the proximal step of an L1 penalty, decoupled like AdamW's decay).
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], learning_rate: float) -> None:
        # fused: one call for all tensors, which takes a third of the time for a supernet's hundreds
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
        """The weights that have a gradient, in the order of the groups."""
        return [self._reached[place] for place in sorted(self._reached)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; they cannot be set to zero in place."""
        assert set_to_none, "a weight without a gradient stays unchanged, one with a zero gradient decays"
        for weight in self._reached.values():
            weight.grad = None
        self._reached.clear()

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # accepts no closure
        """Update the weights that have a gradient."""
        whole = [(group["params"], group["lr"]) for group in self.param_groups]
        reached: list[list[nn.Parameter]] = [[] for _ in whole]
        for place in sorted(self._reached):
            reached[self._group_of[place]].append(self._reached[place])
        try:
            for group, weights in zip(self.param_groups, reached, strict=True):
                group["params"] = weights
                # the stored rate stays that of the schedule, which ends at one rate for all groups
                group["lr"] *= group.get("rate_share", 1.0)
            super().step()
            with torch.no_grad():
                for group in self.param_groups:
                    if (by := group["lr"] * group.get("l1", 0.0)) > 0:
                        for weight in group["params"]:
                            weight.copy_(F.softshrink(weight, by))
        finally:
            for group, (weights, rate) in zip(self.param_groups, whole, strict=True):
                group["params"], group["lr"] = weights, rate


@dataclass(frozen=True)
class ReLinear:
    """The separate training of the quadratic weights (ReLinear, Fan et al., arXiv 2110.06081).

    `weights` are those in the quadratic products. `gamma` is their learning rate as a share of that of the
    others; scaling the gradient instead would change nothing, since AdamW divides it by its own size.
    `alpha` adds to their decay (L2), and `beta` shrinks them towards zero (L1), both at their own rate.
    """

    weights: Sequence[nn.Parameter]
    gamma: float
    alpha: float
    beta: float


@dataclass(frozen=True)
class Slow:
    """Weights that were trained before, and their learning rate as a share of the others'."""

    weights: Sequence[nn.Parameter]
    rate: float


def make_optimizer(
    weights: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    relinear: ReLinear | None = None,
    slow: Slow | None = None,
) -> PathAdamW:
    """Return AdamW with decay on weight matrices and kernels only, not on norms and biases.

    Quadratic weights that are `slow` as well have the product of both shares of the rate.
    """
    weights, rates = list(weights), {id(weight): slow.rate for weight in slow.weights} if slow else {}
    quadratic = {id(weight) for weight in relinear.weights} if relinear else set()
    groups: list[dict[str, Any]] = []
    for rate in (None, slow.rate) if slow else (None,):
        rest = [w for w in weights if id(w) not in quadratic and rates.get(id(w)) == rate]
        share = {} if rate is None else {"rate_share": rate}
        groups += [
            {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": weight_decay, **share},
            {"params": [weight for weight in rest if weight.ndim <= 1], "weight_decay": 0.0, **share},
        ]
    if relinear:
        for rate in dict.fromkeys(rates.get(id(weight), 1.0) for weight in relinear.weights):
            groups.append(
                {
                    "params": [w for w in relinear.weights if rates.get(id(w), 1.0) == rate],
                    "weight_decay": weight_decay + relinear.alpha,
                    "rate_share": relinear.gamma * rate,
                    "l1": relinear.beta,
                }
            )
    return PathAdamW(groups, learning_rate)


def make_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, head_steps: int = 0
) -> LRScheduler:
    """Return a schedule per step: linear warm-up from a tenth, then a cosine down to 1% of the rate.

    The first `head_steps` of the steps, which train the classifier alone, have the whole rate. The warm-up
    follows them, as the moments of all other weights begin there.
    """
    rest = steps - head_steps
    warmup_steps = min(max(1, warmup_steps), max(1, rest - 1))
    base = optimizer.param_groups[0]["lr"]
    head = [ConstantLR(optimizer, factor=1.0, total_iters=head_steps)] if head_steps else []
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, max(1, rest - warmup_steps), eta_min=0.01 * base)
    milestones = [*([head_steps] if head_steps else []), head_steps + warmup_steps]
    return _Schedule(optimizer, [*head, warmup, cosine], milestones=milestones)


class _Schedule(SequentialLR):
    """torch's SequentialLR, without the warning of torch 2.8 about its own use of an old argument."""

    def step(self, epoch: int | None = None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The epoch parameter in", category=UserWarning)
            super().step()


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs are learned beside the labels (distillation, arXiv 1503.02531)."""

    forward: Forward  # (B, channels, H, W) normalised like the data -> (B, classes)
    weight: float  # of its loss, from 0 to 1; the labels' loss has the rest
    temperature: float

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return the divergence from the teacher's outputs; see `divergence`."""
        with torch.no_grad():
            answers = self.forward(images)
        return divergence(logits, answers, self.temperature)


def divergence(logits: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence of outputs from a teacher's, both (B, classes), in nats.

    Both are softened by the temperature. The divergence is multiplied by its square, so that its gradients
    keep their size.
    """
    ours, theirs = (F.log_softmax(x.float() / temperature, 1) for x in (logits, answers))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


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
    loss_function: LossFunction = cross_entropy,
) -> Tensor:
    """Take one optimiser step on a batch; return the mean loss, detached.

    images: (B, channels, H, W); labels: (B,), or shares of the classes (B, classes); both on the
    acceleration's device, and with several processes only this one's part. The batch is split into `parts`
    equal parts whose gradients are accumulated. Weights that `forward` did not use stay unchanged.
    """
    pieces = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))

    def losses() -> Iterator[Tensor]:
        for number, (some, theirs) in enumerate(pieces, 1):
            with world.averaging(forward, now=number == len(pieces)):
                with acceleration.autocast():
                    logits = forward(some)
                    loss = mean_loss(loss_function, logits, theirs, label_smoothing)
                    if teacher is not None:
                        loss = (1 - teacher.weight) * loss + teacher.weight * teacher.loss(some, logits)
                yield loss

    return descend(
        optimizer, losses(), len(pieces), scaler=scaler, world=world, gradient_clip=gradient_clip
    ).mean()


def descend(
    optimizer: PathAdamW,
    losses: Iterable[Tensor],
    count: int,
    *,
    scaler: GradScaler = UNSCALED,
    world: World = ALONE,
    gradient_clip: float = GRADIENT_CLIP,
) -> Tensor:
    """Take one optimiser step by the mean of `count` losses; return them, (count,), detached.

    Gradients are accumulated: each loss is computed after the backward pass of the one before it, so that the
    memory is that of one. With several processes, losses and gradients are averaged.
    """
    optimizer.zero_grad()
    found = []
    for loss in losses:
        scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        found.append(loss.detach())
    assert len(found) == count, (len(found), count)
    figures, used = torch.stack(found), optimizer.used
    world.average([figures, *(w.grad for w in used if w.grad is not None)])
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(used, gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return figures
