"""Dense networks of the neurons in qnas/spaces/neurons.py, many trainings of one network at a time.

A hidden layer is a neuron's own formula with matrices in place of depthwise convolutions, then the
activation: `(W_a x + b_a) . (W_b x + b_b) + W_c x + b_c` for QuadraNet's. Constants are those of the
registered neuron; where that has none, since a norm shifts its input or its result, every matrix has a bias.
So type4 is the same function as factored, from another start. A layer of `star` is
`act(W_1 x + b_1) . (W_2 x + b_2)` (arXiv 2403.19967), without a further activation.

Layers are `LayerSpec`s, as those of every network of qnas: parameters, multiply-adds and latencies are
counted from them, and modules are built from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from synthetic import Task
from torch import Tensor, nn

from qnas.latency.device import Device
from qnas.latency.device_table import predict_blocks
from qnas.nn.blocks import MODULES
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import BlockSpec, count_macs, count_params
from qnas.spaces.neurons import NEURONS
from qnas.training.optimizer import make_schedule

STAR = "star"
STAR_LAYERS = {"factor1": "dwconv", "act": "act", "factor2": "dwconv", "product": "mul"}
TEST_SEED = 1_000_000


@dataclass(frozen=True)
class DenseRecipe:
    """How dense networks are trained: Adam with a warm-up and a cosine, batches drawn with replacement."""

    points: int = 2000  # to train on
    test_points: int = 4000
    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 1e-2
    warmup_steps: int = 30


@dataclass(frozen=True)
class Dense:
    """A network: hidden layers of `width` neurons each, and a linear layer."""

    neuron: str
    activation: str
    variables: int
    width: int
    outputs: int
    depth: int = 2

    @property
    def layers(self) -> tuple[tuple[LayerSpec, ...], ...]:
        """The layers of each hidden layer, and those behind them."""
        hidden = [self._hidden(f"{i}.", self.variables if i == 0 else self.width) for i in range(self.depth)]
        return (*hidden, (LayerSpec("out", "linear", 1, self.width, self.outputs, bias=True),))

    def _hidden(self, prefix: str, c_in: int) -> tuple[LayerSpec, ...]:
        ops = STAR_LAYERS if self.neuron == STAR else NEURONS[self.neuron].layers
        biased, width, found = biased_roles(self.neuron), self.width, []
        rest = list(ops.values())
        for role, op in ops.items():
            rest.pop(0)
            if op == "dwconv":
                spec = LayerSpec(prefix + role, "linear", 1, c_in, width, bias=role in biased)
            else:
                # a square before the matrix is one of the input
                c = c_in if op == "square" and "dwconv" in rest else width
                spec = LayerSpec(prefix + role, self.activation if op == "act" else op, 1, c, c)
            found.append(spec)
        if self.neuron != STAR:
            found.append(LayerSpec(f"{prefix}act", self.activation, 1, width, width))
        return tuple(found)

    @property
    def block(self) -> BlockSpec:
        """All layers as one block, for the counters."""
        return BlockSpec("dense", "dense", tuple(spec for part in self.layers for spec in part))

    @property
    def params(self) -> int:
        """Trained parameters."""
        return count_params([self.block])

    def costs(self, device: Device) -> dict[str, float]:
        """Return the parameters, the multiply-adds and the predicted latency for one point."""
        kernels = predict_blocks(device, [self.block])
        latency_ms = device.network_ms + sum(row.latency_ms for row in kernels)
        return {"params": self.params, "macs": count_macs([self.block]), "latency_ms": latency_ms}


def biased_roles(neuron: str) -> set[str]:
    """Return the matrices that have a bias."""
    if neuron == STAR:
        return {"factor1", "factor2"}
    known = NEURONS[neuron]
    constants = {*known.biases, *([known.constant] if known.constant else [])}
    return constants or {*known.roles}


def widest(neuron: str, activation: str, variables: int, outputs: int, params: int, depth: int = 2) -> Dense:
    """Return the widest network with at most so many parameters, but at least one neuron wide."""
    found = Dense(neuron, activation, variables, 1, outputs, depth)
    while (wider := replace(found, width=found.width + 1)).params <= params:
        found = wider
    return found


class DenseEnsemble(nn.Module):
    """One network with weights of its own for each member, which a seed draws.

    (members, B, variables) -> (members, B, outputs).
    """

    def __init__(self, dense: Dense, seeds: Sequence[int]) -> None:
        super().__init__()
        self.dense, self.weights = dense, nn.ParameterDict()
        self.act = MODULES[dense.activation](dense.layers[0][-1])
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for spec in dense.block.layers:
                    if spec.op == "linear":
                        self._append(spec, MODULES["linear"](spec))
        self._start()

    @torch.no_grad()
    def _append(self, spec: LayerSpec, layer: nn.Module) -> None:
        """Stack the tensors of one more member's layer: (members, in, out) and (members, 1, out)."""
        drawn = {"weight": layer.weight.T, **({"bias": layer.bias[None]} if spec.bias else {})}
        for kind, tensor in drawn.items():
            key = f"{spec.role}.{kind}".replace(".", "_")
            before = [self.weights[key]] if key in self.weights else []
            self.weights[key] = nn.Parameter(torch.cat([*before, tensor[None]]))

    @torch.no_grad()
    def _start(self) -> None:
        """Scale weights and fill biases as the registered neuron says, as a QuadraBlock does."""
        if self.dense.neuron == STAR:
            return
        known = NEURONS[self.dense.neuron]
        for i in range(self.dense.depth):
            for role, factor in known.start.items():
                self.weights[f"{i}_{role}_weight"].mul_(factor)
            for role in known.ones:
                self.weights[f"{i}_{role}_bias"].fill_(1.0)

    def linear(self, role: str, x: Tensor) -> Tensor:
        """Apply a matrix: (members, B, in) -> (members, B, out)."""
        weight = self.weights[f"{role}_weight"]
        key = f"{role}_bias"
        return torch.baddbmm(self.weights[key], x, weight) if key in self.weights else torch.bmm(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        """(members, B, variables) -> (members, B, outputs)."""
        for i in range(self.dense.depth):
            if self.dense.neuron == STAR:
                x = self.act(self.linear(f"{i}_factor1", x)) * self.linear(f"{i}_factor2", x)
                continue
            known = NEURONS[self.dense.neuron]
            x = self.act(known.formula(x, *(partial(self.linear, f"{i}_{role}") for role in known.roles)))
        return self.linear("out", x)


def train_dense(dense: Dense, recipe: DenseRecipe, members: Sequence[tuple[Task, int]]) -> list[float | None]:
    """Train a network on each task with each seed of `members`, and return the errors on the test points.

    An error is the share of points of the wrong class, or the mean squared error divided by the variance;
    None where a training has diverged. A seed determines the training points, the initial weights and the
    batches, whatever other members are trained beside it: together they take little longer than one.
    """
    drawn = [as_tensors(task, np.random.default_rng([seed, 0]), recipe.points) for task, seed in members]
    points, wanted = torch.stack([x for x, _ in drawn]), torch.stack([y for _, y in drawn])
    shape, seeds = (recipe.steps, recipe.batch_size), [seed for _, seed in members]
    batches = [
        torch.randint(recipe.points, shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    order, rows = torch.stack(batches, 1), torch.arange(len(members))[:, None]  # (steps, members, B)
    network = DenseEnsemble(dense, seeds)
    optimizer = torch.optim.Adam(network.parameters(), recipe.learning_rate, fused=True)
    schedule = make_schedule(optimizer, recipe.steps, recipe.warmup_steps)
    for places in order:
        optimizer.zero_grad()
        losses_of(network(points[rows, places]), wanted[rows, places]).sum().backward()
        optimizer.step()
        schedule.step()
    tests = [as_tensors(task, np.random.default_rng(TEST_SEED), recipe.test_points) for task, _ in members]
    points, wanted = torch.stack([x for x, _ in tests]), torch.stack([y for _, y in tests])
    with torch.no_grad():
        outputs = network(points)
    is_finite = outputs.isfinite().all(2).all(1)
    errors = errors_of(outputs, wanted)
    return [float(error) if fine else None for error, fine in zip(errors, is_finite, strict=True)]


def as_tensors(task: Task, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Draw points and what to predict, as float32 and as float32 or int64."""
    x, y = task.draw(rng, count)
    return torch.from_numpy(x).float(), torch.from_numpy(y).float() if task.is_regression else torch.tensor(y)


def losses_of(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return each member's mean loss: (members, B, outputs), (members, B) -> (members,)."""
    if wanted.is_floating_point():
        return (outputs[..., 0] - wanted).square().mean(1)
    flat = F.cross_entropy(outputs.flatten(0, 1), wanted.flatten(), reduction="none")
    return flat.view(wanted.shape).mean(1)


def errors_of(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return each member's error: (members, B, outputs), (members, B) -> (members,)."""
    if wanted.is_floating_point():
        return losses_of(outputs, wanted) / wanted.var(1, correction=0)
    return (outputs.argmax(2) != wanted).float().mean(1)
