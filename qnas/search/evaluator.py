"""Evaluation of networks with the weights of a supernet: in a search, or from the folder that it left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnas.common.errors import DataError
from qnas.data.batches import batches
from qnas.data.broken_images import MAX_BROKEN
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import GivenData, load_data, reopen
from qnas.nn.subnet import build_subnet
from qnas.runs.names import SUPERNET_FILE
from qnas.runs.tensors import load_supernet
from qnas.search.effects import Losses
from qnas.search.sizes import Resized, resize
from qnas.search.state import SearchState
from qnas.solver.solve import CandidateIndices
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.space import SearchSpace
from qnas.training.acceleration import choose_acceleration
from qnas.training.losses import LossFunction, Objective, saved_objective
from qnas.training.scoring import Classified, batch_statistics, classify, images_at_once, recalibrate_on
from qnas.training.supernet_weights import load_inherited


@dataclass(frozen=True, eq=False)
class Evaluator:
    """The networks of one supernet, on the images of one data set."""

    data: ImageData
    device: torch.device
    objective: Objective
    build: Callable[[Arch], nn.Module]  # returns the network with the supernet's weights
    losses: Losses  # with batch norms that use each batch's own statistics

    def at_size(self, px: int) -> "Evaluator":
        """Return the evaluator whose networks see the same images at another size."""
        last: tuple[Tensor, Tensor] | None = None  # many networks are measured on the same images

        def losses(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
            nonlocal last
            if last is None or last[0] is not images:
                last = images, resize(images, px)
            return self.losses(networks, last[1], labels)

        return replace(self, build=lambda arch: Resized(self.build(arch), px), losses=losses)

    def classify(self, arch: Arch, split: Split) -> Classified:
        """Classify the images of a split with a network whose batch norms are measured on training images."""
        network = self.build(arch).to(self.device).eval()
        recalibrate_on(network, self.data.train, self.device)
        images = batches(split, images_at_once(split, self.device), device=self.device)
        return classify(network, images, self.objective.ranking_loss)


def evaluator_of(state: SearchState) -> Evaluator:
    """Return the evaluator of a search's networks, with images of the size of the state's layout.

    It leaves the state of the search unchanged.
    """
    problem, supernet = state.problem, state.supernet
    classes, space, channels = len(problem.data.classes), problem.space, problem.layout.channels

    @torch.no_grad()
    def losses(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        supernet.eval()
        with batch_statistics(supernet), problem.acceleration.autocast_unscaled():
            answers = (supernet(images, network, channels) for network in networks)
            rows = [problem.objective.ranking_loss(answer, labels) for answer in answers]
        return torch.stack(rows).double().cpu()

    def build(arch: Arch) -> nn.Module:
        return supernet.subnet(arch, classes, space)

    found = Evaluator(problem.data, problem.acceleration.device, problem.objective, build, losses)
    return found if problem.trained_px == problem.data.resolution_px else found.at_size(problem.trained_px)


@dataclass(frozen=True, eq=False)
class SavedSupernet:
    """The supernet that a finished search left in its folder, with the images of the search."""

    path: Path
    tensors: Mapping[str, Tensor]
    data: ImageData
    device: torch.device
    objective: Objective

    def evaluator(self, space: SearchSpace, px: int | None = None) -> Evaluator:
        """Return the evaluator of the networks of a space, with images of this size; None: of the search."""

        def build(arch: Arch) -> nn.Module:
            network = build_subnet(space, arch, len(self.data.classes))
            load_inherited(network, self.tensors, space, arch, self.path)
            return network

        @torch.no_grad()
        def losses(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
            found = []
            for indices in networks:
                network = build(arch_from_indices(space, indices)).to(self.device).eval()
                with batch_statistics(network):
                    found.append(self.objective.ranking_loss(network(images), labels))
            return torch.stack(found).double().cpu()

        found = Evaluator(self.data, self.device, self.objective, build, losses)
        return found if px in (None, self.data.resolution_px) else found.at_size(px)


def load_saved_supernet(
    folder: Path,
    config: Mapping[str, Any],
    space: SearchSpace,
    data: GivenData | None = None,
    loss: LossFunction | None = None,
    supernet_sha256: str | None = None,
) -> SavedSupernet:
    """Load the supernet that a finished search left in its folder, and the same data.

    `config` is the folder's config.json, `space` that of the run. `data` and `loss` are needed where the
    search used Datasets or a custom loss. `supernet_sha256` is that of the supernet's file. Raises
    CheckpointError where the supernet is missing, damaged or another, DataError where the data are missing,
    damaged or others.
    """
    path = folder / SUPERNET_FILE
    tensors = load_supernet(path, supernet_sha256)
    searched = config["search"]
    given, channels = reopen(data, config), space.input.channels
    px, broken = searched["resolution_px"], config.get("max_broken", MAX_BROKEN)
    images = load_data(
        given,
        resolution_px=px,
        channels=channels,
        max_broken=broken,
        normalisation=space.input.normalisation,
        quiet=True,
    )
    if images.digest != config["data_digest"]:
        raise DataError(f"{config['data']}: not the images that {folder} was searched on")
    objective = saved_objective(searched, images.train.labels, len(images.classes), loss, folder)
    return SavedSupernet(path, tensors, images, choose_acceleration("auto", "auto").device, objective)
