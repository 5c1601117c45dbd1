"""Training of one network on its own: from the supernet's weights or from scratch.

It is trained on all training images. The test images are looked at after every epoch for the curve,
but the result is not chosen by them: it is the last weights, or their moving average where the recipe
has one. The weights of the best epoch are kept beside it, as what they are: the pick of many looks at
the test images, whose accuracy there is too high. There is no split to choose by without that: whoever
needs one gives up training images, and the rate that falls to a hundredth leaves the last weights
among the best.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth

from qnas.common.errors import CheckpointError, TrainingError, UsageError, first_line
from qnas.common.files import json_text, write_json
from qnas.data.augmentation import Augmentation
from qnas.data.broken_images import broken_copies
from qnas.data.images import ImageData, batch_count, batches, sample_images
from qnas.nn.blocks import Chain, QuadraBlock, count_parameters, quadratic_weights, start_linear
from qnas.nn.subnet import build_subnet, subnet_state
from qnas.runs.checkpoint import Checkpoints
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import (
    ARCH_FILE,
    BEST_FILE,
    BROKEN_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    SAMPLE_FILE,
    SPACE_FILE,
    SPEED_FILE,
    SUPERNET_FILE,
    WEIGHTS_FILE,
)
from qnas.runs.report.page import close_with_report
from qnas.runs.run_folder import opened
from qnas.runs.tensors import load_supernet, save_tensors
from qnas.training.acceleration import (
    Precision,
    TorchDevice,
    check_acceleration,
    choose_acceleration,
    compile_blocks,
)
from qnas.training.evaluation import Tally, accuracy_facts, measure_speed, size_facts, tally
from qnas.training.loop import check_finite, run_to_end, stream
from qnas.training.optimizer import ReLinear, Teacher, make_optimizer, make_schedule, weight_step
from qnas.training.predictions import predict
from qnas.training.processes import ALONE, World
from qnas.training.recipe import Recipe
from qnas.training.scoring import Score

SAMPLE_IMAGES = 16  # of the test images, kept to check an export with

REMEDY = (
    "--force starts anew, with a smaller --learning-rate, a longer --warmup-epochs, a smaller "
    "--gradient-clip or --linear-start (--quadratic-gamma below 1)"
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train a network, and on what. The recipe has its resolution."""

    recipe: Recipe
    torch_device: TorchDevice = "auto"
    precision: Precision = "auto"
    compile: bool = False  # slower on CPUs
    threads: int = 0  # of torch; 0 leaves that to torch, which takes all cores
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.recipe.resolution_px is not None, "left open"
        check_acceleration(self.torch_device, self.precision)

    @property
    def resolution_px(self) -> int:
        """Height and width of the images."""
        assert self.recipe.resolution_px is not None
        return self.recipe.resolution_px

    def values(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {**vars(self), "recipe": self.recipe.values()}


def load_weights(network: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Load a network's weights. Raises CheckpointError if they are another network's."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: not the weights of this network: {problem}") from error


def has_supernet(source: FoundArch) -> bool:
    """Whether the weights of the supernet that the architecture is from are there."""
    return supernet_file(source).is_file()


def supernet_file(source: FoundArch) -> Path:
    """Return where the supernet's weights lie: beside the architecture, or where it says they do."""
    return source.folder / str(source.document.get("supernet", SUPERNET_FILE))


def inherit(network: nn.Module, source: FoundArch) -> None:
    """Load the supernet's weights of the chosen candidates. Raises CheckpointError."""
    file = supernet_file(source)
    state = subnet_state(load_supernet(file), source.space, source.arch)
    try:
        load_weights(network, state, file)
    except CheckpointError as error:  # data with other classes than those searched on, most likely
        raise CheckpointError(f"{error}; --weights scratch starts without them") from error


def drop_blocks(network: nn.Module, rate: float) -> None:
    """Have residual blocks leave out what they add to some images while training (arXiv 1603.09382).

    The rate grows linearly from 0 at the first block to `rate` at the last. It hangs on the blocks of this
    network as hooks: the weights keep their names, and a supernet or an exported network has none of it.
    What a QuadraBlock adds is left out as a whole, so that its fused halves stay as they are.
    """
    blocks = [
        block
        for block in network.modules()
        if isinstance(block, QuadraBlock) or (isinstance(block, Chain) and block.is_residual)
    ]
    for number, block in enumerate(blocks):
        depth = StochasticDepth(rate * number / max(len(blocks) - 1, 1), mode="row")

        def drop(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, depth: StochasticDepth = depth
        ) -> Tensor | None:
            return inputs[0] + depth(output - inputs[0]) if module.training else None

        block.register_forward_hook(drop)


class SubnetTrainer:
    """The training of one network, stepped by `train.run_to_end`."""

    phase = "train"

    def __init__(
        self,
        network: nn.Module,
        data: ImageData,
        config: TrainConfig,
        world: World = ALONE,
        teacher: Teacher | None = None,
    ) -> None:
        recipe = config.recipe
        self.acceleration = choose_acceleration(config.torch_device, config.precision, world.local_rank)
        self.network = network.to(self.acceleration.device)
        # before the hooks below, of which the average needs none
        self.average = _moving_average(network) if recipe.ema_decay else None
        if recipe.stochastic_depth:
            drop_blocks(network, recipe.stochastic_depth)
        if config.compile:
            compile_blocks(network)
        self.data, self.config, self.world, self.teacher = data, config, world, teacher
        self.split = data.train_and_heldout
        self.batch_size = min(recipe.batch_size, len(self.split))
        self._check_batch()
        self.steps_per_epoch = batch_count(self.split, self.batch_size, drop_last=True)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.optimizer = make_optimizer(
            network.parameters(), recipe.learning_rate, recipe.weight_decay, _relinear(network, recipe)
        )
        warmup_steps = round(recipe.warmup_epochs * self.steps_per_epoch)
        self.schedule = make_schedule(self.optimizer, self.total_steps, warmup_steps)
        self.scaler = self.acceleration.scaler()
        self.augmentation = _augmentation(recipe, len(data.classes))
        self.steps_done = 0
        self.accuracy = float("nan")
        self.epoch_loss = 0.0  # summed over the steps of the epoch under way
        self.best: dict[str, Any] = {}  # epoch, test_accuracy, weights
        # both made at the first step: of a loaded state, and with the processes joined
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._forward: nn.Module = network

    def _check_batch(self) -> None:
        """Raise UsageError where a batch cannot be split evenly over processes and parts."""
        self.world.check_batch(self.batch_size)
        parts = self.config.recipe.accumulation
        if self.batch_size // self.world.size % parts:
            raise UsageError(
                f"accumulation: the {self.batch_size // self.world.size} images of a step and process cannot "
                f"be taken in {parts} equal parts: another --accumulation or --batch-size"
            )

    @property
    def result(self) -> nn.Module:
        """The network that is tested and kept: the moving average where there is one."""
        if self.average is None:
            return self.network
        averaged: nn.Module = self.average.module
        return averaged

    def step(self) -> dict[str, float]:
        """Take a weight step; at the end of an epoch look at the test images."""
        config, recipe = self.config, self.config.recipe
        if self._batches is None:
            self._batches = stream(
                self.split,
                self.batch_size,
                config.seed,
                self.steps_done,
                augment=True,
                augmentation=self.augmentation,
                device=self.acceleration.device,
                part=self.world.part,
            )
            self._forward = self.world.parallel(self.network)
        images, labels = next(self._batches)
        self._forward.train()
        # what modules draw: other images in other processes are other draws
        torch.manual_seed(_step_seed(config.seed, self.steps_done, self.world.rank))
        loss = weight_step(
            self._forward,
            self.optimizer,
            images,
            labels,
            recipe.label_smoothing,
            acceleration=self.acceleration,
            scaler=self.scaler,
            gradient_clip=recipe.gradient_clip,
            parts=recipe.accumulation,
            teacher=self.teacher,
        )
        self.world.average([loss])  # the gradients are averaged already
        check_finite(float(loss), self.steps_done + 1, REMEDY)
        if self.average is not None:
            self.average.multi_avg_fn = _average_with(_decay(recipe.ema_decay, self.steps_done))
            self.average.update_parameters(self.network)
        row = {"loss": float(loss)}
        self.epoch_loss += float(loss)
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.steps_done += 1
        if self.steps_done % self.steps_per_epoch == 0:
            row |= self._end_epoch(rate)
        return row

    def _end_epoch(self, rate: float) -> dict[str, float]:
        """Look at the test images, and keep the weights where they are the best so far."""
        score = self.test()
        self.accuracy = score.accuracy
        epoch = self.steps_done // self.steps_per_epoch
        if score.accuracy >= self.best.get("test_accuracy", 0.0):
            weights = {name: tensor.detach().clone() for name, tensor in self.result.state_dict().items()}
            self.best = {"epoch": epoch, "test_accuracy": score.accuracy, "weights": weights}
        train_loss, self.epoch_loss = self.epoch_loss / self.steps_per_epoch, 0.0
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "learning_rate": rate,
            "test_accuracy": score.accuracy,
            "test_loss": score.loss,
        }

    def test(self) -> Score:
        """Score the network on the test images."""
        return self.tally().score

    def tally(self) -> Tally:
        """Count what the network gets right of the test images, by class."""
        self.result.eval()
        images = batches(self.data.test, 256, device=self.acceleration.device)
        return tally(self.result, images, len(self.data.classes))

    def summary(self, row: Mapping[str, float]) -> str:
        """Put a step's figures into a few words."""
        known = "" if math.isnan(self.accuracy) else f", test accuracy {self.accuracy:.2%}"
        return f"loss {row['loss']:.3f}{known}"

    def to_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps_done": self.steps_done,
            "accuracy": self.accuracy,
            "epoch_loss": self.epoch_loss,
            "best": self.best,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises CheckpointError when it is of another training."""
        try:
            self.network.load_state_dict(saved["network"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.schedule.load_state_dict(saved["schedule"])
            self.steps_done, self.accuracy = saved["steps_done"], saved["accuracy"]
            self.epoch_loss, self.best = saved["epoch_loss"], saved["best"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this training: {first_line(error)}"
            ) from error


def train_subnet(
    source: FoundArch,
    data: ImageData,
    config: TrainConfig,
    folder: Path,
    request: Mapping[str, Any],
    *,
    from_supernet: bool,
    teacher: Teacher | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    world: World = ALONE,
) -> Score:
    """Train the network of an architecture in a folder; return its score on the test images.

    `request` is what else was asked, for config.json. A linear start undoes the supernet's quadratic
    weights: UsageError with both.

    Of several processes only the main one reads and writes there. Writes the weights as safetensors,
    with the architecture and its space beside them. Raises CheckpointError where the folder or the
    supernet's weights cannot be used.
    """
    if folder.resolve() == source.folder.resolve():
        raise CheckpointError(f"{folder}: holds the architecture itself: train in another folder")
    if from_supernet and config.recipe.linear_start:
        raise UsageError(
            "a linear start sets weights to zero that the supernet trained: --weights scratch, or "
            "--no-linear-start"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_subnet(source.space, source.arch, len(data.classes))
    if from_supernet:
        inherit(network, source)
    if config.recipe.linear_start:
        start_linear(network)
    request = {"train": config.values(), "from_supernet": from_supernet, **request}
    copies = {
        SPACE_FILE: source.space.to_yaml(),
        ARCH_FILE: json_text(source.document),
        RECIPE_FILE: config.recipe.to_yaml(),
        **broken_copies(BROKEN_FILE, data.broken),
    }
    trainer = SubnetTrainer(network, data, config, world, teacher)
    train = partial(run_to_end, trainer, folder, seed=config.seed, resume=resume, quiet=quiet, world=world)
    if not world.is_main:
        train()
        return trainer.test()
    with opened(folder, request, copies, result=RESULT_FILE, resume=resume, force=force):
        try:
            train()
        except TrainingError as error:
            raise _keep_best(trainer, folder, error) from error
        return _finish(trainer, folder, source, request)


def _finish(trainer: SubnetTrainer, folder: Path, source: FoundArch, request: Mapping[str, Any]) -> Score:
    network, data, found = trainer.result, trainer.data, trainer.tally()
    save_tensors(folder / WEIGHTS_FILE, network.state_dict())
    best = dict(trainer.best)
    save_tensors(folder / BEST_FILE, best.pop("weights"))
    images, labels = sample_images(data.test, SAMPLE_IMAGES)
    save_tensors(folder / SAMPLE_FILE, {"images": images, "labels": labels})
    predictions = predict(network, data.test, trainer.acceleration.device)
    save_tensors(folder / PREDICTIONS_FILE, predictions)
    speed = measure_speed(network, trainer.acceleration, data.channels, data.resolution_px)
    write_json(folder / SPEED_FILE, speed)
    score = found.score
    result = {
        "schema": "qnas.subnet/1",
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
        "test_images": score.images,
        "broken_images": len(data.broken),
        **accuracy_facts(found, data.classes),
        "best_by_test_images": best,
        "params": count_parameters(network),
        "deployed": size_facts(source),
        "resolution_px": trainer.config.resolution_px,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "data": request["data"],
    }
    close_with_report(folder, {RESULT_FILE: result})
    # last, since its presence says that the run is complete
    write_json(folder / RESULT_FILE, result)
    Checkpoints(folder).remove()
    return score


def _keep_best(trainer: SubnetTrainer, folder: Path, error: TrainingError) -> TrainingError:
    """Save the best weights of a training that came to nothing; return what to raise."""
    if not trainer.best:
        return error
    save_tensors(folder / BEST_FILE, trainer.best["weights"])
    kept = f"the weights of epoch {trainer.best['epoch']} are in {folder / BEST_FILE}"
    return TrainingError(f"{error}; {kept}")


def _moving_average(network: nn.Module) -> AveragedModel:
    """Return a copy of the network that `update_parameters` moves towards it, batch statistics included."""
    average = AveragedModel(network, multi_avg_fn=_average_with(0.0), use_buffers=True)
    average.requires_grad_(False)
    return average


def _average_with(decay: float) -> Any:
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _decay(decay: float, step: int) -> float:
    """Return the decay of a moving average after `step` updates: less at first.

    The first weights are random, and of a short training they would be most of the average.
    """
    return min(decay, (1 + step) / (10 + step))


def _relinear(network: nn.Module, recipe: Recipe) -> ReLinear | None:
    """Return how the quadratic weights are let in; None where they are as others. Raises UsageError."""
    asked = (recipe.quadratic_gamma, recipe.quadratic_alpha, recipe.quadratic_beta)
    if asked == (1, 0, 0) and not recipe.linear_start:
        return None
    weights = quadratic_weights(network)
    if not weights:
        raise UsageError("linear start, quadratic gamma, alpha and beta: the network has no quadratic block")
    return None if asked == (1, 0, 0) else ReLinear(weights, *asked)


def _augmentation(recipe: Recipe, classes: int) -> Augmentation | None:
    """Return what is done to images beside shifts and mirroring; None where that is nothing."""
    augmentation = Augmentation(
        classes,
        recipe.randaugment,
        recipe.randaugment_std,
        recipe.random_erasing,
        recipe.mixup,
        recipe.cutmix,
        recipe.random_resized_crop,
    )
    return None if augmentation == Augmentation(classes, 0, recipe.randaugment_std) else augmentation


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]) >> 1
