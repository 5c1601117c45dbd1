"""The exact solve over a family of spaces: the best networks within all limits at any of its layouts.

The score of a network is the sum of its candidates' scores, of a number for its resolution, and of one for
the width of each stage. A layout's Lagrangian relaxation (Everett, 1963) bounds the scores of its networks:
at a price of each limit, every position takes the candidate whose score less the price of its amounts is
highest. What a stage adds depends on its width and the width before it alone. So dynamic programming over
the stages, with the width as the state, finds the best layout at a price, and A* finds all layouts in
falling order of their bounds. The prices of a resolution are those at which its best layout is bounded
lowest (Kelley's cutting planes, 1960).

Layouts are then solved by `knapsack`, the best bound first. A layout whose turn it is gets a bound of its own
before it is solved, by the linear relaxation under its own prices. The solve ends when no bound is above the
k-th best known score: the networks are then proven to be the best of the whole family, and few of its layouts
were solved. Layouts without a network within a limit are dropped while they are enumerated.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from qnas.common.errors import InfeasibleBudgetError, SpaceError, TableError
from qnas.solver.knapsack import TOLERANCE, upper_bound
from qnas.solver.limits import Limit, Limits, check_limits
from qnas.solver.solve import K_BEST, Scores, Solution, check_feasible, solve_best
from qnas.spaces.family import MOST_LAYOUTS, Layout, SpaceFamily
from qnas.spaces.lower import HEAD
from qnas.spaces.space import SearchSpace

SOLVER = "qnas.layouts"
MOST_CUTS = 60  # of Kelley's method, for the prices of a resolution
MOST_PRICE = 1e4  # of a whole limit, in ranges of the scores of one position
GAP = 1e-3  # share of the scores' range by which a bound at these prices may be above the lowest one
LISTED = MOST_LAYOUTS  # layouts that are bounded one by one, solved or not
SUM = 1e-9  # share by which a layout's amounts may differ from the sums of its stages'

Floats = NDArray[np.float64]
LimitsOf = Callable[[SearchSpace], Limits]


@dataclass(frozen=True)
class FamilyScores:
    """The scores of a family's networks, as sums.

    `candidates` returns those of the candidates in the space at a layout; those of a stage may depend on
    the resolution, the width of the stage and the width before it, and on nothing else.
    """

    candidates: Callable[[SearchSpace], Scores]
    resolutions: Mapping[int, float] = field(default_factory=dict)  # others add nothing
    widths: tuple[Mapping[int, float], ...] = ()  # by stage

    def constant(self, layout: Layout) -> float:
        """Return what a layout adds to the scores of all its networks."""
        of_widths = (row.get(c, 0.0) for row, c in zip(self.widths, layout.channels, strict=False))
        return math.fsum([self.resolutions.get(layout.resolution_px, 0.0), *of_widths])


@dataclass(frozen=True)
class FamilyNetwork:
    """A network of a family with the proof of its rank."""

    layout: Layout
    solution: Solution  # in the space at the layout, whose scores lack the layout's own number
    score: float
    rank: int = 1  # among all layouts, from 1


@dataclass(frozen=True)
class Verdict:
    """What is known of a layout: that it was solved, or why not."""

    layout: Layout
    bound: float  # on the scores of its networks within the limits; -inf where there are none
    best: float | None  # the score of its best network where that is among the k best of the family
    networks: int  # of it that are among the k best of the family
    solved: bool


@dataclass(frozen=True)
class FamilySolutions:
    """The k best networks of a family, best first, and the proof that they are."""

    networks: tuple[FamilyNetwork, ...]
    layouts: int  # of the family
    solved: int  # layouts that were solved exactly
    rest_bound: float  # no network of a layout that was not solved scores more
    bound: float  # no network of the family scores more
    verdicts: tuple[Verdict, ...]  # of every layout of a small family, else of those that were solved

    def of(self, layout: Layout) -> tuple[Solution, ...]:
        """Return the solutions of one layout, best first."""
        return tuple(each.solution for each in self.networks if each.layout == layout)


def solve_family(
    family: SpaceFamily, scores: FamilyScores, limits_of: LimitsOf, k: int = K_BEST
) -> FamilySolutions:
    """Return the k best networks within all limits at any layout, or fewer if there are fewer.

    `limits_of` returns the limits on networks of a space; they are sums over blocks that depend on nothing
    else. Raises InfeasibleBudgetError where there is none, TableError where limits are no such sums.
    """
    chains = [_Chain(family, scores, limits_of, px) for px in family.resolutions_px]
    queue: list[tuple[float, bool, Layout]] = []  # minus the bound, whether it is the layout's own
    streams = {chain.resolution_px: chain.layouts() for chain in chains}
    by_px = {chain.resolution_px: chain for chain in chains}

    def take_next(px: int) -> None:
        if (found := next(streams[px], None)) is not None:
            heapq.heappush(queue, (-found[0], False, found[1]))

    for px in streams:
        take_next(px)
    best: list[FamilyNetwork] = []
    verdicts: dict[Layout, Verdict] = {}
    rest, bound, tolerance = -math.inf, -math.inf, max(chain.tolerance for chain in chains)
    while queue:
        negative, is_own, layout = heapq.heappop(queue)
        floor = best[-1].score if len(best) == k else -math.inf
        if -negative <= floor + tolerance:
            rest = -negative
            break
        chain = by_px[layout.resolution_px]
        if not is_own:
            take_next(layout.resolution_px)
            own = min(-negative, chain.own_bound(layout))
            if own > -math.inf:
                heapq.heappush(queue, (-own, True, layout))
            continue
        constant = scores.constant(layout)
        found = chain.solve(layout, k, floor - constant)
        own = constant + found[0].bound if found else min(-negative, floor)
        bound = max(bound, own)
        best += [FamilyNetwork(layout, each, constant + each.score) for each in found]
        best = sorted(best, key=lambda each: (-each.score, each.layout))[:k]
        verdicts[layout] = Verdict(layout, own, None, 0, solved=True)
    if not best:
        raise InfeasibleBudgetError(_why_none(family, chains))
    if len(family) <= LISTED:
        for layout in family.layouts():
            if layout not in verdicts:
                own = by_px[layout.resolution_px].own_bound(layout)
                verdicts[layout] = Verdict(layout, own, None, 0, solved=False)
    return FamilySolutions(
        tuple(FamilyNetwork(e.layout, e.solution, e.score, rank) for rank, e in enumerate(best, 1)),
        len(family),
        sum(verdict.solved for verdict in verdicts.values()),
        rest,
        max(bound, rest),
        tuple(_judged(verdicts[layout], best) for layout in sorted(verdicts)),
    )


def _judged(verdict: Verdict, best: Sequence[FamilyNetwork]) -> Verdict:
    own = [each.score for each in best if each.layout == verdict.layout]
    top = max(own, default=None)
    return Verdict(verdict.layout, verdict.bound, top, len(own), verdict.solved)


def _why_none(family: SpaceFamily, chains: Sequence["_Chain"]) -> str:
    """Say what the layout with the smallest amounts takes, where no network is within the limits."""
    space = family.at(min((chain.least_layout for chain in chains), key=lambda found: found[0])[1])
    try:
        check_limits(chains[0].limits_of(space))
    except InfeasibleBudgetError as error:
        return f"{error}{_of_all(family)}"
    return (
        f"found no network of {family.name} within all limits at once at any of {len(family)} layouts: raise "
        "one limit"
    )


def _of_all(family: SpaceFamily) -> str:
    return "" if len(family) == 1 else f": the least of {len(family)} layouts of {family.name}"


@dataclass(frozen=True)
class _Part:
    """A stage at a width, behind one of another width: its positions' scores and shares of the limits."""

    scores: tuple[Floats, ...]  # by position: (candidates,)
    shares: tuple[Floats, ...]  # by position: (limits, candidates)
    fixed: Floats  # (limits,)

    @cached_property
    def least(self) -> Floats:
        """The smallest shares of the limits, (limits,)."""
        found: Floats = self.fixed + sum((row.min(1) for row in self.shares), np.zeros(len(self.fixed)))
        return found

    def at(self, prices: Floats) -> tuple[float, Floats]:
        """Return the highest score less the price of its shares, and these shares, (limits,)."""
        score, taken = 0.0, self.fixed.copy()
        for row, shares in zip(self.scores, self.shares, strict=True):
            place = int(np.argmax(row - prices @ shares))
            score += float(row[place])
            taken += shares[:, place]
        return score - float(prices @ taken), taken


