"""Finalists: diverse networks within the limits that are trained by themselves, of which the best is chosen.

A supernet that is trained for minutes favours the kind of block that learns fastest, and a choice by its
weights cannot know. The finalists are therefore trained alone: with the recipe of `qnas train-subnet`, on
the training images of the search, at the size at which that training begins. They are judged on the
held-out images, never on test images. Successive halving (`search.halving`) thins them out.

A finalist has one schedule over all its epochs, which rungs interrupt and do not change: the training of a
network that stays is an ordinary one, nothing is repeated, and the winner ends with a low rate. While the
rate is high, the weights jump about, so a network is judged by their moving average, also where the recipe
has none. All finalists are trained with one seed and thus see the same batches.

The trainings correct the effects, by one number for each kind of block: how many nats a block of the kind
lowers the loss beyond its effect. It is fitted to the held-out losses at the end of the first rung, where all
finalists have equally many epochs, by a ridge regression whose strength is chosen by leave-one-out
cross-validation, and it is used only if it then predicts the networks left out better than the effects do.

Of a family of spaces, the finalists are of the layouts whose networks are among those that the family's solve
returned, as many of each. Each is trained and judged at the size of images of its own layout.

Each finalist is trained in its own folder, with checkpoints, so that a killed search goes on with the step
where it was. The chosen network's weights stay in the folder of all finalists, for `qnas train-subnet`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from torch import Tensor

from qnas.common.errors import CheckpointError, TrainingError, UsageError
from qnas.common.files import remove_leftovers, write_json
from qnas.common.progress import Display, silent
from qnas.common.reading import read_json
from qnas.data.image_data import ImageData
from qnas.nn.blocks import start_linear
from qnas.nn.subnet import build_subnet
from qnas.runs import names
from qnas.runs.tensors import save_tensors
from qnas.search.config import SearchConfig
from qnas.search.diversity import choose_diverse, pool_of
from qnas.search.effects import STRENGTHS
from qnas.search.family_selection import FamilySelection, choose_over_layouts
from qnas.search.halving import Rung, best_first, plan_rungs
from qnas.search.problem import Problem
from qnas.search.selection import Selection, count_screened
from qnas.search.sizes import scaled_px
from qnas.search.state import SearchState
from qnas.solver.kinds import corrected, count_blocks, kinds_of, names_of
from qnas.solver.solve import Solution
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.family import Layout, SpaceFamily
from qnas.spaces.lower import check_resolution
from qnas.spaces.space import SearchSpace
from qnas.training.batch_sizes import fitting_batch
from qnas.training.loop import run_to_end
from qnas.training.losses import Objective
from qnas.training.processes import World
from qnas.training.recipe import Recipe, TrainConfig, default_recipe
from qnas.training.subnet_trainer import SubnetTrainer

AVERAGED = 0.99  # decay of the average that finalists are judged by, where the recipe has none
LEAST_FITTED = 4  # finalists that a correction of the effects needs

Biases = Mapping[str, float]  # nats by which a block of each kind lowers the loss beyond its effect


@dataclass
class Finalist:
    """A network that is trained by itself, and what its training showed so far."""

    number: int  # from 1, over all rounds
    round: int  # from 1
    solution: Solution
    arch: Arch
    layout: Layout
    trained_px: int  # the size of its images
    accuracies: list[float] = field(default_factory=list)  # on held-out images, after each epoch
    balanced_accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # that its training took on this machine, in all runs of it that were not killed
    problem: str = ""  # why its training ended early; it counts as the worst


Best = tuple[Finalist, dict[str, Tensor]]  # a finalist that is trained to the end, and its weights


@dataclass(frozen=True)
class Round:
    """The finalists of a round, and how they were found and thinned out."""

    biases: Biases  # that corrected the effects by which its networks were solved for
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Finals:
    """The outcome of all finalists' trainings."""

    training: TrainConfig
    start: str  # "supernet" or "scratch"
    factor: int
    images: int  # training images
    finalists: tuple[Finalist, ...]
    rounds: tuple[Round, ...]
    winner: Finalist
    biases: Biases  # that correct the effects from now on; empty where none predicts the trainings
    explained: float | None  # share of what the effects leave unexplained, leave-one-out; None: not fitted
    weights: dict[str, Tensor]  # of the winner


# ---- settings


def finalist_recipe(config: SearchConfig, kind: str, *, is_pretrained: bool = False) -> Recipe:
    """Return the recipe of the finalists' training: as asked, or that of train-subnet for a kind of data."""
    inherits = is_pretrained and config.finalists_from == "supernet"
    return Recipe.load(config.finalist_recipe or default_recipe(kind, is_pretrained=inherits))


