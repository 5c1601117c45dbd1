"""The facts of a run's documents, recomputed from its space, choices, latency tables and scores.

A certificate is worth what can be recomputed. Whoever reads a latency, a size, a limit or a score from a
document gets one that follows from the other files; a difference is refused in one line. A table is that of
the run if its digest is the recorded one: the CSV has six decimals, so a table with more of them (one that
was calibrated, or made in Python) is compared by the digest of its copy, and its sums up to rounding.

Latencies of a lone arch.json are recomputed from the shipped device of that name. Where that is not possible,
the reader is told (`Recomputed.unchecked`).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from qnas.common.errors import ArchError, CheckpointError, InfeasibleBudgetError, TableError, UsageError
from qnas.common.intervals import wilson
from qnas.common.units import parse_count, parse_energy, parse_latency
from qnas.latency.device import device_names, load_device
from qnas.latency.energy import EnergyTable
from qnas.latency.intervals import Errors, Uncertainty
from qnas.latency.prediction import DEVICE, table_from
from qnas.latency.table import DECIMALS, LatencyTable, read_table
from qnas.runs.names import ARCH_FILE, CONFIG_FILE, RESULT_FILE, SEARCH_FILE, table_file
from qnas.solver.kinds import count_blocks, kinds_of, names_of
from qnas.solver.limits import (
    COUNTS,
    ENERGY,
    ENERGY_UNIT,
    Limit,
    Limits,
    count_limit,
    energy_limit,
    expected_amount,
    latency_limit,
)
from qnas.solver.solve import Scores, limit_entry, solve_best
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace

EXACT = 1e-12  # share by which equal figures may differ
MOST_MS = 1e12  # of a block: sums of latencies stay finite
ROUNDED_MS = 0.51 * 10.0**-DECIMALS  # a cell's rounding in a table's file
BELOW_BOUND = 1e-6  # share of the scores' range by which the best score may be below its bound


@dataclass(frozen=True)
class Recomputed:
    """The limits of an arch.json whose latencies were recomputed, and why others were not."""

    limits: Limits
    unchecked: tuple[str, ...]


# ---- arch.json


def recompute(document: Mapping[str, Any], space: SearchSpace, arch: Arch, path: Path) -> Recomputed:
    """Recompute the facts of an arch.json from the tables near it, or else from the shipped devices.

    Raises ArchError for a fact that differs, TableError for a damaged table.
    """
    limits, unchecked = [], []
    for at, entry in enumerate(document.get("limits", ())):
        where, exact, limit = f"{path}: limits[{at}]", True, None
        if entry["unit"] == "ms":
            margin = _margin(entry, document["margin"] if at == 0 else None, where)
            table = _nearby_table(path.parent, entry, margin, space) or _shipped(document, entry, space)
            if table is not None:
                limit, exact = _device_limit(table, entry), table.digest == entry["table_digest"]
        else:
            limit = (
                _energy_limit(entry, space, where)
                if entry["unit"] == ENERGY_UNIT
                else _count_limit(entry, space)
            )
        if limit is None:
            _check_sum(where, entry, space)
            unchecked.append(
                f"the latency on {entry['name']} is not recomputed: no {table_file(entry['name'])} beside "
                f"{path}, and no shipped device with this table"
            )
        else:
            limits.append(limit)
            _check_entry(where, entry, limit, arch.indices(space), exact=exact)
    _check_facts(document, space, arch, path)
    return Recomputed(tuple(limits), tuple(unchecked))


def read_limits(folder: Path, document: Mapping[str, Any], space: SearchSpace) -> Limits:
    """Return the limits of an arch.json, with latencies from the tables in the folder.

    Raises TableError if a table is missing, damaged or another one.
    """
    limits = []
    for at, entry in enumerate(document["limits"]):
        if entry["unit"] == "ms":
            margin = _margin(entry, document["margin"] if at == 0 else None, str(folder / ARCH_FILE))
            limits.append(_device_limit(_read_table(folder, entry, margin, space), entry))
        elif entry["unit"] == ENERGY_UNIT:
            limits.append(_energy_limit(entry, space, f"{folder / ARCH_FILE}: limits[{at}]"))
        else:
            limits.append(_count_limit(entry, space))
    return tuple(limits)


def _margin(entry: Mapping[str, Any], recorded: float | None, where: str) -> float:
    """Return the margin of a device's limit, which the file of its table does not contain."""
    found = entry["budget"] / entry["limit"] - 1.0
    margin = float(f"{found:.6g}") if recorded is None else recorded  # a calibration has six digits
    if entry["budget"] / (1.0 + margin) == entry["limit"]:
        return float(margin)
    if recorded is not None or found < 0:
        raise ArchError(
            f"{where}: its limit, {entry['limit']} ms, is not the budget, {entry['budget']} ms, less a margin"
        )
    return float(found)


