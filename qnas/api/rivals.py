"""The public networks that one could take instead of a search, from Python."""

from qnas.api.limits import AskedLimits, Budgets
from qnas.common.units import parse_energy
from qnas.latency.rivals import Rivals, find_rivals


def rivals(
    budgets: Budgets,
    *,
    max_params: str | int | None = None,
    max_macs: str | int | None = None,
    max_energy: str | None = None,
    confidence: float | None = None,
) -> Rivals:
    """Return the public convolutional networks within latency budgets on devices, the best first.

    `budgets` maps devices to latencies with units, such as `{"vpu": "30ms"}`; a network has to meet all of
    them. Of 842 networks of timm, each at a resolution, the result has those within the limits: the Pareto
    front of ImageNet top-1 and latency first (`on_front`). Operators that a device does not know are priced
    as by `predict`, and counted. The accuracy is on ImageNet: it says nothing of accuracies on other data.
    `max_energy` ("30mJ") and `confidence` (0.9) mean what they do in `run_search`; a network with an operator
    whose energy the device's file does not state is not within a `max_energy`.

    Raises TableError if a device is unknown, has only tables, or has no intervals for a `confidence`,
    UsageError for an invalid limit, and InfeasibleBudgetError if no network is within the limits, with what
    the smallest take.

    >>> found = rivals({"cpu": "60ms"})
    >>> found.networks[0].on_front, len(found.networks) <= found.known
    (True, True)
    """
    asked = AskedLimits.of(budgets, max_params, max_macs, max_energy=max_energy, confidence=confidence)
    most = asked.most
    return find_rivals(
        list(zip(asked.known, asked.budgets_ms, strict=True)),
        max_params=most.get("params"),
        max_macs=most.get("macs"),
        max_mj=parse_energy(asked.energy) if asked.energy is not None else None,
        confidence=asked.confidence,
    )
