"""The public networks that one could take instead of a search, from Python."""

from qnas.api.limits import AskedLimits, Budgets
from qnas.latency.rivals import Rivals, find_rivals


def rivals(
    budgets: Budgets, *, max_params: str | int | None = None, max_macs: str | int | None = None
) -> Rivals:
    """Return the public convolutional networks within latency budgets on devices, the best first.

    `budgets` maps devices to latencies with units, such as `{"vpu": "30ms"}`; a network has to meet all of
    them. Of 842 networks of timm, each at a resolution, the result has those within the limits: the Pareto
    front of ImageNet top-1 and latency first (`on_front`). Operators that a device does not know are priced
    as by `predict`, and counted. The accuracy is on ImageNet: it says nothing of accuracies on other data.

    Raises TableError if a device is unknown or has only tables, UsageError for an invalid limit, and
    InfeasibleBudgetError if no network is within the limits, with what the smallest take.

    >>> found = rivals({"cpu": "60ms"})
    >>> found.networks[0].on_front, len(found.networks) <= found.known
    (True, True)
    """
    asked = AskedLimits.of(budgets, max_params, max_macs)
    most = asked.most
    return find_rivals(
        list(zip(asked.known, asked.budgets_ms, strict=True)),
        max_params=most.get("params"),
        max_macs=most.get("macs"),
    )
