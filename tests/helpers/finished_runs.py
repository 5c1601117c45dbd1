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
from qnas.solver.solve import Scores, Solution, largest, solution_document, solve_best
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import count_macs, count_params, lower
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
    write_text(folder / SPACE_FILE, space.to_yaml())
    entries = [
        {"name": limit.name, "budget": f"{limit.budget}ms", "limit": limit.limit, "device": limit.name}
        if limit.table is not None
        else {"name": limit.name, "budget": f"{limit.budget}", "limit": limit.limit}
        for limit in limits
    ]
    write_json(folder / CONFIG_FILE, {"search": {"k_best": 20, "threads": 1}, "limits": entries, **config})
    found = search_document(space, limits, solution, log_p)
    found["effects"] = {"nats": nats, "explained": 0.9, "networks": 100} if effects else None
    write_json(folder / SEARCH_FILE, found)
    write_json(folder / "arch.json", document)
    return read_finished_run(folder)


def search_document(space: SearchSpace, limits: Limits, solution: Solution, log_p: Scores) -> dict[str, Any]:
    """Return a search.json whose derived network is a solution, compared with the largest network only."""
    derived = network_entry(space, limits, solution.indices)
    params = count_params(lower(space, arch_from_indices(space, solution.indices)))
    first = {"rank": solution.rank, "score": solution.score, "heldout_accuracy": 0.75, "heldout_loss": 0.9}
    return {
        "schema": "qnas.search/1",
        "expected_ms": expected_amount(log_p, limits[0]),
        "expected": [expected_amount(log_p, limit) for limit in limits],
        "budget_binds": any(limit.binds for limit in limits),
        "images": {"train": 1151, "heldout": 287},
        "broken_images": 0,
        "log_probabilities": log_p,
        "screened": 20,
        "ranking": [
            {**first, "choices": derived["choices"], "amounts": derived["amounts"]}
            | {"level": True, "params": params}
        ],
        "derived": derived | {"heldout_accuracy": 0.75},
        "random": [],
        "macs_guided": None,
        "largest": network_entry(space, limits, largest(space, limits).indices),
        "seeds": {"accuracies": {"0": 0.7}, "mean": 0.7, "sd": None},
        "layers": {},
    }


def network_entry(space: SearchSpace, limits: Limits, indices: tuple[int, ...]) -> dict[str, Any]:
    """Return a network's entry in a search.json."""
    arch = arch_from_indices(space, indices)
    amounts = [limit.amount(indices) for limit in limits]
    macs = count_macs(lower(space, arch))
    return {
        "choices": list(arch.choices),
        "latency_ms": amounts[0],
        "amounts": amounts,
        "macs": macs,
        "accuracy": 0.7,
    }


def flat(accuracies: dict[tuple[int, ...], float], images: int = 287) -> dict[tuple[int, ...], Accuracy]:
    return {network: Accuracy(share, images) for network, share in accuracies.items()}
