"""An explanation of a search's network: the cost of its blocks, the price of latency, and alternatives.

For each device in turn, the network of least loss by the search's effects (or, without effects, the most
probable network) is solved for at other budgets, with all other limits unchanged. A network that is optimal
for a budget is optimal for every smaller budget down to its latency. Near the search's budget, the curve is
traced network by network, so that none is missed.

The price of a millisecond at the budget is the slope of the curve's lower convex hull, in nats of loss: the
multiplier of the Lagrangian relaxation (Everett, 1963). A block pays off if it lowers the loss by more than
its latencies cost at the prices of all devices. Effects are additive and were measured near the budget, so
the curve is less reliable further away from it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qnas.latency.intervals import Interval
from qnas.latency.table import RUNTIME
from qnas.runs.budget_curve import NEAR, CurvePoint, OtherBudgets, price_at, replace_limit
from qnas.runs.family import check_family_certificate
from qnas.runs.finished_run import FinishedRun
from qnas.runs.names import ARCH_FILE
from qnas.runs.verification import check_certificate
from qnas.solver.limits import Limit
from qnas.solver.solve import CandidateIndices, solve
from qnas.spaces.lower import BlockSpec, skeleton

STEP_SHARE = 0.05  # of the budget: a small change of latency, rounded by round_step


@dataclass(frozen=True)
class Change:
    """A position where two networks differ."""

    position: str
    before: str
    after: str
    latency_ms: float  # added by the change
    loss: float  # nats added by the change


@dataclass(frozen=True)
class Exchange:
    """The network for another budget, compared with the one for the search's budget."""

    budget_ms: float
    latency_ms: float
    loss: float  # nats relative to the network for the search's budget
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class BlockCost:
    """A block of the derived network on the device."""

    name: str
    choice: str  # empty for blocks that every network has
    latency_ms: float
    share: float  # of the network's latency
    source: str  # source of the latency


@dataclass(frozen=True)
class Flip:
    """The budget from which the choice at a position is another one."""

    from_ms: float  # budget of the first network on the curve with this choice
    choice: str


@dataclass(frozen=True)
class PositionStory:
    """The choice at a position and its reason."""

    name: str
    choice: str  # in the derived network
    solved: str  # in the network of least loss; differs if images decided
    loss: float  # nats of the choice relative to the position's cheapest candidate
    best_block: str | None  # if identity was chosen: the candidate closest to paying off
    best_loss: float  # nats that it would add
    best_latencies_ms: tuple[float, ...]  # that it would add on each device
    reason: str  # why it was not chosen, in words; empty for blocks


