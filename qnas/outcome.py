"""A search from its run folder to what it ends with: the network, its certificate, and its rivals."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qnas import run
from qnas.arch import Arch, arch_from_indices
from qnas.derive import Solution, sample_near, solution_document
from qnas.errors import CheckpointError
from qnas.files import write_json, write_text
from qnas.latency.table import write_table
from qnas.progress import Progress
from qnas.search import Searcher
from qnas.train import run_to_end

RANDOM_WINDOW = 0.97  # random networks lie between this share of the derived network's latency and it


@dataclass(frozen=True)
class NetworkScore:
    """A network of the supernet, and how well it does on the test images with inherited weights."""

    arch: Arch
    latency_ms: float
    accuracy: float


@dataclass(frozen=True)
class SearchResult:
    """What a finished search found."""

    searcher: Searcher
    folder: Path
    solution: Solution
    derived: NetworkScore
    random: tuple[NetworkScore, ...]
    expected_ms: float


def network_score(searcher: Searcher, indices: tuple[int, ...]) -> NetworkScore:
    """Evaluate a network of the supernet given by its candidates' numbers."""
    arch = arch_from_indices(searcher.space, indices)
    return NetworkScore(arch, searcher.table.latency_ms(indices), searcher.score(arch).accuracy)


def run_search(
    searcher: Searcher,
    folder: Path,
    request: Mapping[str, Any],
    *,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> SearchResult:
    """Search to the end in a run folder, and write what was found.

    `request` is what was asked, for config.json. Raises CheckpointError where the folder cannot be
    used, Interrupted once the state is saved after Ctrl-C or SIGTERM.
    """
    request = {"search": asdict(searcher.config), **request}
    run.open_folder(folder, request, resume=resume, force=force)
    if resume and (folder / run.ARCH).is_file():
        raise CheckpointError(f"{folder}: this search is complete, there is nothing to resume")
    write_text(folder / run.SPACE, searcher.space.to_yaml())
    write_table(searcher.table, searcher.space, folder / f"table-{searcher.table.device}.csv")
    run_to_end(searcher, folder, resume=resume, quiet=quiet)
    return _finish(searcher, folder, request, quiet=quiet)


def _finish(searcher: Searcher, folder: Path, request: Mapping[str, Any], *, quiet: bool) -> SearchResult:
    config, table = searcher.config, searcher.table
    solution = searcher.derive()
    rng = np.random.default_rng(config.seed)
    rivals = sample_near(
        table, RANDOM_WINDOW * solution.latency_ms, solution.latency_ms, config.random_networks, rng
    )
    with Progress(1 + len(rivals), "evaluate", quiet=quiet) as progress:
        derived = network_score(searcher, solution.indices)
        progress.step()
        random = []
        for indices in rivals:
            random.append(network_score(searcher, indices))
            progress.step()
    result = SearchResult(searcher, folder, solution, derived, tuple(random), searcher.expected_ms)
    write_json(folder / run.SEARCH, _search_document(result))
    run.save_tensors(folder / run.SUPERNET, searcher.state.supernet.state_dict())
    # last, since its presence says that the run is complete
    write_json(folder / run.ARCH, _arch_document(searcher, result, request))
    (folder / run.CHECKPOINT).unlink(missing_ok=True)
    return result


def _search_document(result: SearchResult) -> dict[str, Any]:
    def entry(score: NetworkScore) -> dict[str, Any]:
        return {
            "choices": list(score.arch.choices),
            "latency_ms": score.latency_ms,
            "accuracy": score.accuracy,
        }

    return {
        "schema": "qnas.search/1",
        "expected_ms": result.expected_ms,
        "budget_binds": result.searcher.binds,
        "log_probabilities": result.searcher.log_probabilities,
        "derived": entry(result.derived),
        "random": [entry(score) for score in result.random],
    }


def _arch_document(searcher: Searcher, result: SearchResult, request: Mapping[str, Any]) -> dict[str, Any]:
    details = {
        "latency_source": request.get("latency"),
        "supernet_accuracy": result.derived.accuracy,
        "seed": searcher.config.seed,
        "versions": request.get("versions", {}),
    }
    return solution_document(searcher.space, result.solution, details)
