"""The training of one network in a folder, and the files that it leaves there."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qnas.common.errors import CheckpointError, TrainingError, UsageError
from qnas.common.files import json_text, write_json
from qnas.common.progress import Display, silent
from qnas.data.broken_images import broken_copies
from qnas.data.image_data import ImageData, sample_images
from qnas.nn.blocks import count_parameters, start_linear
from qnas.nn.subnet import build_subnet
from qnas.runs import names
from qnas.runs.checkpoint import Checkpoints
from qnas.runs.found_arch import FoundArch
from qnas.runs.report.page import close_with_report
from qnas.runs.run_folder import opened
from qnas.runs.tensors import save_tensors
from qnas.training.evaluation import accuracy_facts, measure_speed, size_facts
from qnas.training.loop import run_to_end
from qnas.training.losses import Objective
from qnas.training.optimizer import Teacher
from qnas.training.processes import ALONE, World
from qnas.training.recipe import TrainConfig
from qnas.training.scoring import Score, prediction_tensors
from qnas.training.subnet_trainer import SubnetTrainer
from qnas.training.supernet_weights import inherit

SAMPLE_IMAGES = 16  # of the test images, kept to check an export with


def train_subnet(
    source: FoundArch,
    data: ImageData,
    config: TrainConfig,
    folder: Path,
    request: Mapping[str, Any],
    *,
    from_supernet: bool,
    teacher: Teacher | None = None,
    objective: Objective | None = None,
    resume: bool = False,
    force: bool = False,
    display: Display = silent,
    world: World = ALONE,
) -> Score:
    """Train the network of an architecture in a folder; return its score on the test images.

    `request` is what else was asked, for config.json; `objective` stands in for the loss and metric that
    the configuration names. A linear start would undo the supernet's quadratic weights: UsageError with
    both. Of several processes only the main one reads and writes in the folder. Raises CheckpointError where
    the folder or the supernet's weights cannot be used.
    """
    if folder.resolve() == source.folder.resolve():
        raise CheckpointError(f"{folder}: holds the architecture itself: train in another folder")
    if from_supernet and config.recipe.linear_start:
        raise UsageError(
            "`linear_start=True` sets weights to zero that the supernet trained: give `weights='scratch'` or "
            "leave it out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_subnet(source.space, source.arch, len(data.classes))
    if from_supernet:
        inherit(network, source)
    if config.recipe.linear_start:
        start_linear(network)
    trainer = SubnetTrainer(network, data, config, world, teacher, objective)
    request = {
        "train": config.record() | trainer.objective.record(),
        "from_supernet": from_supernet,
        **({} if "data" in request else {"data": data.name}),
        **request,
    }
    copies = {
        names.SPACE_FILE: source.space.to_yaml(),
        names.ARCH_FILE: json_text(source.document),
        names.RECIPE_FILE: config.recipe.to_yaml(),
        **broken_copies(names.BROKEN_FILE, data.broken),
    }
    train = partial(
        run_to_end, trainer, folder, seed=config.seed, resume=resume, display=display, world=world
    )
    if not world.is_main:
        train()
        return trainer.test().score
    with opened(folder, request, copies, result=names.RESULT_FILE, resume=resume, force=force):
        try:
            train()
        except TrainingError as error:
            if not trainer.best:
                raise
            save_tensors(folder / names.BEST_FILE, trainer.best["weights"])
            kept = f"the weights of epoch {trainer.best['epoch']} are in {folder / names.BEST_FILE}"
            raise TrainingError(f"{error}; {kept}") from error
        return _finish(trainer, folder, source, request)


def _finish(trainer: SubnetTrainer, folder: Path, source: FoundArch, request: Mapping[str, Any]) -> Score:
    """Write the files of a training that has ended; return its score on the test images."""
    network, data, found = trainer.result, trainer.data, trainer.test()
    save_tensors(folder / names.WEIGHTS_FILE, network.state_dict())
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
        "test_loss": score.loss,
        "test_images": score.images,
        "broken_images": len(data.broken),
        **accuracy_facts(found, data.classes, trainer.objective),
        "best_by_test_images": best,
        "params": count_parameters(network),
        "deployed": size_facts(source),
        "resolution_px": trainer.config.resolution_px,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "data": request["data"],
    }
    close_with_report(folder, {names.RESULT_FILE: result})
    # last, since its presence says that the run is complete
    write_json(folder / names.RESULT_FILE, result)
    Checkpoints(folder).remove()
    return score
