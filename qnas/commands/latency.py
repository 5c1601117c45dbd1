"""What is known of networks and devices: `describe`, `predict`, `devices`, `table`."""

import json
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer

from qnas.commands.options import Force, Json, Space, find_network, print_json
from qnas.errors import CheckpointError


def describe(
    target: Annotated[
        str, typer.Argument(metavar="SPACE|ARCH", help="A space, a run's folder or an arch.json.")
    ],
    space: Space = None,
    as_json: Json = False,
) -> None:
    """Print MACs and parameters with the tree of stages.

    Example: qnas describe quadranet36-t
    """
    from qnas.lower import lower
    from qnas.text import describe_network, describe_space, network_facts, space_facts

    found, arch = find_network(target, space)
    if arch is None:
        if as_json:
            print_json(space_facts(found))
        else:
            typer.echo(describe_space(found))
        return
    blocks = lower(found, arch)
    if as_json:
        print_json(network_facts(found, blocks))
    else:
        typer.echo(describe_network(found, blocks))


def predict(
    target: Annotated[
        str, typer.Argument(metavar="ARCH|SPACE", help="A run's folder, an arch.json or a fixed space.")
    ],
    device: Annotated[str, typer.Option(help="A device, or all.")] = "all",
    space: Space = None,
    as_json: Json = False,
) -> None:
    """Predict a network's latency on the known devices.

    Example: qnas predict runs/quadranet-mobile-vpu-30ms --device all
    """
    from qnas.errors import ArchError
    from qnas.latency.device import device_names, load_device
    from qnas.latency.table import load_table
    from qnas.text import table_rows
    from qnas.units import format_ms

    found, arch = find_network(target, space)
    if arch is None:
        raise ArchError(f"space {found.name} has many networks: give a run's folder or an arch.json")
    indices = arch.indices(found)
    rows = []
    for name in device_names() if device == "all" else [device]:
        table = load_table(load_device(name), found)
        rows.append((table.device, table.latency_ms(indices), table.coverage(indices)))
    if as_json:
        print_json(
            [{"device": name, "latency_ms": latency, "coverage": share} for name, latency, share in rows]
        )
        return
    typer.echo(f"{found.name} at {found.input.resolution_px} px, one image")
    typer.echo(
        table_rows(
            ("device", "latency", "from measurements"),
            [(name, format_ms(latency), f"{share:.0%}") for name, latency, share in rows],
        )
    )


def devices(as_json: Json = False) -> None:
    """List the devices whose latencies are known, and how well.

    Example: qnas devices
    """
    from qnas.latency.device import device_names, load_device

    known = [load_device(name) for name in device_names()]
    if as_json:
        print_json([json.loads(device.to_json()) for device in known])
        return
    blocks = []
    for device in known:
        facts = [
            f"{device.kind}, {device.runtime}, {device.precision}, batch {device.batch}, {device.date}",
            f"source: {device.source}",
        ]
        for held_out, figures in device.accuracy.items():
            shares = [f"{group} {figure.within_10_pct:.1f}%" for group, figure in figures.items()]
            if "all" in figures:
                shares = [f"{figures['all'].within_10_pct:.1f}% of {figures['all'].n}"]
            facts.append(f"{held_out} within 10%: {', '.join(shares)}")
        lines = wrap(f"{device.name} ({', '.join(device.aliases)}): {device.title}", 80)
        for fact in facts:
            lines += wrap(fact, 80, initial_indent="  ", subsequent_indent="    ")
        blocks.append("\n".join(lines))
    typer.echo("\n\n".join(blocks))


def table(
    space: Annotated[str, typer.Argument(help="A space by name or path.")],
    device: Annotated[str, typer.Option(help="A device by name, alias or path.")],
    out: Annotated[Path | None, typer.Option(help="A file. Default: print it.", show_default=False)] = None,
    force: Force = False,
) -> None:
    """Print the latency table of a space on a device as CSV: the form of a table of one's own.

    Example: qnas table quadranet-small --device cpu
    """
    from qnas.files import write_text
    from qnas.latency.device import load_device
    from qnas.latency.table import load_table, table_text
    from qnas.space import load_space

    found = load_space(space)
    text = table_text(load_table(load_device(device), found), found)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists() and not force:
        raise CheckpointError(f"{out}: exists already: give --force to replace it")
    write_text(out, text)
