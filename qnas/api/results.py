"""Results in Python: a derived network, a finished search, a trained network, each read from its folder.

A result reads its folder and nothing else, so a result loaded a year later equals the one that was returned.
Modules and tensors are made on demand; torch is not imported before that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qnas.common.arguments import check_arguments
from qnas.common.errors import CheckpointError
from qnas.common.units import format_count, format_ms
from qnas.latency.intervals import Interval
from qnas.runs.documents import check_solved
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch, find_arch, read_result, trained_folder
from qnas.runs.names import REPORT_FILE, RESULT_FILE
from qnas.runs.verification import read_limits
from qnas.solver.limits import ENERGY, ENERGY_UNIT, Limits
from qnas.solver.solve import entry_latency_ms
from qnas.spaces.arch import Arch, arch_document, make_arch
from qnas.spaces.space import SearchSpace

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DerivedNetwork(FoundArch):
    """An architecture derived under limits, with its certificate.

    `arch` has the name of the chosen candidate at each position of `space`. `folder` holds `arch.json`, the
    space, and the latency tables of the certificate; `document` is the content of `arch.json`.
    """

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the folder of a derivation or a search. Raises ArchError or SpaceError if it is incomplete."""
        found = find_arch(Path(folder))
        check_solved(found.document, found.folder)
        return cls(**vars(found))

    @property
    def latency_ms(self) -> float:
        """The predicted latency on the first device, in milliseconds at the space's own resolution."""
        return float(self.document["latency_ms"])

    @property
    def latencies_ms(self) -> dict[str, float]:
        """The predicted latency on each device with a budget, in milliseconds."""
        return {e["name"]: entry_latency_ms(e) for e in self.document["limits"] if e["unit"] == "ms"}

    @property
    def intervals(self) -> dict[str, Interval | None]:
        """The interval of the latency on each device with a budget; None where it is unknown."""
        found = {e["name"]: e.get("interval") for e in self.document["limits"] if e["unit"] == "ms"}
        return {
            name: Interval(known["low_ms"], known["high_ms"], known["level"]) if known else None
            for name, known in found.items()
        }

    @property
    def energies_mj(self) -> dict[str, float]:
        """The energy on each device where it was limited, in millijoules."""
        entries = (e for e in self.document["limits"] if e["unit"] == ENERGY_UNIT)
        return {e["name"].removeprefix(f"{ENERGY}-"): float(e["amount"]) for e in entries}

    @cached_property
    def limits(self) -> Limits:
        """The limits that the network meets, with their latency tables."""
        return read_limits(self.folder, self.document, self.space)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return int(self.document["macs"])

    @property
    def params(self) -> int:
        """Trained parameters."""
        return int(self.document["params"])

    @property
    def certificate(self) -> Mapping[str, Any]:
        """The proof of the solve: the latency of every part, the score, and its upper bound."""
        certificate: Mapping[str, Any] = self.document["certificate"]
        return certificate

    @property
    def heldout_accuracy(self) -> float | None:
        """The accuracy on held-out images with the supernet's weights, 0 to 1; None if not ranked."""
        return self.document.get("heldout_accuracy")

    @property
    def heldout_balanced_accuracy(self) -> float | None:
        """The mean recall of the classes on the same images, 0 to 1; None if not ranked."""
        return self.document.get("heldout_balanced_accuracy")

    @property
    def warning(self) -> str | None:
        """A caveat about the result, such as a budget far from the searched one; None if there is none."""
        return self.document.get("warning")

    def build(self) -> "nn.Module":
        """Return the network with the supernet's weights: (B, channels, H, W) -> (B, classes).

        Batch-norm statistics are the supernet's; `train_subnet` or a pass over training images sets them.
        Raises CheckpointError if the supernet's weights are missing.
        """
        from qnas.training.supernet_weights import build_inherited

        return build_inherited(self)

    def __repr__(self) -> str:
        took = ", ".join(f"{format_ms(ms)} on {name}" for name, ms in self.latencies_ms.items())
        return (
            f"{type(self).__name__}({self.space.name}: {took}, {format_count(self.macs)} MACs, {self.folder})"
        )