def _nearby_table(
    folder: Path, entry: Mapping[str, Any], margin: float, space: SearchSpace
) -> LatencyTable | None:
    """Return a device's table from the folder of an arch.json, or from the run that a training is in."""
    for place in (folder, folder.parent):
        if (place / table_file(entry["name"])).is_file():
            return _read_table(place, entry, margin, space)
    return None


def _read_table(folder: Path, entry: Mapping[str, Any], margin: float, space: SearchSpace) -> LatencyTable:
    """Read a run's copy of a table. Raises TableError if it is not the one of the arch.json."""
    path, name = folder / table_file(entry["name"]), entry["name"]
    table = replace(read_table(path, space, device=name), margin=margin)
    if table.digest in (entry["table_digest"], entry.get("copy_digest")):
        return table
    if "copy_digest" in entry or not _is_rounded(entry):
        raise TableError(
            f"{path}: its digest is {table.digest}, but {ARCH_FILE} was made with table "
            f"{entry['table_digest']} of {name}: one of the two was edited"
        )
    return table  # of an earlier version, which recorded no digest of the copy


def _shipped(
    document: Mapping[str, Any], entry: Mapping[str, Any], space: SearchSpace
) -> LatencyTable | None:
    """Return the table of the shipped device of this name, if it is the recorded table."""
    if entry["name"] not in device_names():
        return None
    source = document.get("latency_source") or DEVICE
    try:
        table = table_from(source, load_device(entry["name"]), space)
    except (TableError, UsageError):  # nn-Meter's predictors are not imported, or another source
        return None
    return table if table.digest == entry["table_digest"] else None


def _device_limit(table: LatencyTable, entry: Mapping[str, Any]) -> Limit:
    slowest_ms = max(chain((cell.latency_ms for _, cell in table.fixed), *table.ms))
    if slowest_ms > MOST_MS:
        raise TableError(f"the table of {table.device}: a block takes {slowest_ms:g} ms")
    table = replace(table, uncertainty=_recorded(entry))
    limit = latency_limit(table, entry["budget"], entry.get("confidence"))
    is_rate = entry.get("quantity") == "throughput"  # the copy of a table does not say
    return replace(limit, limit=entry["limit"], throughput=is_rate)


def _energy_limit(entry: Mapping[str, Any], space: SearchSpace, where: str) -> Limit:
    """Return an energy limit from its recorded cells. Raises ArchError if they are not the search's."""
    sizes = [len(position.candidates) for position in space.positions]
    if [len(row) for row in entry["cells"]] != sizes:
        raise ArchError(f"{where}.cells: not one for each candidate of each position of {space.name}")
    device = entry["name"].removeprefix(f"{ENERGY}-")
    energies = EnergyTable(device, entry["fixed"], tuple(map(tuple, entry["cells"])))
    limit = energy_limit(energies, entry["budget"])
    if limit.cells_digest != entry["cells_digest"]:
        raise ArchError(f"{where}.cells: their digest is {limit.cells_digest}, not {entry['cells_digest']}")
    return replace(limit, limit=entry["limit"])


def _recorded(entry: Mapping[str, Any]) -> Uncertainty | None:
    """Return the errors that an entry's interval follows from; None where it has none."""
    interval = entry.get("interval")
    if interval is None:
        return None
    errors = Errors(level=interval["level"], low=interval["low"], high=interval["high"])
    return Uncertainty(source=ARCH_FILE, networks=1, weight=interval["weight"], errors=(errors,))


def _count_limit(entry: Mapping[str, Any], space: SearchSpace) -> Limit:
    limit = count_limit(space, entry["name"], entry["budget"])
    return replace(limit, limit=entry["limit"])


