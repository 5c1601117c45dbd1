"""Training of one network on its own: from the supernet's weights or from scratch.

It is trained on all training images. The test images are looked at after every epoch for the curve,
but nothing is chosen by them: the weights kept are the last.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnas import run
from qnas.acceleration import (
    Precision,
    TorchDevice,
    check_acceleration,
    choose_acceleration,
    compile_blocks,
)
from qnas.arch import FoundArch
from qnas.blocks import count_parameters
from qnas.checkpoint import Checkpoints
from qnas.data import ImageData, batch_count, batches, sample_images
from qnas.distributed import ALONE, World
from qnas.errors import CheckpointError, UsageError
from qnas.files import json_text, write_json
from qnas.predictions import predict
from qnas.report.page import write_training_report
from qnas.subnet import build_subnet, subnet_state
from qnas.train import Score, evaluate, make_optimizer, make_schedule, run_to_end, stream, weight_step
from qnas.watch import check_finite

SAMPLE_IMAGES = 16  # of the test images, kept to check an export with


@dataclass(frozen=True)
class TrainConfig:
    """How to train a network."""

    resolution_px: int
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    torch_device: TorchDevice = "auto"
    precision: Precision = "auto"
    compile: bool = False  # slower on CPUs
    threads: int = 0  # of torch; 0 leaves that to torch, which takes all cores
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("resolution_px", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')}: expected at least 1, got {getattr(self, name)}")
        check_acceleration(self.torch_device, self.precision)


# By what is trained on; for two CPU cores or one GPU.
RECIPES: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        resolution_px=32, epochs=40, batch_size=64, learning_rate=2e-3, warmup_epochs=2, threads=1
    ),
    "fashion-mnist": TrainConfig(resolution_px=32, epochs=6, batch_size=64, learning_rate=2e-3),
    "cifar10": TrainConfig(resolution_px=32, epochs=20, batch_size=64, learning_rate=2e-3),
    "imagefolder": TrainConfig(
        resolution_px=128, epochs=60, batch_size=64, learning_rate=1e-3, warmup_epochs=3
    ),
}


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
    return source.folder / str(source.document.get("supernet", run.SUPERNET))


def inherit(network: nn.Module, source: FoundArch) -> None:
    """Load the supernet's weights of the chosen candidates. Raises CheckpointError."""
    file = supernet_file(source)
    state = subnet_state(run.load_tensors(file), source.space, source.arch)
    try:
        load_weights(network, state, file)
    except CheckpointError as error:  # data with other classes than those searched on, most likely
        raise CheckpointError(f"{error}; --weights scratch starts without them") from error


