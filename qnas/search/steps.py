"""The two steps of a search: one of the weights along a path, one of the architecture parameters."""

import torch
from torch import Tensor

from qnas.nn.gradients import GRADIENTS
from qnas.nn.modes import gradient_for
from qnas.nn.supernet import expected_latency, largest_ratio, sample_path
from qnas.search.penalty import penalised, settle
from qnas.search.state import SearchState
from qnas.training.losses import mean_loss
from qnas.training.optimizer import weight_step

SETTLING_LOGIT = 0.5  # by which a step of settling changes a logit, at most


def take_weight_step(state: SearchState, even_logits: Tensor, images: Tensor, labels: Tensor) -> float:
    """Train the weights of a path, or of the whole mixture; return the loss.

    even_logits: (positions, candidates), of the distribution that even paths are drawn from.
    """
    problem, config, supernet = state.problem, state.problem.config, state.supernet.train()
    if config.weights == "nested" and config.nested_weight_steps == "mixture":
        with torch.no_grad():
            routes = supernet.mixture(state.temperature)
    else:
        logits = even_logits if config.paths == "even" else state.logits
        routes = sample_path(logits, supernet.mask, state.generator)
    loss = weight_step(
        lambda x: supernet(x, routes),
        state.weight_optimizer,
        images,
        labels,
        config.label_smoothing,
        acceleration=problem.acceleration,
        scaler=state.scaler,
        world=problem.world,
        loss_function=problem.objective.loss,
    )
    state.weight_schedule.step()
    return float(loss)


def take_arch_step(state: SearchState, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Move the architecture parameters; return the loss of the task and the accuracy on the batch."""
    problem, supernet = state.problem, state.supernet.train()
    config, limits, world = problem.config, problem.limit_tensors, problem.world
    draw = GRADIENTS[gradient_for(config.weights, config.gradient)]
    step = draw(supernet, state.temperature, state.generator)
    for weight in state.weights:  # no gradients of weights: they are most of a backward pass
        weight.requires_grad_(False)
    with problem.acceleration.autocast_unscaled():
        logits = supernet(images, step.routes)
        task_loss = mean_loss(problem.objective.loss, logits, labels)
    # of several limits the one that is exceeded most presses, as if it were the device's
    ratio = largest_ratio(step.expected(limits), limits.limit)
    (pull,) = torch.autograd.grad(ratio, supernet.alpha, retain_graph=True)
    strength = state.multiplier.strength(float(pull.norm()))  # 0 where the budget does not bind
    limit_ms = problem.limit_ms
    loss = penalised(config.latency_loss, task_loss, ratio * limit_ms, limit_ms, strength)
    (supernet.alpha.grad,) = torch.autograd.grad(loss, supernet.alpha)
    world.average([supernet.alpha.grad])  # the latency's part is the same in all processes
    task_loss, right = task_loss.detach(), _share_right(logits.detach(), labels)
    world.average([task_loss, right])
    task_norm = float((supernet.alpha.grad - strength * pull).norm())
    state.arch_optimizer.param_groups[0]["lr"] = problem.schedule.arch_learning_rate(state.step)
    state.arch_optimizer.step()
    step.after_update(supernet)
    for weight in state.weights:
        weight.requires_grad_(True)
    if problem.binds:
        state.multiplier = state.multiplier.after(state.expected_ratio * limit_ms, limit_ms, task_norm)
        if problem.schedule.is_settling(state.step) and config.latency_loss == "multiplier":
            _settle(state)
    return float(task_loss), float(right)


def _settle(state: SearchState) -> None:
    supernet, temperature = state.supernet, state.temperature
    fixed, cells, limit = state.problem.limit_tensors

    def ratio() -> Tensor:
        expected = expected_latency(supernet.logits(temperature), supernet.mask, fixed, cells)
        return largest_ratio(expected, limit)

    settle(supernet.alpha, ratio, SETTLING_LOGIT * temperature)


def _share_right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()