def _check_entry(
    where: str, entry: Mapping[str, Any], limit: Limit, indices: Sequence[int], *, exact: bool
) -> None:
    """Raise ArchError where an entry of `limits` differs from what its table and the choices give."""
    # every cell of the sums may be rounded
    rounding = 0.0 if exact else ROUNDED_MS * (len(limit.cells) + 100)
    expected = limit_entry(limit, tuple(indices))
    for key in ("fixed", "positions", "amount", "least", "most", "coverage", "latency_ms"):
        if key in expected:
            _compare(
                f"{where}.{key}", entry[key], expected[key], rounding if key != "coverage" else rounding * 10
            )
    for key in ("low_ms", "high_ms") if "interval" in entry else ():
        # an error may double what rounding an estimated part does
        found, due = entry["interval"][key], expected["interval"][key]
        _compare(f"{where}.interval.{key}", found, due, rounding * 2 * entry["interval"]["weight"])
    if limit.table is None and entry["limit"] != entry["budget"]:
        raise ArchError(f"{where}.limit is {entry['limit']}, but the budget is {entry['budget']}")
    if entry["amount"] > entry["limit"] + rounding:
        raise ArchError(f"{where}: {entry['amount']} is above the limit of {entry['limit']} {entry['unit']}")


def _check_sum(where: str, entry: Mapping[str, Any], space: SearchSpace) -> None:
    """Raise ArchError where an entry without a table contradicts itself."""
    if len(entry["positions"]) != len(space.positions):
        raise ArchError(f"{where}.positions: {len(entry['positions'])}, expected {len(space.positions)}")
    _compare(f"{where}.amount", entry["amount"], math.fsum([entry["fixed"], *entry["positions"]]))
    if not entry["least"] <= entry["amount"] <= min(entry["most"], entry["limit"]):
        raise ArchError(f"{where}.amount: {entry['amount']} is outside least, most and limit")


def _check_facts(document: Mapping[str, Any], space: SearchSpace, arch: Arch, path: Path) -> None:
    """Raise ArchError where facts of an arch.json differ from its limits or from the network."""
    if "limits" not in document:
        return
    first, certificate = document["limits"][0], document["certificate"]
    blocks = lower(space, arch)
    for key, value in (("macs", count_macs(blocks)), ("params", count_params(blocks))):
        _compare(f"{path}: {key}", document[key], value)
    same = {
        "device": "name",
        "table_digest": "table_digest",
        "budget_ms": "budget",
        "limit_ms": "limit",
        "latency_ms": "amount" if first.get("confidence") is None else "latency_ms",
        "latency_coverage": "coverage",
    }
    for key, of_limit in same.items():
        _compare(f"{path}: {key}", document[key], first[of_limit])
    of_certificate = {
        "fixed_ms": "fixed",
        "position_ms": "positions",
        "fastest_ms": "least",
        "slowest_ms": "most",
    }
    for key, of_limit in of_certificate.items():
        _compare(f"{path}: certificate.{key}", certificate[key], first[of_limit])


def _compare(
    key: str,
    found: Any,
    expected: Any,
    rounding: float = 0.0,
    error: type[ArchError | CheckpointError] = ArchError,
) -> None:
    """Raise an error where a value or a list differs from the recomputed one by more than rounding."""
    if isinstance(expected, list | tuple) and isinstance(found, list):
        if len(found) != len(expected):
            raise error(f"{key}: {len(found)} values, expected {len(expected)}")
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            _compare(f"{key}[{at}]", one, other, rounding, error)
    elif isinstance(expected, float | int) and isinstance(found, float | int):
        if not math.isclose(found, expected, rel_tol=EXACT, abs_tol=max(rounding, EXACT)):
            raise error(f"{key} is {found}, but {expected} when recomputed: the file was edited or damaged")
    elif found != expected:
        raise error(
            f"{key} is {found!r:.60}, but {expected!r:.60} when recomputed: the file was edited or damaged"
        )


# ---- search.json and its agreement with arch.json and config.json