def finalist_training(
    config: SearchConfig, recipe: Recipe, space: SearchSpace, images: int, world: World
) -> TrainConfig:
    """Return the settings of a finalist's training on so many training images.

    Its images have the size at which train-subnet would begin with the recipe. Raises SpaceError where
    the space has no networks for that size, UsageError for a linear start from the supernet, and for a recipe
    that needs trained weights from scratch.
    """
    if recipe.linear_start and config.finalists_from == "supernet":
        raise UsageError(
            "`finalist_recipe`: its linear_start sets weights to zero that the supernet trained: give "
            "`finalists_from='scratch'` too"
        )
    last_px = recipe.resolution_px or space.input.resolution_px
    first_px = recipe.start_resolution_px or (None if recipe.resolution_px else config.resolution_px)
    sizes = recipe.override({"resolution_px": last_px, "start_resolution_px": first_px})
    recipe.check_start(trained=config.finalists_from == "supernet", where="`finalist_recipe`: ")
    px = sizes.stages[0][0]
    check_resolution(space, px)
    changes = {
        "epochs": config.epochs_of_finalists,
        # a recipe is for more epochs
        "head_epochs": min(recipe.head_epochs, config.epochs_of_finalists - 1),
        "resolution_px": px,
        "start_resolution_px": px,
        "batch_size": fitting_batch(recipe.batch_size, images, parts=world.size * recipe.accumulation),
        "ema_decay": recipe.ema_decay or AVERAGED,
    }
    return TrainConfig(
        recipe=sizes.override(changes),
        torch_device=config.torch_device,
        precision=config.precision,
        compile=config.compile,
        threads=config.threads,
        seed=config.seed,
        loss=config.loss,
        metric=config.metric,
        class_weights=config.class_weights,
        sampler=config.sampler,
    )


# ---- one finalist


