"""Shared parts of the functions that train: progress, threads, images and versions."""

import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import scipy
import torch
from torch import Tensor

import qnas
from qnas.common.errors import QnasWarning
from qnas.common.progress import Display, OnProgress, OnStderr, reporting_to, silent
from qnas.data.broken_images import MAX_BROKEN
from qnas.data.image_data import ImageData
from qnas.data.loading import GivenData, load_data, recorded_data
from qnas.search.config import SearchConfig
from qnas.spaces.space import SearchSpace
from qnas.training.batch_sizes import check_batch, fitting_batch
from qnas.training.loop import set_up_process
from qnas.training.losses import LossFunction, Metric, Objective, make_objective
from qnas.training.processes import World
from qnas.training.recipe import TrainConfig

# False shows nothing, True a bar or lines on stderr; a function is called with a Report after each step
Progress = bool | OnProgress | OnStderr


def display_of(progress: Progress) -> Display:
    """Return the display that a `progress` argument asks for."""
    if isinstance(progress, bool):
        return OnStderr() if progress else silent
    return progress if isinstance(progress, OnStderr) else reporting_to(progress)


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Set torch's number of threads (0: leave it), and restore the former number at the end."""
    before = torch.get_num_threads()
    set_up_process(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def objective_of(
    config: SearchConfig | TrainConfig,
    loss: str | LossFunction | None,
    metric: str | Metric | None,
    labels: Tensor,
    images: ImageData,
) -> Objective:
    """Return the objective of a configuration, with callables in place of its loss or metric."""
    return make_objective(
        loss if callable(loss) else config.loss,
        metric if callable(metric) else config.metric,
        labels,
        len(images.classes),
        config.class_weights,
        config.sampler,
    )


def fit_batch(batch_size: int, images: int, world: World, *, parts: int = 1, asked: bool) -> int:
    """Return the training images of a step: the batch as asked, or a default one that the images allow.

    A smaller one becomes a warning. Raises UsageError for a batch that was asked for and does not fit.
    """
    taken = batch_size if asked else fitting_batch(batch_size, images, parts=world.size * parts)
    check_batch(taken, images, world, parts=parts)
    if taken < batch_size and world.is_main:
        note = (
            f"steps take {taken} images, not the default of {batch_size}: there are {images} training images"
        )
        warnings.warn(note, QnasWarning, stacklevel=3)
    return taken


def record_images(data: GivenData, images: ImageData, max_broken: float | None) -> dict[str, Any]:
    """Return the entries about the images for a run's config.json."""
    given = {} if max_broken is None else {"max_broken": max_broken}
    return {"data": recorded_data(data, images), "data_digest": images.digest, **given}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    own = {"qnas": qnas.__version__, "python": platform.python_version()}
    return own | {library.__name__: library.__version__ for library in (torch, numpy, scipy)}


def load_images(
    data: GivenData,
    space: SearchSpace,
    resolution_px: int,
    max_broken: float | None,
    progress: Progress,
    *,
    keep_originals: bool = False,
) -> ImageData:
    """Load images for networks of a space; `max_broken=None` stands for the default share.

    Doubtful properties of a user's Dataset become warnings.
    """
    shows_bar = progress is True or (isinstance(progress, OnStderr) and not progress.quiet)
    images = load_data(
        data,
        resolution_px=resolution_px,
        channels=space.input.channels,
        max_broken=MAX_BROKEN if max_broken is None else max_broken,
        keep_originals=keep_originals,
        normalisation=space.input.normalisation,
        quiet=not shows_bar,
    )
    for note in images.notes:
        warnings.warn(note, QnasWarning, stacklevel=3)
    return images
