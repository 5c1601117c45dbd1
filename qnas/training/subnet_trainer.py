"""The training of one network, from the supernet's weights or from scratch, and the files that it writes.

It is trained on all training images. The test images are evaluated after every epoch for the curve, but do
not select the result: that is the last weights, or their moving average where the recipe has one. The weights
of the best epoch are kept as well, but their accuracy is biased upwards, since it selected them. An unbiased
selection needs a validation split, and as the rate falls to a hundredth, the last weights are among the best.

Where the recipe starts at a smaller size than it ends with, images are resized between epochs, the test
images too. Only the epochs at the last size have a best one, as another size is another task.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth

from qnas.common.errors import CheckpointError, TrainingError, UsageError
from qnas.common.files import json_text, write_json
from qnas.common.progress import Display, silent
from qnas.data.augmentation import Augmentation
from qnas.data.batches import batch_count, batches
from qnas.data.broken_images import broken_copies
from qnas.data.image_data import ImageData, sample_images
from qnas.data.left_out import left_out_facts, write_left_out
from qnas.nn.blocks import count_parameters, quadratic_weights, start_linear
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.nn.pretrained.start import starting_network
from qnas.nn.subnet import build_subnet
from qnas.runs import names
from qnas.runs.checkpoint import Checkpoints
from qnas.runs.found_arch import FoundArch
from qnas.runs.report.page import close_with_report
from qnas.runs.run_folder import opened
from qnas.runs.tensors import save_tensors
from qnas.training.acceleration import choose_acceleration, compile_blocks
from qnas.training.batch_sizes import check_batch, check_batch_norms
from qnas.training.evaluation import accuracy_facts, measure_speed, size_facts
from qnas.training.head_first import backbone, head_alone
from qnas.training.loop import check_finite, run_to_end, stream
from qnas.training.losses import Objective, make_objective
from qnas.training.optimizer import (
    ReLinear,
    Slow,
    Teacher,
    make_optimizer,
    make_schedule,
    weight_step,
)
from qnas.training.processes import ALONE, World
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.saved_state import check_form, check_optimizer, check_unchanged
from qnas.training.scoring import (
    Classified,
    Score,
    classify,
    images_at_once,
    prediction_tensors,
    recalibrate_on,
)
from qnas.training.supernet_weights import inherit, inherit_finalist

SAMPLE_IMAGES = 16  # test images that are kept for checking an export
REMEDY = (
    "A smaller `learning_rate`, more `warmup_epochs`, a smaller `gradient_clip` or `linear_start=True` (with "
    "`quadratic_gamma` below 1) may help"
)
# attributes of a trainer that a checkpoint holds: parts with a state, and values
_PARTS = ("network", "average", "optimizer", "scaler", "schedule")
_VALUES = ("steps_done", "accuracy", "epoch_loss", "best")


class SubnetTrainer:
    """The training of one network, stepped by `loop.run_to_end`."""

    phase = "train"

    def __init__(
        self,
        network: nn.Module,
        data: ImageData,
        config: TrainConfig,
        world: World = ALONE,
        teacher: Teacher | None = None,
        objective: Objective | None = None,
    ) -> None:
        recipe = config.recipe
        self.acceleration = choose_acceleration(config.torch_device, config.precision, world.local_rank)
        self.network = network.to(self.acceleration.device)
        # before the hooks below, which the average does not need
        self.average = AveragedModel(network, use_buffers=True) if recipe.ema_decay else None
        if self.average is not None:
            self.average.requires_grad_(False)
        if recipe.stochastic_depth:
            drop_blocks(network, recipe.stochastic_depth)
        if config.compile:
            compile_blocks(network)
        assert data.resolution_px == recipe.resolution_px, data.resolution_px
        self.data, self.config, self.world, self.teacher = data, config, world, teacher
        self.split, self.test_split = data.train_and_heldout, data.test
        self.objective = objective or make_objective(
            config.loss,
            config.metric,
            self.split.labels,
            len(data.classes),
            config.class_weights,
            config.sampler,
        )
        self.batch_size = recipe.batch_size
        check_batch(self.batch_size, len(self.split), world, parts=recipe.accumulation)
        what = f"`batch_size={self.batch_size}`"
        check_batch_norms(network, self.batch_size, what, world, parts=recipe.accumulation)
        self.steps_per_epoch = batch_count(self.split, self.batch_size, drop_last=True)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.sizes_px = [px for px, epochs in recipe.stages for _ in range(epochs)]  # of each epoch
        self.head_steps = recipe.head_epochs * self.steps_per_epoch  # at first, of the classifier alone
        self.optimizer = make_optimizer(
            network.parameters(),
            recipe.learning_rate,
            recipe.weight_decay,
            _relinear(network, recipe),
            None if recipe.backbone_rate == 1 else Slow(backbone(network), recipe.backbone_rate),
        )
        warmup_steps = round(recipe.warmup_epochs * self.steps_per_epoch)
        self.schedule = make_schedule(self.optimizer, self.total_steps, warmup_steps, self.head_steps)
        self.scaler = self.acceleration.scaler()
        self.augmentation = _augmentation(recipe, len(data.classes))
        self.steps_done = 0
        self.accuracy = self.balanced_accuracy = float("nan")  # the second is for the display only
        self.epoch_loss = 0.0  # summed over the steps of the current epoch
        self.best: dict[str, Any] = {}  # epoch, test_accuracy, weights
        # these are made at the first step, after a state is loaded and the processes are joined
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._forward: nn.Module = network
        self._trains_all: bool | None = None  # by `_forward`: all weights, or the classifier's alone

    @property
    def result(self) -> nn.Module:
        """The network that is tested and kept: the moving average where there is one."""
        if self.average is None:
            return self.network
        averaged: nn.Module = self.average.module
        return averaged

    def step(self) -> dict[str, float]:
        """Take a weight step; at the end of an epoch evaluate on the test images."""
        config, recipe = self.config, self.config.recipe
        epoch = self.steps_done // self.steps_per_epoch
        px = self.sizes_px[epoch]
        if self._batches is None or px != self.split.images.shape[-1]:
            self.split, self.test_split = self.data.train_and_heldout.at(px), self.data.test.at(px)
            self._batches = stream(
                self.split,
                self.batch_size,
                config.seed,
                self.steps_done,
                augment=True,
                augmentation=self.augmentation,
                device=self.acceleration.device,
                part=self.world.part,
                balanced=config.sampler == "balanced",
            )
        images, labels = next(self._batches)
        if self.steps_done == 0 and self.head_steps:
            # the statistics of a supernet were gathered while other paths ran
            recalibrate_on(self.network, self.split, self.acceleration.device)
        self.network.train()
        with head_alone(self.network) if self.steps_done < self.head_steps else nullcontext():
            loss = self._descend(images, labels)
        self.world.average([loss])  # the gradients are averaged already
        check_finite(float(loss), self.steps_done + 1, REMEDY)
        if self.average is not None:
            # at each size anew: the batch norms' statistics of another size do not fit
            steps = self.steps_done - self.sizes_px.index(px) * self.steps_per_epoch
            _update_average(self.average, self.network, recipe.ema_decay, steps)
        row = {"loss": float(loss)}
        self.epoch_loss += float(loss)
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.steps_done += 1
        if self.steps_done % self.steps_per_epoch == 0:
            row |= self._end_epoch(rate)
        return row

    def _descend(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take an optimiser step by this process's part of a batch; return the mean loss."""
        config, recipe = self.config, self.config.recipe
        trains_all = self.steps_done >= self.head_steps
        if trains_all != self._trains_all:  # which weights have gradients is fixed with the wrapper
            self._forward, self._trains_all = self.world.parallel(self.network), trains_all
        # seeds the draws of modules, which differ between processes as their images do
        draws = np.random.SeedSequence((config.seed, self.steps_done, self.world.rank))
        torch.manual_seed(int(draws.generate_state(1, np.uint64)[0]) >> 1)
        return weight_step(
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
            loss_function=self.objective.training_loss,
        )

    def _end_epoch(self, rate: float) -> dict[str, float]:
        """Evaluate on the test images, and keep the weights if they are the best so far."""
        score = self.test().score
        self.accuracy, self.balanced_accuracy = score.accuracy, score.balanced_accuracy
        epoch = self.steps_done // self.steps_per_epoch
        px = self.sizes_px[epoch - 1]
        if px == self.sizes_px[-1] and score.accuracy >= self.best.get("test_accuracy", 0.0):
            weights = {name: tensor.detach().clone() for name, tensor in self.result.state_dict().items()}
            self.best = {"epoch": epoch, "test_accuracy": score.accuracy, "weights": weights}
        train_loss, self.epoch_loss = self.epoch_loss / self.steps_per_epoch, 0.0
        return {
            "epoch": epoch,
            **({"resolution_px": px} if len(set(self.sizes_px)) > 1 else {}),
            "train_loss": train_loss,
            "learning_rate": rate,
            "test_accuracy": score.accuracy,
            "test_balanced_accuracy": score.balanced_accuracy,
            "test_loss": score.loss,
        }

    def test(self) -> Classified:
        """Classify the test images, at the size of the last step."""
        self.result.eval()
        split, device = self.test_split, self.acceleration.device
        images = batches(split, images_at_once(split, device), device=device)
        return classify(self.result, images, self.objective.ranking_loss)

    def summary(self, row: Mapping[str, float]) -> str:
        """Describe a step's figures for the progress display."""
        size = f"{self.split.images.shape[-1]} px, " if len(set(self.sizes_px)) > 1 else ""
        known = "" if math.isnan(self.accuracy) else f", test accuracy {self.accuracy:.2%}"
        if not math.isnan(self.balanced_accuracy):
            known += f" (balanced {self.balanced_accuracy:.2%})"
        return f"{size}loss {row['loss']:.3f}{known}"

    def to_dict(self) -> dict[str, Any]:
        """Return the state between two steps."""
        parts = {name: getattr(self, name) for name in _PARTS}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return states | {name: getattr(self, name) for name in _VALUES}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state. Raises ValueError where it is not of this training."""
        check_optimizer(saved["optimizer"], self.optimizer, "optimizer")
        check_unchanged(saved["schedule"], self.schedule.state_dict(), "schedule")
        if saved["best"]:
            weights = self.result.state_dict()
            check_form(saved["best"], {"epoch": 0, "test_accuracy": 0.0, "weights": weights}, "best")
        for name in _PARTS:
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(saved[name])
        for name in _VALUES:
            setattr(self, name, saved[name])


def _relinear(network: nn.Module, recipe: Recipe) -> ReLinear | None:
    """Return the quadratic weights' separate training, or None. Raises UsageError."""
    asked = (recipe.quadratic_gamma, recipe.quadratic_alpha, recipe.quadratic_beta)
    if asked == (1, 0, 0) and not recipe.linear_start:
        return None
    weights = quadratic_weights(network)
    if not weights:
        raise UsageError(
            "`linear_start`, `quadratic_gamma`, `quadratic_alpha` and `quadratic_beta` need a quadratic "
            "block, and the network has none"
        )
    return None if asked == (1, 0, 0) else ReLinear(weights, *asked)