class FinalistTrainer:
    """The training of a finalist up to a rung's end, stepped by `loop.run_to_end`."""

    phase: str

    def __init__(self, finalist: Finalist, trainer: SubnetTrainer, phase: str) -> None:
        self.finalist, self.trainer, self.phase = finalist, trainer, phase
        self.total_steps = 0  # at the end of the rung

    @property
    def steps_done(self) -> int:
        """Steps taken so far."""
        return self.trainer.steps_done

    def train_until(self, epochs: int) -> None:
        """Set the epochs at the end of the rung."""
        self.total_steps = epochs * self.trainer.steps_per_epoch

    def step(self) -> dict[str, float]:
        """Take a step; at the end of an epoch, note the figures on held-out images."""
        row = self.trainer.step()
        if "epoch" not in row:
            return row
        found = {name: row.pop(f"test_{name}") for name in ("accuracy", "balanced_accuracy", "loss")}
        self.finalist.accuracies.append(found["accuracy"])
        self.finalist.balanced_accuracies.append(found["balanced_accuracy"])
        self.finalist.losses.append(found["loss"])
        return row | {f"heldout_{name}": value for name, value in found.items()}

    def summary(self, row: Mapping[str, float]) -> str:
        """Describe a step's figures for the progress display."""
        known = self.finalist.accuracies
        return f"loss {row['loss']:.3f}" + (f", held-out {known[-1]:.1%}" if known else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the state between two steps."""
        return {
            "training": self.trainer.to_dict(),
            "choices": list(self.finalist.arch.choices),
            "accuracies": list(self.finalist.accuracies),
            "balanced_accuracies": list(self.finalist.balanced_accuracies),
            "losses": list(self.finalist.losses),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state. Raises ValueError where it is not of this finalist."""
        if saved["choices"] != list(self.finalist.arch.choices):
            raise ValueError(f"choices: those of another network than finalist {self.finalist.number}")
        self.trainer.load(saved["training"])
        # a resumed search may have trained it beyond this rung
        self.total_steps = max(self.total_steps, self.steps_done)
        epochs = self.trainer.steps_done // self.trainer.steps_per_epoch
        for name in ("accuracies", "balanced_accuracies", "losses"):
            if len(saved[name]) != epochs:
                raise ValueError(f"{name}: {len(saved[name])} of {epochs} epochs")
            setattr(self.finalist, name, list(saved[name]))


def _trainer_of(
    state: SearchState, finalist: Finalist, data: ImageData, training: TrainConfig, phase: str
) -> FinalistTrainer:
    """Return the trainer of a finalist at its start."""
    problem = state.problem
    classes, config = len(data.classes), problem.config
    if config.finalists_from == "supernet":
        network = state.supernet.subnet(finalist.arch, classes, problem.space)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = build_subnet(problem.space, finalist.arch, classes)
        if training.recipe.linear_start:
            start_linear(network)
    trainer = SubnetTrainer(network, data, training, problem.world, objective=problem.objective)
    return FinalistTrainer(finalist, trainer, phase)


def _of_layout(training: TrainConfig, problem: Problem, layout: Layout) -> TrainConfig:
    """Return the settings of a finalist's training at a layout: those of the largest, at its own size."""
    if problem.family is None:
        return training
    largest_px = max(problem.family.family.resolutions_px)
    px = scaled_px(training.resolution_px, layout.resolution_px, largest_px)
    recipe = training.recipe.override({"resolution_px": px, "start_resolution_px": px})
    return training.model_copy(update={"recipe": recipe})


def _data_of_finals(data: ImageData, px: int) -> ImageData:
    """Return the images of the search as a training sees them: the held-out images take the tests' place."""
    train, heldout = data.train.at(px), data.heldout.at(px)
    return replace(data, train_and_heldout=train, test=heldout, resolution_px=px)


# ---- all of them


def hold_finals(
    state: SearchState,
    selection: Selection | FamilySelection,
    folder: Path,
    training: TrainConfig,
    display: Display = silent,
) -> Finals:
    """Train finalists of a finished search in their folder within `folder`, and return what they showed.

    In each process of `joined` ones; the main one says which networks are trained, and writes. Trainings
    that were interrupted go on. Raises Interrupted as `run_to_end`, and TrainingError if no finalist's
    loss stays finite.
    """
    problem = state.problem
    config, world = problem.config, problem.world
    folder = folder / names.FINALISTS_FOLDER
    known_seconds: Mapping[str, float] = {}
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)  # of a killed process
        known_seconds = _read_seconds(folder / names.SECONDS_FILE)
    finalists: list[Finalist] = []
    rounds: list[Round] = []
    biases: Biases = {}
    best: Best | None = None
    explained: float | None = None
    for number in range(1, config.finalist_rounds + 1):
        if number > 1 and not biases:
            break  # nothing was learned that would find others
        found = _choose(problem, selection, finalists, biases) if world.is_main else ()
        found = world.from_main(found)
        if not found:
            break  # all networks within the limits are trained already
        new = _numbered(problem, found, len(finalists), number, training, known_seconds)
        finalists += new
        rungs = plan_rungs(len(new), training.recipe.epochs, config.finalist_factor)
        rounds.append(Round(biases, rungs))
        best = _halve(state, new, rungs, training, folder, best, display)
        refitted = _refit(problem, selection, finalists, rounds) if world.is_main else ({}, None)
        biases, explained = world.from_main(refitted)
    if best is None:
        raise TrainingError(f"no finalist could be trained: {finalists[0].problem}")
    return Finals(
        training,
        config.finalists_from,
        config.finalist_factor,
        len(problem.data.train),
        tuple(finalists),
        tuple(rounds),
        best[0],
        biases,
        explained,
        best[1],
    )


def _numbered(
    problem: Problem,
    found: Sequence[tuple[Layout, Solution]],
    before: int,
    round_number: int,
    training: TrainConfig,
    seconds: Mapping[str, float],
) -> list[Finalist]:
    """Return the finalists of a round, numbered after those `before` them."""
    finalists = []
    for number, (layout, solution) in enumerate(found, before + 1):
        arch = arch_from_indices(problem.space, solution.indices)
        known_s = seconds.get(f"{number:02d}", 0.0)
        px = _of_layout(training, problem, layout).resolution_px
        finalists.append(Finalist(number, round_number, solution, arch, layout, px, seconds=known_s))
    return finalists


def _halve(
    state: SearchState,
    finalists: Sequence[Finalist],
    rungs: Sequence[Rung],
    training: TrainConfig,
    folder: Path,
    best: Best | None,
    display: Display,
) -> Best | None:
    """Train the finalists of a round rung by rung; return the best of all so far, with its weights."""
    problem, world = state.problem, state.problem.world
    last = finalists[-1].number
    staying, epochs = list(finalists), 0
    of_layouts = {each.layout: _of_layout(training, problem, each.layout) for each in finalists}
    sizes = {own.resolution_px for own in of_layouts.values()}
    data = {px: _data_of_finals(problem.data, px) for px in sizes}
    for rung in rungs:
        order = best_first(*_figures(staying, problem.objective, epochs))
        kept = world.from_main([staying[i].number for i in order[: rung.networks]])
        staying = [each for each in finalists if each.number in kept and not each.problem]
        epochs = rung.epochs
        for finalist in staying:
            phase = f"finalist {finalist.number} of {last}"
            own = of_layouts[finalist.layout]
            trainer = _trainer_of(state, finalist, data[own.resolution_px], own, phase)
            _train(trainer, epochs, folder, problem, display)
            if rung is rungs[-1] and not finalist.problem and _is_better(finalist, best, problem, epochs):
                weights = trainer.trainer.result.state_dict()
                best = finalist, {name: tensor.detach().clone() for name, tensor in weights.items()}
    return best