@dataclass(frozen=True, repr=False)
class SearchResult(DerivedNetwork):
    """A finished search: its derived network, and all records of its run."""

    run: FinishedRun

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a finished search. Raises CheckpointError if the folder holds none."""
        check_arguments(folder=folder)
        run = read_finished_run(Path(folder))
        return cls(run.space, run.arch, run.document, run.folder, run)

    @property
    def accuracy(self) -> float:
        """The accuracy on the test images with the supernet's weights, 0 to 1."""
        return float(self.run.found["derived"]["accuracy"])

    @property
    def balanced_accuracy(self) -> float | None:
        """The mean recall of the classes on the same images, 0 to 1; None in runs of older versions."""
        found: float | None = self.run.found["derived"].get("balanced_accuracy")
        return found

    @property
    def never_predicted(self) -> tuple[str, ...]:
        """The classes of test images that the network never predicts with the supernet's weights."""
        return tuple(self.run.found["derived"].get("never_predicted", ()))

    @property
    def random_accuracies(self) -> list[float]:
        """The same for random networks of nearly the same latency."""
        return [float(entry["accuracy"]) for entry in self.run.found["random"]]

    @property
    def ranking(self) -> list[dict[str, Any]]:
        """The best networks within the limits by held-out images, the derived one first."""
        ranking: list[dict[str, Any]] = self.run.found["ranking"]
        return ranking

    @property
    def finalists(self) -> list[dict[str, Any]]:
        """The networks that were trained by themselves, in the order in which they were taken; often none.

        Each has its `choices`, its `latency_ms`, and its accuracy on held-out images after each epoch.
        """
        found = self.run.found.get("finalists")
        return [] if found is None else list(found["networks"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved request with versions: the content of `config.json`."""
        return self.run.config

    @property
    def report(self) -> Path:
        """The run's page, one HTML file."""
        return self.folder / REPORT_FILE


@dataclass(frozen=True)
class TrainedNetwork(FoundArch):
    """A network trained on its own: its weights, in `folder`, and its accuracy on the test images."""

    result: Mapping[str, Any]  # the content of result.json

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a trained network from its folder or its run's. Raises CheckpointError if there is none."""
        check_arguments(folder=folder)
        trained = trained_folder(Path(folder))
        if trained is None:
            raise CheckpointError(f"{folder}: no trained network here (no {RESULT_FILE}): train it first")
        found = find_arch(trained)
        return cls(**vars(found), result=read_result(trained, found))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved request with versions: the content of `config.json`."""
        return read_config(self.folder)

    @property
    def accuracy(self) -> float:
        """The accuracy on the test images, 0 to 1."""
        return float(self.result["test_accuracy"])

    @property
    def balanced_accuracy(self) -> float | None:
        """The mean recall of the classes on the test images, 0 to 1; None in runs of older versions."""
        found: float | None = self.result.get("test_balanced_accuracy")
        return found

    @property
    def never_predicted(self) -> tuple[str, ...]:
        """The classes of test images that the network never predicts."""
        return tuple(self.result.get("never_predicted", ()))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the outputs."""
        return tuple(self.result["classes"])

    def build(self) -> "nn.Module":
        """Return the trained network in evaluation mode: (B, channels, H, W), normalised -> (B, classes)."""
        from qnas.training.supernet_weights import build_trained

        return build_trained(self, len(self.classes))

    def __repr__(self) -> str:
        return f"TrainedNetwork({self.space.name}: {self.accuracy:.2%} on test images, {self.folder})"


# The ways to give an architecture to a function.
Source = FoundArch | tuple[SearchSpace, Arch] | str | Path


def find_source(source: Source, space: str | None = None) -> FoundArch:
    """Return the architecture that a source stands for, with its space.

    `source` is a result, a folder or arch.json, the name of a space with one network, or a space with an
    architecture of it. Raises ArchError or SpaceError.
    """
    if isinstance(source, FoundArch):
        return source
    match source:
        case (SearchSpace() as found_space, Arch(choices)):
            arch = make_arch(found_space, choices)
            return FoundArch(found_space, arch, arch_document(found_space, arch, {}), Path())
    check_arguments(source=source)
    return find_arch(Path(source), space)
