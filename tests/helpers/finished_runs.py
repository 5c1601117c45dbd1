"""Artificial finished searches: folders as a search writes them, made in milliseconds."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qnas.common.files import write_json, write_text
from qnas.common.intervals import LEVEL, wilson
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import Cell, LatencyTable, table_text
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.names import (
    CONFIG_FILE,
    METRICS_FILE,
    RESULT_FILE,
    SEARCH_FILE,
    SPACE_FILE,
    SPEED_FILE,
    SUBNET_FOLDER,
    table_file,
)
from qnas.runs.pareto import Accuracy
from qnas.solver.limits import Limits, count_limit, expected_amount, latency_limit
from qnas.solver.solve import Scores, Solution, largest, solution_document, solve_best
from qnas.spaces.arch import Arch, arch_from_indices
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
    devices: tuple[str | Device, ...] = ("vpu",),
    max_params: float | None = None,
    effects: bool = True,
    rank: int = 1,
    margin: float = 0.0,
    confidence: float | None = None,
    scale: float = 1.0,
    choices: tuple[str, ...] | None = None,
    **config: Any,
) -> FinishedRun:
    """Write the folder of a search whose first limit is at this share of the device's range.

    Its network is that of a rank, or one of these choices. The devices have this margin, and their latencies
    are multiplied by `scale`.
    """
    limits: Limits = ()
    for device in devices:
        table = scaled(replace(compute_table(load_device(device), space), margin=margin), scale)
        whole = latency_limit(table, 1.0, confidence)
        limits += (latency_limit(table, whole.least + share * (whole.most - whole.least), confidence),)
        write_text(folder / table_file(table.device), table_text(table, space))
    if max_params is not None:
        limits += (count_limit(space, "params", max_params),)
    log_p, nats = random_log_probabilities(space, seed), random_effects(space, seed)
    scores = tuple(tuple(-x for x in row) for row in nats) if effects else log_p
    solution = solve_best(space, scores, limits, 20)[rank - 1]
    if choices is not None:
        indices = Arch(choices).indices(space)
        score = math.fsum(row[i] for row, i in zip(scores, indices, strict=True))
        solution = replace(solution, indices=indices, score=score)
    document = solution_document(space, solution, {"heldout_accuracy": 0.75, "seed": seed})
    write_text(folder / SPACE_FILE, space.to_yaml())
    entries = [
        {"name": limit.name, "budget": f"{limit.budget}ms", "limit": limit.limit}
        | {"device": limit.name, "table_digest": limit.table.digest}
        | ({} if confidence is None else {"confidence": confidence})
        if limit.table is not None
        else {"name": limit.name, "budget": f"{limit.budget}", "limit": limit.limit}
        for limit in limits
    ]
    request = {"search": {"k_best": 20, "threads": 1}, "versions": {"qnas": "0.1.0"}}
    write_json(folder / CONFIG_FILE, {**request, "limits": entries, **config})
    found = search_document(space, limits, solution, log_p)
    found["effects"] = {"nats": nats, "explained": 0.9, "networks": 100} if effects else None
    write_json(folder / SEARCH_FILE, found)
    write_json(folder / "arch.json", document)
    return read_finished_run(folder)


def scaled(table: LatencyTable, scale: float) -> LatencyTable:
    def cell(raw: Cell) -> Cell:
        return Cell(raw.latency_ms * scale, raw.estimated_ms * scale, raw.source)

    fixed = tuple((name, cell(raw)) for name, raw in table.fixed)
    return replace(table, fixed=fixed, cells=tuple(tuple(map(cell, row)) for row in table.cells))


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
        "latency_ms": limits[0].latency_ms(indices),
        "amounts": amounts,
        "macs": macs,
        "accuracy": 0.7,
    }


def result_document(space: SearchSpace, arch: Arch, right: int, images: int) -> dict[str, Any]:
    """Return a result.json of a training in which so many of the test images are right."""
    n = space.head.classes
    of_class = [images // n + (i < images % n) for i in range(n)]
    rows, left = [], right
    for name, count in enumerate(of_class):
        rows.append({"class": str(name), "images": count} | _share(min(left, count), count))
        left -= min(left, count)
    blocks = lower(space, arch)
    return {
        "schema": "qnas.subnet/1",
        "test_accuracy": right / images,
        "test_loss": 0.5,
        "test_images": images,
        "broken_images": 0,
        "interval_level": LEVEL,
        "top1": _share(right, images),
        "top5": None,
        "per_class": rows,
        "best_by_test_images": {"epoch": 2, "test_accuracy": right / images},
        "params": count_params(blocks),
        "deployed": {
            "resolution_px": space.input.resolution_px,
            "macs": count_macs(blocks),
            "params": count_params(blocks),
            "latency": {"myriad-vpu": {"ms": 1.0, "from_measurements": 0.5}},
        },
        "resolution_px": 32,
        "classes": [row["class"] for row in rows],
        "mean": [0.5] * space.input.channels,
        "std": [0.25] * space.input.channels,
        "data": "digits",
    }


def _share(right: int, images: int) -> dict[str, float]:
    low, high = wilson(right / images, images)
    return {"value": right / images, "low": low, "high": high}


def make_training(run: FinishedRun, *, right: int = 320, images: int = 359) -> Path:
    """Write the folder of the training of a run's network, but for the weights and predictions."""
    folder = run.folder / SUBNET_FOLDER
    write_json(folder / RESULT_FILE, result_document(run.space, run.arch, right, images))
    write_json(folder / "arch.json", run.document)
    write_text(folder / SPACE_FILE, run.space.to_yaml())
    recipe = {"schema": "qnas.recipe/1", "epochs": 2, "batch_size": 96, "resolution_px": 32}
    request = {"train": {"recipe": recipe, "threads": 1, "seed": 0}, "from_supernet": True}
    known = {"command": "train-subnet", "choices": list(run.arch.choices), "space_digest": run.space.digest}
    write_json(folder / CONFIG_FILE, {**request, **known, "data": "digits", "versions": {"qnas": "0.1.0"}})
    speed = {"images_per_second": 7752.5, "batch_size": 64, "resolution_px": 32, "runtime": "torch 2"}
    write_json(folder / SPEED_FILE, {**speed, "machine": "a CPU", "threads": 1, "cores": 2})
    epoch = {"train_loss": 0.75, "learning_rate": 0.002, "test_loss": 0.5}
    rows: list[dict[str, Any]] = [{"step": step, "loss": 1.0 / step} for step in range(1, 9)]
    for number, row in enumerate((rows[3], rows[7]), 1):
        row |= {"epoch": number, "test_accuracy": number * right / (2 * images), **epoch}
    write_text(folder / METRICS_FILE, "".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def search_metrics(space: SearchSpace, devices: Sequence[str] = ("myriad-vpu",)) -> list[dict[str, Any]]:
    """Return the rows of a search's metrics: six steps, every second of them an architecture step."""
    shares = [[round(1 / len(p.names), 4)] * len(p.names) for p in space.positions]
    rows: list[dict[str, Any]] = []
    for step in range(1, 7):
        row: dict[str, Any] = {"step": step, "loss": 2.5 - 0.25 * step}
        if step % 2 == 0:
            row |= {"arch_loss": 2.0, "arch_accuracy": 0.5, "expected_ms": 2.0, "limit_ms": 2.0}
            row |= {f"of_limit_{device}": 1.0 for device in devices}
            row |= {"multiplier": 0.25, "temperature": 0.5, "entropy": 1.0, "identity_share": 0.25}
            row |= {"probabilities": shares}
        rows.append(row)
    rows[2]["warnings"] = ["it stands still"]
    return rows


def flat(accuracies: dict[tuple[int, ...], float], images: int = 287) -> dict[tuple[int, ...], Accuracy]:
    return {network: Accuracy(share, images) for network, share in accuracies.items()}