def _augmentation(recipe: Recipe, classes: int) -> Augmentation | None:
    """Return the augmentation in addition to shifts and mirroring, or None."""
    _, *strengths = fields(Augmentation)  # which are fields of a recipe too
    augmentation = Augmentation(classes, **{each.name: getattr(recipe, each.name) for each in strengths})
    return None if augmentation == Augmentation(classes, 0, recipe.randaugment_std) else augmentation


def drop_blocks(network: nn.Module, rate: float) -> None:
    """Let residual blocks drop out for some images while training (stochastic depth, arXiv 1603.09382).

    The rate grows linearly from 0 at the first block to `rate` at the last. Hooks on this network's blocks
    implement it, so the weights keep their names and an exported network is unaffected. A QuadraBlock
    drops out as a whole, so its fused halves are unaffected.
    """
    blocks = [block for block in network.modules() if getattr(block, "is_residual", False)]
    for number, block in enumerate(blocks):
        depth = StochasticDepth(rate * number / max(len(blocks) - 1, 1), mode="row")

        def drop(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, depth: StochasticDepth = depth
        ) -> Tensor | None:
            return inputs[0] + depth(output - inputs[0]) if module.training else None

        block.register_forward_hook(drop)


def _update_average(average: AveragedModel, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network after `step` updates.

    The decay is smaller at first. Otherwise, the random initial weights would dominate a short average.
    """
    decay = min(decay, (1 + step) / (10 + step))
    average.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    average.update_parameters(network)


def train_subnet(
    source: FoundArch,
    data: ImageData,
    config: TrainConfig,
    folder: Path,
    request: Mapping[str, Any],
    *,
    from_supernet: bool,
    from_finalist: bool = False,
    teacher: Teacher | None = None,
    objective: Objective | None = None,
    pretrained: PretrainedNetwork | None = None,
    resume: bool = False,
    force: bool = False,
    display: Display = silent,
    world: World = ALONE,
) -> Score:
    """Train the network of an architecture in a folder; return its score on the test images.

    `request` is the rest of the request, for config.json; `objective` replaces the loss and metric of the
    configuration. `pretrained` has the weights to start from instead of new ones. `from_finalist` starts from
    the weights of the search's finalist; `from_supernet` then says what that one started from. With several
    processes, only the main one reads and writes in the folder. Raises CheckpointError where the folder or
    the weights cannot be used, UsageError for a linear start from trained weights, which would undo the
    quadratic ones.
    """
    if folder.resolve() == source.folder.resolve():
        raise CheckpointError(f"{folder}: holds the architecture itself: train in another folder")
    config.recipe.check_start(trained=from_supernet or from_finalist or pretrained is not None)
    if (from_supernet or from_finalist) and config.recipe.linear_start:
        trained = "the finals" if from_finalist else "the supernet"
        raise UsageError(
            f"`linear_start=True` sets weights to zero that {trained} trained: give `weights='scratch'` or "
            "leave it out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if pretrained is None:
            network = build_subnet(source.space, source.arch, len(data.classes))
        else:
            network = starting_network(pretrained, source.space, source.arch, len(data.classes))
    if from_finalist:
        inherit_finalist(network, source)
    elif from_supernet:
        inherit(network, source)
    if config.recipe.linear_start:
        start_linear(network)
    trainer = SubnetTrainer(network, data, config, world, teacher, objective)
    request = {
        "train": config.record() | trainer.objective.record(),
        "from_supernet": from_supernet,
        **({"from_finalist": True} if from_finalist else {}),
        **({} if pretrained is None else {"pretrained": pretrained.record()}),
        **({} if "data" in request else {"data": data.name}),
        **request,
    }
    copies = {
        names.SPACE_FILE: source.space.to_yaml(),
        names.ARCH_FILE: json_text(source.document),
        names.RECIPE_FILE: config.recipe.to_yaml(),
        **broken_copies(names.BROKEN_FILE, data.broken),
    }
    writes = opened(folder, request, copies, result=names.RESULT_FILE, resume=resume, force=force)
    with writes if world.is_main else nullcontext():
        if world.is_main:
            write_left_out(folder / names.LEFT_OUT_FILE, data.left_out)
        try:
            run_to_end(trainer, folder, seed=config.seed, resume=resume, display=display, world=world)
        except TrainingError as error:
            if not (trainer.best and world.is_main):
                raise
            save_tensors(folder / names.BEST_FILE, trainer.best["weights"])
            kept = f"the weights of epoch {trainer.best['epoch']} are in {folder / names.BEST_FILE}"
            raise TrainingError(f"{error}; {kept}") from error
        return _finish(trainer, folder, source, request) if world.is_main else trainer.test().score


def _finish(trainer: SubnetTrainer, folder: Path, source: FoundArch, request: Mapping[str, Any]) -> Score:
    """Write the files of a training that has ended; return its score on the test images."""
    network, data, found = trainer.result, trainer.data, trainer.test()
    weights_sha256 = save_tensors(folder / names.WEIGHTS_FILE, network.state_dict())
    best = dict(trainer.best)
    save_tensors(folder / names.BEST_FILE, best.pop("weights"))
    images, labels = sample_images(data.test, SAMPLE_IMAGES)
    save_tensors(folder / names.SAMPLE_FILE, {"images": images, "labels": labels})
    save_tensors(folder / names.PREDICTIONS_FILE, prediction_tensors(found, data.test))
    speed = measure_speed(network, trainer.acceleration, data.channels, data.resolution_px)
    write_json(folder / names.SPEED_FILE, speed)
    score = found.score
    result = {
        "schema": "qnas.subnet/1",
        "test_accuracy": score.accuracy,
        "test_balanced_accuracy": score.balanced_accuracy,
        "never_predicted": found.never_predicted(data.classes),
        "test_loss": score.loss,
        "test_images": score.images,
        "broken_images": len(data.broken),
        **left_out_facts(data.left_out, data.split_names),
        **accuracy_facts(found, data.classes, trainer.objective),
        "best_by_test_images": best,
        "params": count_parameters(network),
        "deployed": size_facts(source),
        "resolution_px": trainer.config.resolution_px,
        "stages": [{"resolution_px": px, "epochs": n} for px, n in trainer.config.recipe.stages],
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "significant_bits": data.bits,
        "pads": data.pads,
        "data": request["data"],
        "weights_sha256": weights_sha256,
    }
    close_with_report(folder, {names.RESULT_FILE: result})
    # last, since its presence says that the run is complete
    write_json(folder / names.RESULT_FILE, result)
    Checkpoints(folder).remove()
    return score
