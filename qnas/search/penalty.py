"""The loss of an architecture step: the loss of the task and a penalty on the expected latency.

There are three forms. `multiplier` (the default) adds m (E/T - 1) and steers m so that E settles at the
budget T. The other two are ProxylessNAS's with fixed strengths, in a form that works at any scale:
`add-linear` is CE + 0.1 (E/T - 1); `mul-log` is CE 0.2 (log(1 + E) / log(1 + T))^0.3 with E and T in
microseconds, since the published log E / log T changes its sign below one unit and is undefined at one.

Once probabilities are sharp, the penalty changes the latency by whole blocks, if at all, and an optimiser
that remembers larger gradients reacts slowly. In the last part of a search with `multiplier`, every
architecture step therefore ends with `settle`, which removes the remaining violation along the gradient of
the latency. That gradient is nonzero only where a position is still undecided.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qnas.search.config import LatencyLoss

ADD_LINEAR_STRENGTH = 0.1  # lambda
MUL_LOG_SCALE, MUL_LOG_POWER = 0.2, 0.3  # a, b

SETTLED = 0.002  # share of the limit: a smaller violation is left
SETTLING_STEPS = 30  # at most, per call
FLAT = 1e-12  # a gradient of E/T below this is rounding error
DRAWN_TOGETHER = 0.9  # factor on the parameters where the gradient is flat


@dataclass(frozen=True)
class Multiplier:
    """The strength of the latency's pressure, steered by the violation of the budget.

    `value` is relative to the task: at 1, the gradient of the latency is as long as that of the task
    usually is. The same gains therefore suit every device, budget and data set, and the latency cannot drown
    out the task in an optimiser that divides by the root of past squares.

    The value is the output of a PI controller: proportional to the violation E/T - 1, plus its integral,
    which balances the task's own pull on the latency and so holds E at T. The integral grows only near the
    budget, where it measures that pull and not the remaining distance. The value may be negative: below the
    budget, the pressure is towards slower networks, since unused latency gains nothing.
    """

    integral: float = 0.0
    value: float = 0.0
    task_norm: float | None = None  # moving average of the length of the task's gradient
    proportional_gain: float = 5.0  # per unit of violation
    integral_gain: float = 0.05  # per step and unit of violation
    integral_band: float = 0.1  # violation up to which the integral grows
    bound: float = 3.0
    memory: float = 0.95  # of task_norm, per step

    def strength(self, latency_norm: float) -> float:
        """Return m for a step in which the gradient of E/T has this length."""
        return self.value * (self.task_norm or 0.0) / max(latency_norm, 1e-12)

    def after(self, expected_ms: float, budget_ms: float, task_norm: float) -> "Multiplier":
        """Return the multiplier after a step with this expected latency and task gradient."""
        violation = expected_ms / budget_ms - 1
        integral = self.integral
        if abs(violation) < self.integral_band:
            integral = self._clip(integral + self.integral_gain * violation)
        value = self._clip(integral + self.proportional_gain * violation)
        if self.task_norm is not None:
            task_norm = self.memory * self.task_norm + (1 - self.memory) * task_norm
        return replace(self, integral=integral, value=value, task_norm=task_norm)

    def _clip(self, value: float) -> float:
        return max(-self.bound, min(self.bound, value))


def penalised(
    form: LatencyLoss, task_loss: Tensor, expected_ms: Tensor, budget_ms: float, strength: float
) -> Tensor:
    """Return the loss of an architecture step; `strength` is used by the multiplier form only.

    task_loss: scalar, nats; expected_ms: scalar. Increases with expected_ms for a positive strength.
    """
    if form == "multiplier":
        return task_loss + strength * (expected_ms / budget_ms - 1)
    if form == "add-linear":
        return task_loss + ADD_LINEAR_STRENGTH * (expected_ms / budget_ms - 1)
    ratio = torch.log1p(1e3 * expected_ms) / torch.log1p(torch.as_tensor(1e3 * budget_ms))
    return task_loss * MUL_LOG_SCALE * ratio**MUL_LOG_POWER


def settle(alpha: Tensor, ratio: Callable[[], Tensor], longest: float) -> None:
    """Move the parameters in place until the expected amount is within SETTLED of the limit.

    ratio: returns E/T, a scalar that is differentiable in alpha; longest: the largest change of a parameter
    in one step. Each step is a Newton step for E = T with the smallest change of alpha, so decided positions
    stay and undecided ones move. Where all are so sharp that the gradient vanishes, the parameters are scaled
    down first, which keeps their order. A limit too far away for one call is only approached.
    """
    for _ in range(SETTLING_STEPS):
        with torch.enable_grad():
            value = ratio()
            (gradient,) = torch.autograd.grad(value, alpha)
        violation, steepest = float(value.detach()) - 1, float(gradient.abs().max())
        if abs(violation) < SETTLED:
            return
        with torch.no_grad():
            if steepest < FLAT:
                alpha *= DRAWN_TOGETHER
                continue
            direction = gradient / steepest  # scaled first: the square of a small gradient may underflow
            size = violation / steepest / float((direction**2).sum())
            alpha -= max(-longest, min(longest, size)) * direction
