"""`qnas rivals`: the public networks that one could take instead of a search."""

from typing import Annotated

import typer

from qnas.commands import options
from qnas.commands.options import OUTPUT, option, show
from qnas.common.errors import UsageError

TOP = 20  # networks that are printed as text


def rivals(
    device: options.Devices = None,
    budget: options.Budgets = None,
    max_params: options.MaxParams = None,
    max_macs: options.MaxMacs = None,
    max_energy: options.MaxEnergy = None,
    confidence: options.Confidence = None,
    top: Annotated[
        int | None,
        option("Networks shown.  [default: 20; all as JSON or CSV]", panel=OUTPUT, least=1),
    ] = None,
    as_csv: Annotated[
        bool, option("Print CSV instead of text, a line per network and device.", "--csv", panel=OUTPUT)
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the public networks within a budget, with their ImageNet accuracy: what to pick instead.

    842 convolutional networks of timm are priced on the device, yours too. The Pareto front of accuracy and
    latency comes first, marked *.

    Example: qnas rivals --device vpu --budget 30ms
    """
    from qnas.api.rivals import rivals as find
    from qnas.runs.rivals_text import describe_rivals

    if as_csv and as_json:
        raise UsageError("--csv and --json: give one of them")
    found = find(
        options.pair_budgets(device, budget),
        max_params=max_params,
        max_macs=max_macs,
        max_energy=max_energy,
        confidence=confidence,
    )
    if as_csv:
        typer.echo(found.csv(top), nl=False)
        return
    show(found.facts(top), (describe_rivals(found, top or TOP),), as_json=as_json)
