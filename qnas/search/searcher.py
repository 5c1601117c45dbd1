"""The search: train the supernet's weights and its architecture in turn, then solve exactly.

Warm-up trains weights only. After it, an architecture step on held-out images follows every few
weight steps. Weights are trained by paths that are drawn evenly among networks within the limits, from
beginning to end, so that no network has better weights for having been chosen. The state between two
steps is explicit, so that a run that was stopped goes on as if it had not been; batches depend only on the
seed and their number.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from qnas.common.errors import ArchError, CheckpointError, UsageError, first_line
from qnas.data.images import ImageData, Split, batch_count
from qnas.nn.gradients import GRADIENT_FORMS, GRADIENTS, GradientForm, gradient_for
from qnas.nn.mixed_block import WEIGHTS_MODES, WeightsMode
from qnas.nn.supernet import (
    Supernet,
    even_logits,
    expected_latency,
    largest_ratio,
    limit_tensors,
    log_probabilities,
    sample_path,
)
from qnas.search.diagnostics import Sight, Watch, make_watch
from qnas.search.effects import IMAGES, NETWORKS_PER_EFFECT, Effects, count_effects, measure_effects
from qnas.search.penalty import LATENCY_LOSSES, LatencyLoss, Multiplier, penalised, settle
from qnas.search.rerank import Ranked, rerank, score_subnet, screen
from qnas.solver.limits import Limits
from qnas.solver.solve import K_BEST, CandidateIndices, Scores, Solution, check_feasible, solve, solve_best
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import (
    Precision,
    TorchDevice,
    check_acceleration,
    choose_acceleration,
    compile_blocks,
)
from qnas.training.loop import check_finite, stream
from qnas.training.optimizer import PathAdamW, make_optimizer, make_schedule, weight_step
from qnas.training.processes import ALONE, World
from qnas.training.scoring import ImageScores, Score, batch_statistics

# Second: ProxylessNAS has 0.999 for searches of many thousand steps; a short one must forget sooner
# how strong the pressure was on the way to the budget.
ARCH_BETAS = (0.0, 0.99)
FINAL_TEMPERATURE = 0.3
# Of the search, until the temperature is final. In the rest the expected latency is kept at the budget
# (`penalty.settle`) and the rate of the architecture falls linearly to its last share: what is undecided
# by then hangs on noise.
ANNEALED_SHARE = 0.85
FINAL_RATE = 0.3
# Weight steps for each network that effects are measured by: its pass forward of up to 128 images is at most
# two thirds of a step of the presets, so that measuring adds at most a sixth to a search.
STEPS_PER_NETWORK = 4
# The same of screened networks, of up to 1,024 images.
STEPS_PER_SCREENED = 32
SCREENED_PER_RANKED = 16
SNAPSHOTS = 60  # of all probabilities that a search logs, spread evenly over it
SETTLING_LOGIT = 0.5  # that a step of settling changes a logit by, at most


Paths = Literal["even", "probabilities"]


@dataclass(frozen=True)
class SearchConfig:
    """How long and how strongly to search. A preset names a whole set."""

    preset: str
    resolution_px: int  # of training; the latency is always that of the space's own resolution
    warmup_epochs: int
    search_epochs: int
    batch_size: int
    learning_rate: float
    arch_learning_rate: float
    arch_every: int  # weight steps per architecture step
    weight_decay: float = 0.01
    label_smoothing: float = 0.1  # in weight steps only
    latency_loss: LatencyLoss = "multiplier"
    weights: WeightsMode = "shared"  # of the candidates, `qnas.nn.mixed_block`
    gradient: GradientForm | None = None  # of the architecture; None is the default of the weights
    # with nested weights: what a weight step runs, the whole mixture or one drawn path
    nested_weight_steps: Literal["mixture", "sampled"] = "sampled"
    # what draws the paths of weight steps: even probabilities, as far as the limits allow, or those of the
    # architecture. With these what is chosen early is trained more and looks better for it: networks of one
    # latency then differ in the supernet by how often they were drawn.
    paths: Paths = "even"
    torch_device: TorchDevice = "auto"
    precision: Precision = "auto"
    compile: bool = False  # slower on CPUs
    # networks whose losses the candidates' effects are fitted to at the end, `search.effects`; None: as many
    # as the effects need, but no more than a share of the search; 0: none, probabilities are derived by
    effect_networks: int | None = None
    k_best: int = K_BEST  # networks that are ranked on all held-out images at the end
    # networks that are solved for and run on some of these images, to find those; None: 16 times as many, but
    # no more than a share of the search
    screened: int | None = None
    random_networks: int = 10
    threads: int = 0  # of torch; 0 leaves that to torch, which takes all cores
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("resolution_px", "search_epochs", "batch_size", "arch_every", "k_best"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')}: expected at least 1, got {getattr(self, name)}")
        counts = (self.effect_networks or 0, self.screened or 0)
        if min(self.warmup_epochs, self.random_networks, self.threads, *counts) < 0:
            raise UsageError(
                "warm-up epochs, random, effect and screened networks and threads: expected at least 0"
            )
        if self.latency_loss not in LATENCY_LOSSES:
            raise UsageError(
                f"unknown latency loss {self.latency_loss!r}, expected one of {', '.join(LATENCY_LOSSES)}"
            )
        if self.weights not in WEIGHTS_MODES:
            raise UsageError(f"unknown weights {self.weights!r}, expected one of {', '.join(WEIGHTS_MODES)}")
        if self.gradient not in (None, *GRADIENT_FORMS):
            raise UsageError(
                f"unknown gradient {self.gradient!r}, expected one of {', '.join(GRADIENT_FORMS)}"
            )
        if self.nested_weight_steps not in ("mixture", "sampled"):
            raise UsageError(
                f"nested weight steps: expected mixture or sampled, got {self.nested_weight_steps!r}"
            )
        if self.paths not in ("even", "probabilities"):
            raise UsageError(f"unknown paths {self.paths!r}, expected one of even, probabilities")
        gradient_for(self.weights, self.gradient)
        check_acceleration(self.torch_device, self.precision)


# By what is searched on; `preset_for` chooses. All three are for two CPU cores or one GPU.
PRESETS: dict[str, SearchConfig] = {
    # some 1,150 training images of 8 x 8, shown at 32: two minutes
    "digits": SearchConfig(
        "digits",
        resolution_px=32,
        warmup_epochs=15,
        search_epochs=45,
        batch_size=64,
        learning_rate=2e-3,
        arch_learning_rate=0.1,
        arch_every=2,
        threads=1,  # on maps this small a second one gains little, and loses much on a busy machine
    ),
    # Fashion-MNIST, CIFAR-10
    "small": SearchConfig(
        "small",
        resolution_px=32,
        warmup_epochs=4,
        search_epochs=6,
        batch_size=128,
        learning_rate=2e-3,
        arch_learning_rate=0.05,
        arch_every=3,
    ),
    # folders of photographs
    "photos": SearchConfig(
        "photos",
        resolution_px=128,
        warmup_epochs=10,
        search_epochs=30,
        batch_size=64,
        learning_rate=1e-3,
        arch_learning_rate=0.05,
        arch_every=3,
    ),
}

PRESET_OF_DATA = {
    "digits": "digits",
    "fashion-mnist": "small",
    "cifar10": "small",
    "imagefolder": "photos",
    "shards": "photos",
}


@dataclass
class SearchState:
    """All that changes from step to step."""

    supernet: Supernet
    weight_optimizer: PathAdamW
    scaler: GradScaler  # of the weights' loss; does nothing but in float16
    schedule: torch.optim.lr_scheduler.LRScheduler
    arch_optimizer: torch.optim.Adam
    multiplier: Multiplier
    generator: torch.Generator  # draws paths and pairs
    watch: Watch
    step: int = 0  # weight steps taken
    arch_step: int = 0


class Searcher:
    """One search, stepped from outside or run to its end."""

    def __init__(
        self,
        space: SearchSpace,
        limits: Limits,
        data: ImageData,
        config: SearchConfig,
        world: World = ALONE,
    ) -> None:
        check_searchable(space, limits)
        self.space, self.limits = space, limits
        self.data, self.config, self.world = data, config, world
        self.acceleration = choose_acceleration(config.torch_device, config.precision, world.local_rank)
        table = limits[0].table
        assert table is not None, "the first limit is a device's"
        self.table, self.limit_ms = table, limits[0].limit
        self.binds = any(limit.binds for limit in limits)
        self.batch_size = min(config.batch_size, len(data.train), len(data.heldout))
        world.check_batch(self.batch_size)
        self.steps_per_epoch = batch_count(data.train, self.batch_size, drop_last=True)
        self.warmup_steps = config.warmup_epochs * self.steps_per_epoch
        self.total_steps = self.warmup_steps + config.search_epochs * self.steps_per_epoch
        self.state = self._initial_state()
        mask = self.state.supernet.mask
        self.limit_tensors = limit_tensors(limits, mask)
        self._even_logits = even_logits(self.limit_tensors, mask)
        self._weights = self.state.supernet.weights
        self._weight_batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._arch_batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def _initial_state(self) -> SearchState:
        generator = torch.Generator().manual_seed(self.config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            supernet = Supernet(self.space, len(self.data.classes), generator, self.config.weights)
        supernet.parts.to(self.acceleration.device)  # the architecture parameters stay on the CPU
        if self.config.compile:
            compile_blocks(supernet)
        optimizer = make_optimizer(supernet.weights, self.config.learning_rate, self.config.weight_decay)
        return SearchState(
            supernet=supernet,
            weight_optimizer=optimizer,
            scaler=self.acceleration.scaler(),
            schedule=make_schedule(optimizer, self.total_steps, self.steps_per_epoch),
            arch_optimizer=torch.optim.Adam(
                [supernet.alpha], lr=self.config.arch_learning_rate, betas=ARCH_BETAS
            ),
            multiplier=Multiplier(),
            generator=generator,
            watch=make_watch(
                self.space,
                self.limits,
                weight_steps=self.total_steps,
                arch_steps=(self.total_steps - self.warmup_steps) // self.config.arch_every,
                classes=len(self.data.classes),
                multiplier_bound=Multiplier().bound,
            ),
        )

    @property
    def is_warming_up(self) -> bool:
        """Whether only weights are trained so far."""
        return self.state.step < self.warmup_steps

    @property
    def steps_done(self) -> int:
        """Weight steps taken so far."""
        return self.state.step

    @property
    def phase(self) -> str:
        """What the next step does."""
        return "warm-up" if self.is_warming_up else "search"

    def to_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, as plain values and tensors."""
        state = self.state
        return {
            "supernet": state.supernet.state_dict(),
            "weight_optimizer": state.weight_optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "schedule": state.schedule.state_dict(),
            "arch_optimizer": state.arch_optimizer.state_dict(),
            "multiplier": asdict(state.multiplier),
            "watch": state.watch.to_dict(),
            "generator": state.generator.get_state(),
            "step": state.step,
            "arch_step": state.arch_step,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises CheckpointError when it is of another search."""
        state = self.state
        try:
            state.supernet.load_state_dict(saved["supernet"])
            state.weight_optimizer.load_state_dict(saved["weight_optimizer"])
            state.scaler.load_state_dict(saved["scaler"])
            state.schedule.load_state_dict(saved["schedule"])
            state.arch_optimizer.load_state_dict(saved["arch_optimizer"])
            state.multiplier = Multiplier(**saved["multiplier"])
            state.watch.load(saved["watch"])
            state.generator.set_state(saved["generator"])
            state.step, state.arch_step = saved["step"], saved["arch_step"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this search: {first_line(error)}") from error

    @property
    def progress(self) -> float:
        """How far the search is, from 0 during the warm-up to 1 at its end."""
        return max(0, self.state.step - self.warmup_steps) / (self.total_steps - self.warmup_steps)

    @property
    def is_settling(self) -> bool:
        """Whether the search is in its last part, in which the expected latency is kept at the budget."""
        return self.progress >= ANNEALED_SHARE

    @property
    def arch_learning_rate(self) -> float:
        """The rate of the architecture's optimiser now."""
        settled = max(0.0, self.progress - ANNEALED_SHARE) / (1 - ANNEALED_SHARE)
        return self.config.arch_learning_rate * (1 - (1 - FINAL_RATE) * settled)

    @property
    def temperature(self) -> float:
        """What the architecture parameters are divided by: from 1 down as the search goes on.

        Probabilities that stay spread have their expected latency at the budget while the most
        probable network, all identities, is far below it. Sharp ones have both at the budget.
        """
        return float(FINAL_TEMPERATURE ** min(1.0, self.progress / ANNEALED_SHARE))

    @property
    def logits(self) -> Tensor:
        """What the probabilities are the softmax of, (positions, candidates), detached."""
        return self.state.supernet.logits(self.temperature).detach()

    @property
    def expected(self) -> Tensor:
        """What is expected of a network drawn from the architecture's probabilities, an amount a limit."""
        fixed, cells, _ = self.limit_tensors
        return expected_latency(self.logits, self.state.supernet.mask, fixed, cells)

    @property
    def expected_ms(self) -> float:
        """The latency that is expected on the first device."""
        return float(self.expected[0])

    @property
    def expected_ratio(self) -> float:
        """The expected amount over its limit, of the limit where this is largest."""
        return float(largest_ratio(self.expected, self.limit_tensors.limit))

    def step(self) -> dict[str, Any]:
        """Take a weight step, and an architecture step when it is due; return what to log.

        That is figures, and as `warnings` what goes wrong. Raises TrainingError where a loss is no number.
        """
        state, config = self.state, self.config
        if self._weight_batches is None:
            # started here so that a loaded state is respected
            ours = partial(
                stream, batch_size=self.batch_size, device=self.acceleration.device, part=self.world.part
            )
            self._weight_batches = ours(self.data.train, seed=config.seed, start=state.step, augment=True)
            self._arch_batches = ours(
                self.data.heldout, seed=config.seed + 1, start=state.arch_step, augment=False
            )
        loss = self._weight_step(*next(self._weight_batches))
        check_finite(loss, state.step + 1)
        figures: dict[str, Any] = {"loss": loss}
        warnings = state.watch.after_weight_step(loss)
        searching = not self.is_warming_up
        state.step += 1
        if searching and (state.step - self.warmup_steps) % config.arch_every == 0:
            assert self._arch_batches is not None
            figures["arch_loss"], figures["arch_accuracy"] = self._arch_step(*next(self._arch_batches))
            check_finite(figures["arch_loss"], state.step)
            state.arch_step += 1
            figures |= self.describe_budget() | self.describe_probabilities()
            if self._is_snapshot():
                figures["probabilities"] = self._rounded_probabilities()
            warnings += state.watch.after_arch_step(self._sight(figures))
        return figures | ({"warnings": warnings} if warnings else {})

    def _sight(self, figures: Mapping[str, float]) -> Sight:
        choices = sum(len(position.names) > 1 for position in self.space.positions)
        return Sight(
            progress=self.progress,
            settling=self.is_settling,
            ratio=self.expected_ratio,
            multiplier=figures["multiplier"],
            entropy=figures["entropy"],
            identity_share=figures["identity_share"],
            shares={name: sum(found) / choices for name, found in self._shares().items()},
        )

    def summary(self, row: Mapping[str, float]) -> str:
        """Put a step's figures into a few words."""
        if "expected_ms" in row:
            return (
                f"loss {row['loss']:.3f}, held-out {row['arch_accuracy']:.1%}, expected "
                f"{row['expected_ms']:.2f} of {self.limit_ms:.2f} ms"
            )
        return f"loss {row['loss']:.3f}" if self.is_warming_up else ""

    def _weight_step(self, images: Tensor, labels: Tensor) -> float:
        state = self.state
        supernet = state.supernet.train()
        if self.config.weights == "nested" and self.config.nested_weight_steps == "mixture":
            with torch.no_grad():
                routes = supernet.mixture(self.temperature)
        else:
            logits = self._even_logits if self.config.paths == "even" else self.logits
            routes = sample_path(logits, supernet.mask, state.generator)
        loss = weight_step(
            lambda x: supernet(x, routes),
            state.weight_optimizer,
            images,
            labels,
            self.config.label_smoothing,
            acceleration=self.acceleration,
            scaler=state.scaler,
            world=self.world,
        )
        state.schedule.step()
        return float(loss)

    def _arch_step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Move the architecture parameters; return the loss of the task and the share that is right."""
        state, supernet, config = self.state, self.state.supernet.train(), self.config
        draw = GRADIENTS[gradient_for(config.weights, config.gradient)]
        step = draw(supernet, self.temperature, state.generator)
        for weight in self._weights:  # no gradients of weights: they are most of a backward pass
            weight.requires_grad_(False)
        with self.acceleration.autocast_unscaled():
            said = supernet(images, step.routes)
            task_loss = F.cross_entropy(said, labels)
        # of several limits the one that is furthest exceeded presses, as if it were the device's
        ratio = largest_ratio(step.expected(self.limit_tensors), self.limit_tensors.limit)
        (pull,) = torch.autograd.grad(ratio, supernet.alpha, retain_graph=True)
        strength = state.multiplier.strength(float(pull.norm()))  # 0 where the budget does not bind
        loss = penalised(config.latency_loss, task_loss, ratio * self.limit_ms, self.limit_ms, strength)
        (supernet.alpha.grad,) = torch.autograd.grad(loss, supernet.alpha)
        self.world.average([supernet.alpha.grad])  # the latency's part is the same in all processes
        task_loss, right = task_loss.detach(), _share_right(said.detach(), labels)
        self.world.average([task_loss, right])
        task_norm = float((supernet.alpha.grad - strength * pull).norm())
        state.arch_optimizer.param_groups[0]["lr"] = self.arch_learning_rate
        state.arch_optimizer.step()
        step.after_update(supernet)
        for weight in self._weights:
            weight.requires_grad_(True)
        if self.binds:
            state.multiplier = state.multiplier.after(
                self.expected_ratio * self.limit_ms, self.limit_ms, task_norm
            )
            if self.is_settling and config.latency_loss == "multiplier":
                self._settle()
        return float(task_loss), float(right)

    def _settle(self) -> None:
        supernet, temperature = self.state.supernet, self.temperature
        fixed, cells, limit = self.limit_tensors

        def ratio() -> Tensor:
            expected = expected_latency(supernet.logits(temperature), supernet.mask, fixed, cells)
            return largest_ratio(expected, limit)

        settle(supernet.alpha, ratio, SETTLING_LOGIT * temperature)

    def describe_budget(self) -> dict[str, float]:
        """Return what is expected, in all limits, and what presses on it."""
        expected = self.expected
        ratios = (expected / self.limit_tensors.limit).tolist()
        return {
            "expected_ms": float(expected[0]),
            "limit_ms": self.limit_ms,
            **{f"of_limit_{limit.name}": ratio for limit, ratio in zip(self.limits, ratios, strict=True)},
            "multiplier": self.state.multiplier.value,
            "temperature": self.temperature,
        }

    def describe_probabilities(self) -> dict[str, float]:
        """Return the mean entropy a position (nats), and identity's mean share where there is one."""
        mask = self.state.supernet.mask
        log_p = log_probabilities(self.logits, mask)
        entropy = -(log_p.exp() * log_p.masked_fill(~mask, 0.0)).sum(1).mean()
        identities = self._shares().get("identity", [])
        return {
            "entropy": float(entropy),
            "identity_share": sum(identities) / len(identities) if identities else 0.0,
        }

    def _is_snapshot(self) -> bool:
        """Whether all probabilities are logged: after the first and the last step, and some between."""
        steps = (self.total_steps - self.warmup_steps) // self.config.arch_every
        return self.state.arch_step in (1, steps) or self.state.arch_step % max(1, steps // SNAPSHOTS) == 0

    def _rounded_probabilities(self) -> list[list[float]]:
        """Return every candidate's probability, by position, to four decimals."""
        return [[round(math.exp(log_p), 4) for log_p in row] for row in self.log_probabilities]

    def _shares(self) -> dict[str, list[float]]:
        """Return each candidate's probability at every position where it is one of several, by name."""
        p = log_probabilities(self.logits, self.state.supernet.mask).exp().tolist()
        found: dict[str, list[float]] = {}
        for row, position in zip(p, self.space.positions, strict=True):
            if len(position.names) > 1:
                for name, share in zip(position.names, row, strict=False):
                    found.setdefault(name, []).append(share)
        return found

    @property
    def log_probabilities(self) -> Scores:
        """The logarithm of each candidate's probability, by position."""
        return self._log_probabilities(self.temperature)

    def _log_probabilities(self, temperature: float) -> Scores:
        supernet = self.state.supernet
        log_p = log_probabilities(supernet.logits(temperature).detach(), supernet.mask)
        return tuple(
            tuple(row[: len(position.candidates)].tolist())
            for row, position in zip(log_p, self.space.positions, strict=True)
        )

    def derive(self) -> Solution:
        """Solve for the most probable network within the budget."""
        return solve(self.log_probabilities, self.limits)

    @property
    def effect_networks(self) -> int:
        """How many networks are drawn to measure the candidates' effects."""
        if self.config.effect_networks is not None:
            return self.config.effect_networks
        return min(NETWORKS_PER_EFFECT * count_effects(self.space), self.total_steps // STEPS_PER_NETWORK)

    @property
    def screened(self) -> int:
        """How many networks are solved for."""
        if self.config.screened is not None:
            return max(self.config.screened, self.config.k_best)
        most = min(SCREENED_PER_RANKED * self.config.k_best, self.total_steps // STEPS_PER_SCREENED)
        return max(most, self.config.k_best)

    def measure_effects(self, on_measured: Callable[[int], None] = lambda _: None) -> Effects | None:
        """Measure what each candidate adds to the held-out loss; None where that cannot be told.

        The state stays as it is, so that a second call returns the same.
        """
        split, seed = self.data.heldout, self.config.seed + 2  # other draws than those of the steps
        size, device = min(IMAGES, len(split)), self.acceleration.device
        return measure_effects(
            self.space,
            self.limits,
            # as they are before a temperature sharpens them: settled positions are to vary as well
            self._log_probabilities(1.0),
            self.losses,
            stream(split, size, seed, 0, augment=False, device=device),
            self.effect_networks,
            np.random.default_rng(seed),
            on_measured,
        )

    @torch.no_grad()
    def losses(self, networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each network on each image with the supernet's weights, in nats.

        images: (B, C, H, W), labels: (B,) -> (networks, B), float64 on the CPU; batch norms use the batch's
        own statistics.
        """
        supernet = self.state.supernet.eval()
        with batch_statistics(supernet), self.acceleration.autocast_unscaled():
            rows = [F.cross_entropy(supernet(images, n), labels, reduction="none") for n in networks]
        return torch.stack(rows).double().cpu()

    def derive_best(self, effects: Effects | None = None) -> tuple[Solution, ...]:
        """Solve for the best networks within the budget: of least loss by the effects, or most probable."""
        scores = effects.scores if effects else self.log_probabilities
        return solve_best(self.space, scores, self.limits, self.screened)

    def screen(
        self, solutions: Sequence[Solution], on_screened: Callable[[], None] = lambda: None
    ) -> tuple[Solution, ...]:
        """Return those of the networks that are to be ranked: the best on some held-out images."""
        keep, device = self.config.k_best, self.acceleration.device
        return screen(self.space, solutions, self.data, self.losses, keep, device, on_screened)

    def rank(
        self, solutions: Sequence[Solution], on_scored: Callable[[], None] = lambda: None
    ) -> tuple[Ranked, ...]:
        """Rank networks by what they do on all held-out images, the first the one to take."""
        return rerank(self.space, solutions, self.data, self.score_images, on_scored)

    def score(self, arch: Arch, split: Split | None = None) -> Score:
        """Evaluate a network with the supernet's weights, on the test images unless told otherwise."""
        return self.score_images(arch, split or self.data.test).score

    def score_images(self, arch: Arch, split: Split) -> ImageScores:
        """Evaluate a network with the supernet's weights on each image of a split."""
        network = self.state.supernet.subnet(arch, len(self.data.classes))
        return score_subnet(network, self.data, split, self.acceleration.device)


def check_searchable(space: SearchSpace, limits: Limits) -> None:
    """Raise, before anything is trained, where there is nothing to search or no way to succeed."""
    if space.is_fixed:
        raise ArchError(f"space {space.name} has one network only: there is nothing to search")
    check_feasible(limits)


def preset_for(data_kind: str, **changes: Any) -> SearchConfig:
    """Return the preset of a kind of data set, with the given fields changed; None changes nothing."""
    config = PRESETS[PRESET_OF_DATA[data_kind]]
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def _share_right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()