@dataclass(frozen=True)
class OnDevice:
    """The derived network on one device, and the networks for other budgets of this device."""

    device: str
    budget_ms: float
    latency_ms: float  # of the derived network
    interval: Interval | None  # of it; None where the errors of the device are unknown
    # level of the intervals whose upper ends the budget bounds: prices and other networks are of upper ends
    confidence: float | None
    price: float  # nats by which a millisecond lowers the loss at the budget
    step_ms: float
    more: Exchange | None  # the network for a step more; None: the same one
    less: Exchange | None  # for a step less; None: the same one, or no network is that fast
    can_be_less: bool  # whether a network exists for a step less
    next_better: Exchange | None  # the fastest better network beyond the budget
    blocks: tuple[BlockCost, ...]
    flips: tuple[tuple[Flip, ...], ...]  # for each position, by rising budget from the fastest network on
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Explanation:
    """An explanation of a search's network."""

    measured: bool  # whether losses are measured effects or negative log probabilities
    explained: float | None  # share of the variance between networks that the effects explain
    resolution_px: int  # of the images that latencies are for
    devices: tuple[OnDevice, ...]  # the devices of the search
    positions: tuple[PositionStory, ...]

    def facts(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return asdict(self)


def explain(run: FinishedRun) -> Explanation:
    """Explain a finished search from its folder.

    Raises ArchError if its certificate does not come out when the search is solved again.
    """
    limits = run.limits
    for at, limit in enumerate(limits):
        # the derived network may be over a limit by rounding in the table's file
        limits = replace_limit(limits, at, max(limit.limit, limit.amount(run.indices)))
    run = replace(run, limits=limits)
    check_certificate(
        run.document,
        run.space,
        run.arch,
        limits,
        run.searched.certified,
        run.searched.screened,
        run.folder / ARCH_FILE,
    )
    if run.family is not None:
        check_family_certificate(run.family, run.searched.measured, run.searched.screened)
    own = solve(run.searched.scores, limits).indices
    devices = tuple(
        _on_device(OtherBudgets(run, at, own)) for at, limit in enumerate(limits) if limit.table is not None
    )
    effects = run.found["effects"]
    return Explanation(
        measured=run.searched.effects is not None,
        explained=effects["explained"] if effects is not None else None,
        resolution_px=run.space.input.resolution_px,
        devices=devices,
        positions=tuple(_stories(run, own, [device.price for device in devices])),
    )


def _on_device(budgets: OtherBudgets) -> OnDevice:
    run, limit = budgets.run, budgets.limit
    step_ms = round_step(STEP_SHARE * limit.limit)
    curve = budgets.trace(step_ms)
    return OnDevice(
        limit.name,
        limit.budget,
        limit.latency_ms(run.indices),
        interval=limit.interval(run.indices),
        confidence=limit.confidence,
        price=price_at(curve, limit.limit),
        step_ms=step_ms,
        more=_exchange(budgets, limit.limit + step_ms),
        less=_exchange(budgets, limit.limit - step_ms),
        can_be_less=budgets.solve(limit.limit - step_ms) is not None,
        next_better=_next_better(budgets, curve),
        blocks=_block_costs(run, limit),
        flips=tuple(_flips(run, curve, limit)),
        curve=curve,
    )


def round_step(latency_ms: float) -> float:
    """Round a latency down to 1, 2 or 5 times a power of ten.

    >>> round_step(1.5), round_step(0.12), round_step(3)
    (1.0, 0.1, 2.0)
    """
    scale = 10.0 ** math.floor(math.log10(latency_ms))
    return float(max(n for n in (1, 2, 5) if n * scale <= latency_ms * (1 + 1e-9)) * scale)


def _exchange(budgets: OtherBudgets, most_ms: float) -> Exchange | None:
    """Return the network for another limit; None if there is none or it is the same one."""
    network = budgets.solve(most_ms)
    return None if network is None or network == budgets.own else _between(budgets, network, most_ms)


def _between(budgets: OtherBudgets, network: CandidateIndices, most_ms: float) -> Exchange:
    run, limit, own = budgets.run, budgets.limit, budgets.own
    changes = tuple(
        Change(position.name, position.names[i], position.names[j], row[j] - row[i], score[i] - score[j])
        for position, row, score, i, j in zip(
            run.space.positions, limit.cells, run.searched.scores, own, network, strict=True
        )
        if i != j
    )
    budget_ms = most_ms * limit.budget / limit.limit
    return Exchange(budget_ms, limit.amount(network), budgets.loss(network), changes)


def _next_better(budgets: OtherBudgets, curve: Sequence[CurvePoint]) -> Exchange | None:
    """Return the fastest network beyond the limit that is better."""
    limit = budgets.limit
    better = [point for point in curve if point.loss < -1e-12 and point.latency_ms > limit.limit]
    if not better:
        return None
    # there may be others between the limit and the first one of the curve: step down to the last
    network, found = better[0].indices, budgets.solve(better[0].latency_ms)
    for _ in range(NEAR):
        if found is None or limit.amount(found) <= limit.limit:
            break
        network, found = found, budgets.solve(limit.amount(found) * (1 - 1e-12))
    return _between(budgets, network, limit.amount(network))


def _block_costs(run: FinishedRun, limit: Limit) -> tuple[BlockCost, ...]:
    """Return the latencies of the derived network's blocks, in order, and that of the runtime."""
    table = limit.table
    assert table is not None
    total = limit.latency_ms(run.indices) or 1.0
    blocks = {name: ("", cell) for name, cell in table.fixed}
    for position, row, i in zip(run.space.positions, table.cells, run.indices, strict=True):
        blocks[position.name] = position.names[i], row[i]
    parts = skeleton(run.space)
    order = [part.name if isinstance(part, BlockSpec) else part.position.name for part in parts]
    return tuple(
        BlockCost(name, choice, cell.latency_ms, cell.latency_ms / total, cell.source)
        for name, (choice, cell) in ((name, blocks[name]) for name in (*order, RUNTIME))
    )


def _flips(run: FinishedRun, curve: Sequence[CurvePoint], limit: Limit) -> Iterator[tuple[Flip, ...]]:
    """Yield the choices at each position along the curve of a limit."""
    for number, position in enumerate(run.space.positions):
        flips: list[Flip] = []
        for point in curve:
            name = position.names[point.indices[number]]
            if not flips or flips[-1].choice != name:
                flips.append(Flip(point.latency_ms * limit.budget / limit.limit, name))
        yield tuple(flips)


def _stories(run: FinishedRun, own: CandidateIndices, prices: Sequence[float]) -> Iterator[PositionStory]:
    """Yield the choice at each position and its reason. `prices` has one price per device."""
    devices = [limit for limit in run.limits if limit.table is not None]
    for at, position in enumerate(run.space.positions):
        names, row, choice = position.names, run.searched.scores[at], run.indices[at]
        cells = [limit.cells[at] for limit in devices]
        cheapest = min(range(len(names)), key=lambda j: (cells[0][j], j))
        # latency of each candidate relative to the choice, by device, and its worth in nats
        more = [[of[j] - of[choice] for of in cells] for j in range(len(names))]
        worth = [sum(p * ms for p, ms in zip(prices, each, strict=True)) for each in more]
        alternative: tuple[str | None, float, tuple[float, ...], str] = (None, 0.0, (), "")
        others = [j for j in range(len(names)) if names[j] != "identity"]
        if names[choice] == "identity" and others:
            best = max(others, key=lambda j: row[j] - row[choice] - worth[j])
            reason = _why_identity(run, own, at, best, worth[best])
            alternative = (names[best], row[choice] - row[best], tuple(more[best]), reason)
        loss = row[cheapest] - row[choice]
        yield PositionStory(position.name, names[choice], names[own[at]], loss, *alternative)


def _why_identity(run: FinishedRun, own: CandidateIndices, at: int, best: int, worth: float) -> str:
    """Explain why identity was chosen and not `best`, the candidate that is closest to paying off.

    `worth` is the worth of its latency on all devices, in nats.
    """
    row, choice = run.searched.scores[at], run.indices[at]
    gain = row[best] - row[choice]
    if gain <= 0:
        return "no block lowers the loss here"
    if gain < worth:
        return f"too expensive: its latency is worth {worth:.3f} nats"
    left = []
    for limit in run.limits:
        room = max(0.0, limit.limit - limit.amount(run.indices))
        if limit.cells[at][best] - limit.cells[at][choice] > room:
            left.append(limit.describe(room) + (f" on {limit.name}" if limit.table is not None else ""))
    if left:
        dear = f"worth its latency, but only {' and '.join(left)} are left"
        return dear if own != run.indices else f"{dear}, and no exchange of blocks lowers the loss"
    return "worth its latency and within the limits: the network was selected on held-out images"
