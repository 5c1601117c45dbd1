"""Artificial finished searches: folders as a search writes them, made in milliseconds."""

from pathlib import Path
from typing import Any

import numpy as np

from qnas.common.files import write_json, write_text
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import table_text
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.names import CONFIG_FILE, SEARCH_FILE, SPACE_FILE, table_file
from qnas.runs.pareto import Accuracy
from qnas.solver.limits import Limits, count_limit, expected_amount, latency_limit
from qnas.solver.solve import Scores, solution_document, solve_best
from qnas.spaces.space import SearchSpace


def random_effects(space: SearchSpace, seed: int) -> list[list[float]]:
    """Draw what each candidate adds to the loss: blocks lower it, larger ones more, some raise it."""
    rng = np.random.default_rng(seed)
    return [
        [0.0 if name == "identity" else float(rng.normal(-0.3, 0.3)) for name in position.names]
        for position in space.positions
    ]


def random_log_probabilities(space: SearchSpace, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return tuple(tuple(np.log(rng.dirichlet(np.ones(len(p.names)))).tolist()) for p in space.positions)


def make_record(
    folder: Path,
    space: SearchSpace,
    *,
    seed: int = 0,
    share: float = 0.5,
    devices: tuple[str, ...] = ("vpu",),
    max_params: float | None = None,
    effects: bool = True,
    rank: int = 1,
    **config: Any,
) -> FinishedRun:
    """Write the folder of a search whose first limit is at this share of the device's range."""
    limits: Limits = ()
    for device in devices:
        table = compute_table(load_device(device), space)
        limits += (latency_limit(table, table.fastest_ms + share * (table.slowest_ms - table.fastest_ms)),)
        write_text(folder / table_file(table.device), table_text(table, space))
    if max_params is not None:
        limits += (count_limit(space, "params", max_params),)
    log_p, nats = random_log_probabilities(space, seed), random_effects(space, seed)
    scores = tuple(tuple(-x for x in row) for row in nats) if effects else log_p
    solution = solve_best(space, scores, limits, 20)[rank - 1]
    document = solution_document(space, solution, {"heldout_accuracy": 0.75, "seed": seed})
    entries = [
        {"name": limit.name, "budget": f"{limit.budget}ms", "limit": limit.limit, "device": limit.name}
        for limit in limits
        if limit.table is not None
    ]
    write_text(folder / SPACE_FILE, space.to_yaml())
    write_json(folder / CONFIG_FILE, {"search": {"k_best": 20, "threads": 1}, "limits": entries, **config})
    found = {
        "expected": [expected_amount(log_p, limit) for limit in limits],
        "budget_binds": any(limit.binds for limit in limits),
        "log_probabilities": log_p,
        "effects": {"nats": nats, "explained": 0.9, "networks": 100} if effects else None,
        "derived": {"choices": document["choices"], "accuracy": 0.7, "heldout_accuracy": 0.75},
    }
    write_json(folder / SEARCH_FILE, found)
    write_json(folder / "arch.json", document)
    return read_finished_run(folder)


def flat(accuracies: dict[tuple[int, ...], float], images: int = 287) -> dict[tuple[int, ...], Accuracy]:
    return {network: Accuracy(share, images) for network, share in accuracies.items()}