def _choose(
    problem: Problem, selection: Selection | FamilySelection, known: Sequence[Finalist], biases: Biases
) -> tuple[tuple[Layout, Solution], ...]:
    """Return the networks of the next round: the network that the search would choose, and others."""
    kinds, count, solved = kinds_of(problem.space), problem.config.finalists, count_screened(problem)
    if not isinstance(selection, Selection):
        rows = corrected(selection.scores.candidates(problem.space), kinds, biases)
        before = [(each.layout, each.solution.indices) for each in known]
        return choose_over_layouts(problem, selection, rows, count, solved, before)
    pool = pool_of(
        problem.space,
        corrected(selection.scores, kinds, biases),
        problem.limits,
        solved,
        first=None if known else selection.ranking[0].solution.indices,
        without=[finalist.solution.indices for finalist in known],
    )
    return tuple((problem.layout, each) for _, each in choose_diverse([pool], count))


def _train(trainer: FinalistTrainer, epochs: int, folder: Path, problem: Problem, display: Display) -> None:
    """Train a finalist until it has so many epochs behind it, in its own folder."""
    finalist, world = trainer.finalist, problem.world
    own = folder / f"{finalist.number:02d}"
    if world.is_main:
        own.mkdir(parents=True, exist_ok=True)
        remove_leftovers(own)
    trainer.train_until(epochs)
    start = time.monotonic()
    try:
        run_to_end(trainer, own, seed=problem.config.seed, resume=True, display=display, world=world)
    except TrainingError as error:
        finalist.problem = str(error)
    finally:
        finalist.seconds += time.monotonic() - start
        if world.is_main:
            _write_seconds(folder / names.SECONDS_FILE, finalist)


def _read_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of the finalists' trainings so far, by the names of their folders."""
    found = read_json(path, CheckpointError).get("seconds") if path.is_file() else None
    known = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in known if isinstance(value, int | float)}


def _write_seconds(path: Path, finalist: Finalist) -> None:
    seconds = _read_seconds(path) | {f"{finalist.number:02d}": round(finalist.seconds, 3)}
    content = {name: seconds[name] for name in sorted(seconds)}
    write_json(path, {"schema": "qnas.finalists-seconds/1", "seconds": content})


def _figures(
    finalists: Sequence[Finalist], objective: Objective, epochs: int
) -> tuple[list[float], list[float]]:
    """Return the accuracies and losses on held-out images after so many epochs, to compare finalists by.

    Where the objective makes up for rare classes, the accuracies are balanced ones. A finalist whose training
    ended early comes last; before the first epoch, all are equal.
    """
    accuracies, losses = [], []
    for finalist in finalists:
        known = finalist.accuracies if objective.class_weights is None else finalist.balanced_accuracies
        if finalist.problem or not epochs:
            accuracies.append(-math.inf if finalist.problem else 0.0)
            losses.append(math.inf)
        else:  # a resumed one may have more epochs behind it than the rung
            accuracies.append(known[epochs - 1])
            losses.append(finalist.losses[epochs - 1])
    return accuracies, losses


def _is_better(finalist: Finalist, best: tuple[Finalist, Any] | None, problem: Problem, epochs: int) -> bool:
    """Whether a finalist that is trained to the end is better than the best so far."""
    return best is None or best_first(*_figures([best[0], finalist], problem.objective, epochs))[0] == 1


# ---- what the trainings say about the effects