class _Chain:
    """The layouts of one resolution, as a chain of stages whose parts depend on two widths each."""

    def __init__(
        self, family: SpaceFamily, scores: FamilyScores, limits_of: LimitsOf, resolution_px: int
    ) -> None:
        self.family, self.scores, self.limits_of = family, scores, limits_of
        self.resolution_px = resolution_px
        self.widths = family.widths
        self.parts: list[dict[tuple[int, int], _Part]] = [{} for _ in self.widths]
        self.ends: dict[int, Floats] = {}  # by the last width: the shares of the head
        self.start = np.zeros(0)  # shares of what comes before the first stage
        self.known: dict[Layout, tuple[SearchSpace, Limits]] = {}
        for layout in family.covering():
            if layout.resolution_px == resolution_px:
                self._read(layout)
        spans = [float(np.ptp(row)) for part in self._all_parts() for row in part.scores]
        self.range = max(spans, default=0.0) * max(1, sum(len(p.scores) for p in self._last_layout()))
        self.tolerance = TOLERANCE * self.range
        self.dearest = MOST_PRICE * max([*spans, 1e-9])

    def _all_parts(self) -> Iterator[_Part]:
        return (part for row in self.parts for part in row.values())

    def _last_layout(self) -> list[_Part]:
        return self.of(self.family.largest_layout.channels)

    def _read(self, layout: Layout) -> None:
        """Take the parts of a layout that are not known yet from its limits and its scores."""
        space = self.family.at(layout)
        limits, scores = self.limits_of(space), self.scores.candidates(space)
        if all(len(row) == 1 for row in self.widths):
            self.known[layout] = space, limits
        fixed = [_fixed_by_stage(limit, len(self.widths)) for limit in limits]
        self.start = np.array([before for before, _, _ in fixed])
        self.ends[layout.channels[-1]] = np.array([after for _, _, after in fixed])
        for s, pair in enumerate(_pairs(layout.channels)):
            if pair in self.parts[s]:
                continue
            places = [i for i, position in enumerate(space.positions) if position.stage == s]
            self.parts[s][pair] = _Part(
                tuple(np.asarray(scores[i], dtype=np.float64) for i in places),
                tuple(np.array([np.asarray(each.cells[i]) / each.limit for each in limits]) for i in places),
                np.array([of_stages[s] for _, of_stages, _ in fixed]),
            )

    def of(self, channels: tuple[int, ...]) -> list[_Part]:
        """Return the parts of a layout."""
        return [row[pair] for row, pair in zip(self.parts, _pairs(channels), strict=True)]

    def _constant(self, stage: int, width: int) -> float:
        row = self.scores.widths[stage] if stage < len(self.scores.widths) else {}
        return row.get(width, 0.0)

    # ---- the best layouts at a price

    def _values(self, prices: Floats) -> list[dict[tuple[int, int], tuple[float, Floats]]]:
        """Return what each stage adds to a bound, and the shares that it takes, by its two widths."""
        found = []
        for s, row in enumerate(self.parts):
            values = {}
            for pair, part in row.items():
                value, taken = part.at(prices)
                values[pair] = value + self._constant(s, pair[1]), taken
            found.append(values)
        return found

    def _ahead(
        self, values: list[dict[tuple[int, int], float]], ends: Mapping[int, float]
    ) -> list[dict[int, float]]:
        """Return the most that the stages from s on can add, by s and the width before it."""
        ahead = [dict(ends)]
        for row in reversed(values):
            best: dict[int, float] = {}
            for (before, width), value in row.items():
                best[before] = max(best.get(before, -math.inf), value + ahead[0][width])
            ahead.insert(0, best)
        return ahead

    def _bound_at(self, prices: Floats) -> tuple[float, Floats]:
        """Return the bound of the best layout at these prices, and the shares that it takes, (limits,)."""
        values = self._values(prices)
        plain = [{pair: value for pair, (value, _) in row.items()} for row in values]
        ends = {width: -float(prices @ shares) for width, shares in self.ends.items()}
        ahead = self._ahead(plain, ends)
        taken, before = self.start.copy(), 0
        for s, row in enumerate(plain):
            options = [
                (value + ahead[s + 1][pair[1]], pair) for pair, value in row.items() if pair[0] == before
            ]
            pair = max(options)[1]
            taken = taken + values[s][pair][1]
            before = pair[1]
        taken = taken + self.ends[before]
        constant = self.scores.resolutions.get(self.resolution_px, 0.0)
        return constant + float(prices.sum()) - float(prices @ self.start) + ahead[0][0], taken

    @cached_property
    def prices(self) -> Floats:
        """The prices of the whole limits, (limits,), at which the best layout is bounded lowest, about."""
        count = len(self.start)
        prices, cuts, rights, lowest = np.zeros(count), [], [], (math.inf, np.zeros(count))
        for _ in range(MOST_CUTS):
            bound, taken = self._bound_at(prices)
            if bound < lowest[0]:
                lowest = bound, prices
            slope = 1.0 - taken  # of the bound, which is convex in the prices
            if (slope >= 0).all() and not prices.any():
                break  # no limit binds
            cuts.append([*slope, -1.0])
            rights.append(float(slope @ prices) - bound)
            best = linprog(
                [*np.zeros(count), 1.0],
                A_ub=np.array(cuts),
                b_ub=np.array(rights),
                bounds=[*[(0.0, self.dearest)] * count, (None, None)],
            )
            if best.status != 0 or lowest[0] - best.fun <= GAP * self.range:
                break
            prices = np.asarray(best.x[:-1], dtype=np.float64)
        return lowest[1]

    def layouts(self) -> Iterator[tuple[float, Layout]]:
        """Yield the layouts by falling bound; those whose least amounts exceed a limit are left out."""
        prices = self.prices
        values = [{pair: v for pair, (v, _) in row.items()} for row in self._values(prices)]
        ahead = self._ahead(values, {w: -float(prices @ shares) for w, shares in self.ends.items()})
        least = [
            self._ahead(
                [{pair: -float(part.least[at]) for pair, part in row.items()} for row in self.parts],
                {w: -float(shares[at]) for w, shares in self.ends.items()},
            )
            for at in range(len(self.start))
        ]
        start = (
            self.scores.resolutions.get(self.resolution_px, 0.0)
            + float(prices.sum())
            - float(prices @ self.start)
        )
        queue: list[tuple[float, tuple[int, ...], float, Floats]] = [
            (-(start + ahead[0][0]), (), start, self.start)
        ]
        while queue:
            negative, channels, value, taken = heapq.heappop(queue)
            s = len(channels)
            if s == len(self.widths):
                yield -negative + self.tolerance, Layout(self.resolution_px, channels)
                continue
            before = channels[-1] if channels else 0
            for width in self.widths[s]:
                part = self.parts[s][before, width]
                now, amounts = value + values[s][before, width], taken + part.least
                rest = np.array([-of_limit[s + 1][width] for of_limit in least])
                if (amounts + rest <= 1.0 + SUM).all():
                    entry = (-(now + ahead[s + 1][width]), (*channels, width), now, amounts)
                    heapq.heappush(queue, entry)

    # ---- one layout

    def own_bound(self, layout: Layout) -> float:
        """Return a bound on the scores of one layout's networks; -inf where none is within all limits."""
        parts = self.of(layout.channels)
        rows = [row.tolist() for part in parts for row in part.scores]
        fixed = self.start + sum((part.fixed for part in parts), np.zeros(len(self.start)))
        fixed = fixed + self.ends[layout.channels[-1]]
        shares = [of_position for part in parts for of_position in part.shares]
        # looser by what sums of shares may lose in rounding
        limits = tuple(
            Limit(str(at), 1.0, 1.0 + SUM, float(fixed[at]), tuple(tuple(row[at].tolist()) for row in shares))
            for at in range(len(fixed))
        )
        return self.scores.constant(layout) + upper_bound(rows, limits)

    def solve(self, layout: Layout, k: int, floor: float) -> tuple[Solution, ...]:
        """Return the k best networks of one layout that score `floor` at least, perhaps none."""
        if layout in self.known:
            space, limits = self.known[layout]
        else:
            space = self.family.at(layout)
            limits = self.limits_of(space)
        self._check_sums(layout, limits)
        try:
            return solve_best(space, self.scores.candidates(space), limits, k, floor=floor)
        except InfeasibleBudgetError:
            return ()

    def _check_sums(self, layout: Layout, limits: Limits) -> None:
        """Raise TableError where the amounts of a layout are not the sums that bounded it."""
        parts = self.of(layout.channels)
        least = self.start + self.ends[layout.channels[-1]]
        least = least + sum((part.least for part in parts), np.zeros(len(self.start)))
        for limit, share in zip(limits, least.tolist(), strict=True):
            if not math.isclose(limit.least / limit.limit, share, rel_tol=SUM, abs_tol=SUM):
                raise TableError(
                    f"{limit.name}: {self.family.name_of(layout)} takes {limit.least:g} at least, but "
                    f"{share * limit.limit:g} by the stages of other layouts: expected sums over blocks"
                )

    @cached_property
    def least_layout(self) -> tuple[float, Layout]:
        """The layout whose smallest amounts exceed their limits least, about, and by how much of them."""
        found = []
        for at in range(len(self.start)):
            values = [{pair: -float(part.least[at]) for pair, part in row.items()} for row in self.parts]
            ahead = self._ahead(values, {w: -float(shares[at]) for w, shares in self.ends.items()})
            channels: tuple[int, ...] = ()
            for s, row in enumerate(values):
                before = channels[-1] if channels else 0
                channels += (max(self.widths[s], key=lambda w: row[before, w] + ahead[s + 1][w]),)
            found.append((float(self.start[at]) - ahead[0][0], Layout(self.resolution_px, channels)))
        return max(found, key=lambda each: each[0])