def check_request(config: Mapping[str, Any], document: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where a search's config.json asks for something else than its arch.json has."""
    path, entries = folder / CONFIG_FILE, config.get("limits", [])
    if (digest := config.get("space_digest")) is not None:
        _compare(f"{path}: space_digest", digest, document["space_digest"], error=CheckpointError)
    if not entries:
        return
    _compare(
        f"{path}: limits",
        [e["name"] for e in entries],
        [e["name"] for e in document["limits"]],
        error=CheckpointError,
    )
    for at, (entry, limit) in enumerate(zip(entries, document["limits"], strict=True)):
        where = f"{path}: limits[{at}]"
        try:
            budget = _budget(entry["budget"], limit["unit"], f"{where}.budget")
        except UsageError as cause:
            raise CheckpointError(f"{where}: {cause}") from cause
        _compare(f"{where}.budget in numbers", budget, limit["budget"], error=CheckpointError)
        for key in ("limit", "table_digest", "cells_digest", "confidence"):
            if key in entry:
                _compare(f"{where}.{key}", entry[key], limit.get(key), error=CheckpointError)


def _budget(text: str, unit: str, where: str) -> float:
    """Return the number of a budget as it was asked for."""
    if unit == "ms":
        return parse_latency(text)
    return parse_energy(text, where) if unit == ENERGY_UNIT else parse_count(text, where)


def check_search(
    found: Mapping[str, Any],
    document: Mapping[str, Any],
    space: SearchSpace,
    limits: Limits,
    scores: Scores,
    log_probabilities: Scores,
    folder: Path,
) -> None:
    """Raise CheckpointError where a search.json differs from what its choices, tables and scores give.

    Raises ArchError where it has a network that is not of the space.
    """
    path = folder / SEARCH_FILE
    counts = {name: count_limit(space, name, math.inf) for name in COUNTS}
    for key, entry in _networks(found):
        where = f"{path}: {key}"
        indices = make_arch(space, tuple(entry["choices"]), where).indices(space)
        amounts = [limit.amount(indices) for limit in limits]
        rounding = ROUNDED_MS * (len(indices) + 100) if any(map(_is_rounded, document["limits"])) else 0.0
        _compare(f"{where}.amounts", entry["amounts"], amounts, rounding, CheckpointError)
        expected: dict[str, float] = {
            "latency_ms": (
                entry["amounts"][0] if limits[0].confidence is None else limits[0].latency_ms(indices)
            ),
            "score": math.fsum(row[i] for row, i in zip(scores, indices, strict=True)),
            **{name: limit.amount(indices) for name, limit in counts.items()},
        }
        for name in expected.keys() & entry.keys():
            slack = {"score": 1e-9, "latency_ms": rounding}.get(name, 0.0)
            _compare(f"{where}.{name}", entry[name], expected[name], slack, CheckpointError)
    _check_summary(found, limits, log_probabilities, path)
    if document.get("heldout_accuracy") is None:
        raise ArchError(f"{folder / ARCH_FILE}: heldout_accuracy: missing")
    first, derived = found["ranking"][0], found["derived"]
    chosen = (
        ("ranking[0].choices", first["choices"], document["choices"]),
        ("ranking[0].score", first["score"], document["certificate"]["score"]),
        ("ranking[0].rank", first["rank"], document["certificate"]["rank"]),
        ("ranking[0].heldout_accuracy", first["heldout_accuracy"], document["heldout_accuracy"]),
    )
    for key, value, other in (
        *(() if "finalists" in found else chosen),
        ("derived.choices", derived["choices"], document["choices"]),
        ("derived.heldout_accuracy", derived["heldout_accuracy"], document["heldout_accuracy"]),
        ("derived.accuracy", derived["accuracy"], document.get("supernet_accuracy", derived["accuracy"])),
    ):
        if value != other:
            raise CheckpointError(
                f"{path}: {key} is {value!r:.60}, but {ARCH_FILE} says {other!r:.60}: one of them was edited"
            )


def check_finalists(
    found: Mapping[str, Any],
    document: Mapping[str, Any],
    space: SearchSpace,
    limits: Limits,
    scores_by_round: Sequence[Scores],
    folder: Path,
    limits_of: Callable[[str], Limits] | None = None,
) -> None:
    """Raise CheckpointError where the finalists differ from what choices, tables and scores give.

    Each must be within all limits, and the winner be the network of arch.json. `limits_of` returns the limits
    in the space, by name, of a finalist at another layout of a family. Raises ArchError where one is not of
    the space.
    """
    path, of_space = folder / SEARCH_FILE, limits
    if "finalists" not in found or "finalist" not in document:
        raise CheckpointError(f"{path}: finalists are in one of it and {ARCH_FILE} only: one was edited")
    finalists, chosen, certificate = found["finalists"], document["finalist"], document["certificate"]
    kinds = kinds_of(space)
    rounding = ROUNDED_MS * (len(kinds) + 100) if any(map(_is_rounded, document["limits"])) else 0.0
    for at, entry in enumerate(finalists["networks"]):
        where = f"{path}: finalists.networks[{at}]"
        indices = make_arch(space, tuple(entry["choices"]), where).indices(space)
        counts = {name: count for name, count in count_blocks(kinds, indices).items() if count}
        scores = scores_by_round[entry["round"] - 1]
        score = math.fsum(row[i] for row, i in zip(scores, indices, strict=True))
        own = entry.get("space", space.name)
        limits = of_space if own == space.name or limits_of is None else limits_of(own)
        amounts = [limit.amount(indices) for limit in limits]
        _compare(f"{where}.blocks", entry["blocks"], counts, error=CheckpointError)
        _compare(f"{where}.amounts", entry["amounts"], amounts, rounding, CheckpointError)
        latency_ms = limits[0].latency_ms(indices)
        _compare(f"{where}.latency_ms", entry["latency_ms"], latency_ms, rounding, CheckpointError)
        _compare(f"{where}.score", entry["score"], score, 1e-9, CheckpointError)
        for limit, amount in zip(limits, amounts, strict=True):
            if amount > limit.limit + rounding:
                raise CheckpointError(f"{where}: {amount} is above the limit of {limit.limit} {limit.unit}")
    winner = finalists["networks"][finalists["winner"] - 1]
    for key, value, other in (
        ("choices", winner["choices"], document["choices"]),
        ("score", winner["score"], certificate["score"]),
        ("rank", winner["rank"], certificate["rank"]),
        ("space", winner.get("space", space.name), space.name),
        ("kinds", winner["kinds"], certificate.get("kinds", [])),
        ("stages", winner.get("stages", []), certificate.get("stages", [])),
        ("number", winner["number"], chosen["number"]),
        ("heldout_accuracies", winner["heldout_accuracies"][-1], chosen["heldout_accuracy"]),
        ("weights_sha256", finalists["weights_sha256"], chosen["weights_sha256"]),
    ):
        if value != other:
            raise CheckpointError(
                f"{path}: {key} of the chosen finalist is {value!r:.60}, but {ARCH_FILE} says {other!r:.60}: "
                "one of them was edited"
            )


def _check_summary(found: Mapping[str, Any], limits: Limits, log_probabilities: Scores, path: Path) -> None:
    """Raise CheckpointError where the expected amounts or the accuracies by seed do not come out."""
    expected = [expected_amount(log_probabilities, limit) for limit in limits]
    if len(found["expected"]) != len(expected):
        raise CheckpointError(f"{path}: expected: {len(found['expected'])} amounts of {len(expected)} limits")
    accuracies = list(found["seeds"]["accuracies"].values())
    figures = {
        "expected_ms": (found["expected_ms"], expected[0]),
        **{f"expected[{at}]": each for at, each in enumerate(zip(found["expected"], expected, strict=True))},
        "budget_binds": (found["budget_binds"], any(limit.binds for limit in limits)),
        "seeds.mean": (found["seeds"]["mean"], statistics.mean(accuracies or [math.nan])),
        "seeds.sd": (found["seeds"]["sd"], statistics.stdev(accuracies) if len(accuracies) > 1 else None),
    }
    for key, (value, other) in figures.items():
        # the probabilities were computed on another machine, perhaps from tables with more decimals
        _compare(f"{path}: {key}", value, other, 1e-4 * abs(other or 0.0), CheckpointError)


def _is_rounded(entry: Mapping[str, Any]) -> bool:
    """Whether the file of a limit's table has fewer decimals than the search had."""
    if entry["unit"] != "ms":
        return False
    figures = (entry["fixed"], entry["least"], entry["most"], *entry["positions"])
    return any(abs(round(ms, DECIMALS) - ms) > 1e-12 * (1 + ms) for ms in figures)


def _networks(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the networks of a search.json with their keys."""
    for key in ("derived", "macs_guided", "largest"):
        if found[key] is not None:
            yield key, found[key]
    for key in ("ranking", "random"):
        for at, entry in enumerate(found[key]):
            yield f"{key}[{at}]", entry


# ---- the certificate


def check_certificate(
    document: Mapping[str, Any],
    space: SearchSpace,
    arch: Arch,
    limits: Limits,
    scores: Scores,
    most_solved: int,
    path: Path,
) -> None:
    """Solve again, and raise ArchError unless the certificate's score, rank and bound come out.

    `most_solved` is the largest number of networks that the run solved for.
    """
    certificate, indices = document["certificate"], arch.indices(space)
    kinds = tuple(certificate.get("kinds", ()))
    if unknown := set(kinds) - set(names_of(kinds_of(space))):
        raise ArchError(f"{path}: certificate.kinds: the space has no {', '.join(sorted(unknown))}")
    stages = tuple(certificate.get("stages", ()))
    if max(stages, default=0) > len(space.stages):
        raise ArchError(f"{path}: certificate.stages: the space has only {len(space.stages)}")
    rank, score, bound = (certificate[key] for key in ("rank", "score", "score_bound"))
    own = math.fsum(row[i] for row, i in zip(scores, indices, strict=True))
    _compare(f"{path}: certificate.score", score, own, 1e-9)
    if rank > most_solved:
        raise ArchError(f"{path}: certificate.rank is {rank}, but the run solved for {most_solved} networks")
    slack = BELOW_BOUND * math.fsum(max(row) - min(row) for row in scores) + 1e-9
    is_rounded = any(map(_is_rounded, document["limits"]))
    # by rounding in the table's file, the network may be over a limit, and others within it
    rounding = ROUNDED_MS * (len(indices) + 100) if is_rounded else 0.0
    wider = tuple(
        replace(each, limit=max(each.limit + (rounding if each.table else 0.0), each.amount(indices)))
        for each in limits
    )
    try:
        solutions = solve_best(space, scores, wider, 1 if is_rounded else rank, kinds, stages)
    except InfeasibleBudgetError as cause:
        raise ArchError(f"{path}: {cause}") from cause
    proven = solutions[0].score
    if bound > proven + slack:  # a bound that is not met depends on the number of networks solved for
        solved = min(certificate["solved"], most_solved)
        proven = solve_best(space, scores, wider, solved, kinds, stages)[0].bound
    if not (is_rounded and own - slack <= bound <= proven + slack):
        _compare(f"{path}: certificate.score_bound", bound, proven, slack)
    better = sum(solution.score > own + slack for solution in solutions)
    as_good = sum(solution.score >= own - slack for solution in solutions)
    if not is_rounded and not better < rank <= as_good:
        raise ArchError(
            f"{path}: certificate.rank is {rank}, but {better} networks within the limits have a higher score"
        )


# ---- result.json


def check_result(result: Mapping[str, Any], space: SearchSpace, arch: Arch, folder: Path) -> None:
    """Raise CheckpointError where a result.json contradicts itself or the network."""
    path, n = folder / RESULT_FILE, result["test_images"]
    classes, channels = len(result["classes"]), space.input.channels
    right = round(result["test_accuracy"] * n)
    deployed, trained = lower(space, arch), lower(space, arch, classes=classes)
    low, high = wilson(result["test_accuracy"], n)
    facts: dict[str, tuple[Any, Any]] = {
        "test_accuracy": (result["test_accuracy"], right / n),
        "top1.value": (result["top1"]["value"], result["test_accuracy"]),
        "top1.low": (result["top1"]["low"], low),
        "top1.high": (result["top1"]["high"], high),
        "per_class, images in all": (sum(row["images"] for row in result["per_class"]), n),
        "per_class, right in all": (sum(_right(result["per_class"])), right),
        "params": (result["params"], count_params(trained)),
        "deployed.macs": (result["deployed"]["macs"], count_macs(deployed)),
        "deployed.params": (result["deployed"]["params"], count_params(deployed)),
        "mean": ([0] * len(result["mean"]), [0] * channels),
    }
    for key, (found, expected) in facts.items():
        _compare(f"{path}: {key}", found, expected, 1e-9, CheckpointError)


def _right(rows: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    for row in rows:
        yield round(row["value"] * row["images"]) if row["images"] else 0