def _refit(
    problem: Problem,
    selection: Selection | FamilySelection,
    finalists: Sequence[Finalist],
    rounds: Sequence[Round],
) -> tuple[Biases, float | None]:
    """Return the bias of each kind of block, and what it explains; none where the effects are unknown."""
    if selection.effects is None:  # log probabilities are no nats of the loss
        return {}, None
    kinds = kinds_of(problem.space)
    epochs = min(round.rungs[0].epochs for round in rounds)
    known = [finalist for finalist in finalists if not finalist.problem]
    if len(known) < LEAST_FITTED:
        return {}, None
    counts = [list(count_blocks(kinds, finalist.solution.indices).values()) for finalist in known]
    if isinstance(selection, Selection):
        rows, constants = selection.scores, [0.0] * len(known)
    else:
        rows = selection.scores.candidates(problem.space)
        constants = [selection.scores.constant(finalist.layout) for finalist in known]
    scores = [
        math.fsum([constant, *(row[i] for row, i in zip(rows, finalist.solution.indices, strict=True))])
        for finalist, constant in zip(known, constants, strict=True)
    ]
    found, explained = fit_biases(
        np.array(counts, dtype=np.float64),
        np.array(scores),
        np.array([finalist.losses[epochs - 1] for finalist in known]),
    )
    return dict(zip(names_of(kinds), found.tolist(), strict=True)) if explained > 0 else {}, explained


def fit_biases(
    counts: NDArray[np.float64], scores: NDArray[np.float64], losses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Fit the bias of each kind of block to trained networks: nats (kinds,), and the share that it explains.

    counts: (networks, kinds), each network's blocks of each kind; scores (networks,), what its effects lower
    the loss by; losses (networks,), in nats, after training. A block of a kind lowers the loss by its bias
    beyond its effect, up to what is common to all networks. The share is of the squares that the effects
    alone leave unexplained, leave-one-out; it is negative where the biases predict worse than none.
    """
    beyond = -losses - scores
    ridge = RidgeCV(alphas=STRENGTHS, scoring=None).fit(counts, beyond)
    # the mean of the other networks, by which no biases predict each network
    n = len(beyond)
    alone = (beyond - beyond.mean()) * n / (n - 1)
    explained = 1 + float(ridge.best_score_) / max(float(np.mean(alone**2)), 1e-30)
    biases: NDArray[np.float64] = np.asarray(ridge.coef_, dtype=np.float64)
    return biases, explained


# ---- its documents


def save_weights(finals: Finals, folder: Path) -> str:
    """Write the winner's weights; return their SHA-256."""
    return save_tensors(folder / names.FINALISTS_FOLDER / names.WEIGHTS_FILE, finals.weights)


def finals_document(
    finals: Finals, space: SearchSpace, weights_sha256: str, family: SpaceFamily | None = None
) -> dict[str, Any]:
    """Return the outcome as JSON values, for search.json; of a family, each network names its space."""
    kinds = kinds_of(space)
    return {
        "from": finals.start,
        "epochs": finals.training.recipe.epochs,
        "factor": finals.factor,
        "seed": finals.training.seed,
        "resolution_px": finals.training.resolution_px,
        "images": finals.images,
        "rounds": [
            {"biases": dict(each.biases), "rungs": [vars(rung) for rung in each.rungs]}
            for each in finals.rounds
        ],
        "networks": [
            {
                "number": each.number,
                "round": each.round,
                "choices": list(each.arch.choices),
                "blocks": {n: c for n, c in count_blocks(kinds, each.solution.indices).items() if c},
                "latency_ms": each.solution.latency_ms,
                "amounts": [limit.amount(each.solution.indices) for limit in each.solution.limits],
                "score": each.solution.score,
                "score_bound": each.solution.bound,
                "rank": each.solution.rank,
                "solved": each.solution.solved,
                "kinds": list(each.solution.kinds),
                **({"stages": list(each.solution.stages)} if each.solution.stages else {}),
                "heldout_accuracies": each.accuracies,
                "heldout_balanced_accuracies": each.balanced_accuracies,
                "heldout_losses": each.losses,
                **({"problem": each.problem} if each.problem else {}),
                **(
                    {"space": family.name_of(each.layout), "resolution_px": each.trained_px} if family else {}
                ),
            }
            for each in finals.finalists
        ],
        "winner": finals.winner.number,
        "weights_sha256": weights_sha256,
        "biases": dict(finals.biases),
        "explained": finals.explained,
    }


def winner_document(finals: Finals, weights_sha256: str) -> dict[str, Any]:
    """Return what arch.json says of the chosen finalist, as JSON values."""
    winner = finals.winner
    return {
        "number": winner.number,
        "of": len(finals.finalists),
        "round": winner.round,
        "from": finals.start,
        "epochs": finals.training.recipe.epochs,
        "seed": finals.training.seed,
        "resolution_px": winner.trained_px,
        "heldout_accuracy": winner.accuracies[-1],
        "heldout_balanced_accuracy": winner.balanced_accuracies[-1],
        "heldout_loss": winner.losses[-1],
        "weights_sha256": weights_sha256,
    }