def _pairs(channels: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return each stage's width with the one before it; before the first stage there is none: 0."""
    return list(zip((0, *channels), channels, strict=False))


def _fixed_by_stage(limit: Limit, stages: int) -> tuple[float, list[float], float]:
    """Return the shares of a limit that are fixed: before the first stage, of each stage, and of the head."""
    if not limit.fixed_parts:
        return limit.fixed / limit.limit, [0.0] * stages, 0.0
    before, of_stages, after = 0.0, [0.0] * stages, 0.0
    for name, amount in limit.fixed_parts:
        number = name.partition(".")[0]
        if number.isdecimal():
            of_stages[int(number) - 1] += amount / limit.limit
        elif name == HEAD:
            after += amount / limit.limit
        else:
            before += amount / limit.limit
    return before, of_stages, after


# ---- the layouts of a search


@dataclass(frozen=True)
class Within:
    """A layout with the space at it, and the limits on its networks, which some of them are within."""

    layout: Layout
    space: SearchSpace
    limits: Limits


def layouts_within(family: SpaceFamily, limits_of: LimitsOf) -> tuple[Within, ...]:
    """Return the layouts that have networks within all limits, in order.

    Each is solved for. Raises InfeasibleBudgetError where there is none, SpaceError where there are too many
    to solve for.
    """
    if len(family) > MOST_LAYOUTS:
        counts = [len(family.resolutions_px), *map(len, family.widths)]
        product = " x ".join(str(count) for count in counts if count > 1)
        raise SpaceError(
            f"{family.name}: {product} = {len(family):,} resolutions and widths: a search takes at most "
            f"{MOST_LAYOUTS}: leave some out"
        )
    every = [Within(layout, space := family.at(layout), limits_of(space)) for layout in family.layouts()]
    found = []
    for each in every:
        try:
            check_feasible(each.limits)
        except InfeasibleBudgetError:
            continue
        found.append(each)
    if not found:
        # the reason, by the layout that is nearest
        nearest = min(every, key=lambda each: max(limit.least / limit.limit for limit in each.limits))
        try:
            check_feasible(nearest.limits)
        except InfeasibleBudgetError as error:
            raise InfeasibleBudgetError(f"{error}{_of_all(family)}") from error
    return tuple(found)


def mean_limits(limits: Sequence[Limits]) -> Limits:
    """Return limits on the mean amounts of networks of the same choices, one in each of some layouts.

    The amounts are those of a network whose layout is drawn. The tables are those of the last ones, for
    their names and units alone.
    """
    found = []
    for same in zip(*limits, strict=True):
        rows = zip(*(limit.cells for limit in same), strict=True)
        cells = tuple(tuple(map(_mean, zip(*of_position, strict=True))) for of_position in rows)
        found.append(
            replace(same[-1], fixed=_mean([limit.fixed for limit in same]), cells=cells, fixed_parts=())
        )
    return tuple(found)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