class SubnetTrainer:
    """The training of one network, stepped by `train.run_to_end`."""

    phase = "train"

    def __init__(
        self, network: nn.Module, data: ImageData, config: TrainConfig, world: World = ALONE
    ) -> None:
        self.acceleration = choose_acceleration(config.torch_device, config.precision, world.local_rank)
        self.network = network.to(self.acceleration.device)
        if config.compile:
            compile_blocks(network)
        self.data, self.config, self.world = data, config, world
        self.split = data.train_and_heldout
        self.batch_size = min(config.batch_size, len(self.split))
        world.check_batch(self.batch_size)
        self.steps_per_epoch = batch_count(self.split, self.batch_size, drop_last=True)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = make_optimizer(network.parameters(), config.learning_rate, config.weight_decay)
        warmup_steps = round(config.warmup_epochs * self.steps_per_epoch)
        self.schedule = make_schedule(self.optimizer, self.total_steps, warmup_steps)
        self.scaler = self.acceleration.scaler()
        self.steps_done = 0
        self.accuracy = float("nan")
        # both made at the first step: of a loaded state, and with the processes joined
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._forward: nn.Module = network

    def step(self) -> dict[str, float]:
        """Take a weight step; at the end of an epoch look at the test images."""
        config = self.config
        if self._batches is None:
            self._batches = stream(
                self.split,
                self.batch_size,
                config.seed,
                self.steps_done,
                augment=True,
                device=self.acceleration.device,
                part=self.world.part,
            )
            self._forward = self.world.parallel(self.network)
        images, labels = next(self._batches)
        self._forward.train()
        loss = weight_step(
            self._forward,
            self.optimizer,
            images,
            labels,
            config.label_smoothing,
            acceleration=self.acceleration,
            scaler=self.scaler,
        )
        self.world.average([loss])  # the gradients are averaged already
        check_finite(float(loss), self.steps_done + 1)
        self.schedule.step()
        self.steps_done += 1
        row = {"loss": float(loss)}
        if self.steps_done % self.steps_per_epoch == 0:
            score = self.test()
            self.accuracy = score.accuracy
            row |= {
                "epoch": self.steps_done // self.steps_per_epoch,
                "test_accuracy": score.accuracy,
                "test_loss": score.loss,
            }
        return row

    def test(self) -> Score:
        """Score the network on the test images."""
        self.network.eval()
        return evaluate(self.network, batches(self.data.test, 256, device=self.acceleration.device))

    def summary(self, row: Mapping[str, float]) -> str:
        """Put a step's figures into a few words."""
        known = "" if math.isnan(self.accuracy) else f", test accuracy {self.accuracy:.2%}"
        return f"loss {row['loss']:.3f}{known}"

    def to_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps_done": self.steps_done,
            "accuracy": self.accuracy,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises CheckpointError when it is of another training."""
        try:
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.schedule.load_state_dict(saved["schedule"])
            self.steps_done, self.accuracy = saved["steps_done"], saved["accuracy"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this training: {run.first_line(error)}"
            ) from error


def train_subnet(
    source: FoundArch,
    data: ImageData,
    config: TrainConfig,
    folder: Path,
    request: Mapping[str, Any],
    *,
    from_supernet: bool,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    world: World = ALONE,
) -> Score:
    """Train the network of an architecture in a folder; return its score on the test images.

    Of several processes only the main one reads and writes there. Writes the weights as safetensors,
    with the architecture and its space beside them. Raises CheckpointError where the folder or the
    supernet's weights cannot be used.
    """
    if folder.resolve() == source.folder.resolve():
        raise CheckpointError(f"{folder}: holds the architecture itself: train in another folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_subnet(source.space, source.arch, len(data.classes))
    if from_supernet:
        inherit(network, source)
    request = {"train": asdict(config), "from_supernet": from_supernet, **request}
    copies = {run.SPACE: source.space.to_yaml(), run.ARCH: json_text(source.document)}
    trainer = SubnetTrainer(network, data, config, world)
    train = partial(run_to_end, trainer, folder, seed=config.seed, resume=resume, quiet=quiet, world=world)
    if not world.is_main:
        train()
        return trainer.test()
    with run.opened(folder, request, copies, result=run.RESULT, resume=resume, force=force):
        train()
        return _finish(trainer, folder, request)


def _finish(trainer: SubnetTrainer, folder: Path, request: Mapping[str, Any]) -> Score:
    network, data, score = trainer.network, trainer.data, trainer.test()
    run.save_tensors(folder / run.WEIGHTS, network.state_dict())
    images, labels = sample_images(data.test, SAMPLE_IMAGES)
    run.save_tensors(folder / run.SAMPLE, {"images": images, "labels": labels})
    predictions = predict(network, data.test, trainer.acceleration.device)
    run.save_tensors(folder / run.PREDICTIONS, predictions)
    result = {
        "schema": "qnas.subnet/1",
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
        "test_images": score.images,
        "params": count_parameters(network),
        "resolution_px": trainer.config.resolution_px,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "data": request["data"],
    }
    write_training_report(folder, {run.RESULT: result})
    # last, since its presence says that the run is complete
    write_json(folder / run.RESULT, result)
    Checkpoints(folder).remove()
    return score


def recipe_for(data_kind: str, **changes: Any) -> TrainConfig:
    """Return the recipe of a kind of data set, with the given fields changed; None changes nothing."""
    return replace(RECIPES[data_kind], **{key: value for key, value in changes.items() if value is not None})
