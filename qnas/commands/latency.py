"""Commands about networks and devices: `describe`, `predict`, `devices`, `table`, `eval-latency`."""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from qnas.commands import completion
from qnas.commands.options import Device, Force, Json, Latency, Space, argument, option, show
from qnas.common.errors import CheckpointError, TableError
from qnas.common.files import write_text
from qnas.runs.text import columns, wrapped

if TYPE_CHECKING:
    from qnas.latency.device import Device as KnownDevice
    from qnas.latency.intervals import Uncertainty

DEAREST = 5  # parts of a network that predict shows


def describe(
    target: Annotated[
        str, argument("A space, a run's folder or an arch.json.", "SPACE|ARCH", completion.networks)
    ],
    space: Space = None,
    as_json: Json = False,
) -> None:
    """Print MACs and parameters with the tree of stages.

    Example: qnas describe quadranet36-t
    """
    from qnas.runs.family_text import describe_family, family_facts
    from qnas.runs.found_arch import family_of_file, find_network
    from qnas.runs.network_text import describe_network, describe_space, network_facts, space_facts
    from qnas.spaces.lower import lower

    if (family := family_of_file(target)) is not None:
        show(family_facts(family), (describe_family(family),), as_json=as_json)
        return
    found, arch = find_network(target, space)
    if arch is None:
        show(space_facts(found), (describe_space(found),), as_json=as_json)
    else:
        blocks = lower(found, arch)
        show(network_facts(found, blocks), (describe_network(found, blocks),), as_json=as_json)


def predict(
    target: Annotated[
        str,
        argument(
            "A run's folder, an arch.json, a file (.onnx, .xml, .tflite, .pt2), a fixed space, or a public "
            "model: timm:NAME, torchvision:NAME.",
            "ARCH|FILE|SPACE|MODEL",
            completion.predictable,
        ),
    ],
    device: Annotated[
        str, option("A device by name, alias or path, or all.", complete=completion.devices_or_all)
    ] = "all",
    latency: Latency = "device",
    space: Space = None,
    resolution: Annotated[
        int | None,
        option("Input size in pixels, for a file without one. Default of a public model: its own.", least=1),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict a network's latency on the known devices, and list its slowest parts.

    Example: qnas predict runs/union-mobile-vpu-30ms --device all
    """
    from qnas.api.predicting import read_any
    from qnas.latency.device import device_names, load_device
    from qnas.latency.onnx.networks import OnnxNetwork
    from qnas.latency.prediction import can_predict, check_source
    from qnas.runs.latency_text import describe_predictions
    from qnas.runs.network_prediction import predict_network

    chosen = [load_device(name) for name in (device_names() if device == "all" else [device])]
    if device == "all":
        check_source(latency)
        chosen = [known for known in chosen if can_predict(latency, known)]
        if not chosen:
            raise TableError(
                "no nn-Meter predictors are imported: qnas predictors list says what to download"
            )
    network = read_any(target, space=space, resolution_px=resolution)
    if isinstance(network, OnnxNetwork):
        title = f"{target} at {network.height_px} x {network.width_px} px"
    else:
        title = f"{network[0].name} at {network[0].input.resolution_px} px"
    predictions = [predict_network(network, known, latency=latency) for known in chosen]
    lines = (wrapped(f"{title}, one image"), describe_predictions(predictions, DEAREST))
    show([prediction.facts(DEAREST) for prediction in predictions], lines, as_json=as_json)


def devices(
    files: Annotated[list[Path] | None, argument("Your own device files, listed too.")] = None,
    as_json: Json = False,
) -> None:
    """List the devices whose latencies are known, and the accuracy of their models.

    Example: qnas devices
    """
    from qnas.latency.device import device_names, load_device

    known = [load_device(name) for name in (*device_names(), *map(str, files or ()))]
    lines = ("\n\n".join("\n".join(_device_lines(device)) for device in known),)
    show([json.loads(device.to_json()) for device in known], lines, as_json=as_json)


def _device_lines(device: "KnownDevice") -> Iterator[str]:
    aliases = f" ({', '.join(device.aliases)})" if device.aliases else ""
    yield from wrap(f"{device.name}{aliases}: {device.title}", columns())
    batch = f"ms {device.per_image}" if device.per_image else f"batch {device.batch}"
    facts = [
        f"{device.kind}, {device.runtime}, {device.precision}, {batch}, {device.date}",
        f"source: {device.source}",
    ]
    for held_out, figures in device.accuracy.items():
        # families of networks that are far from all others are given within 15%
        wide = {group: f.within_15_pct for group, f in figures.items() if f.within_15_pct is not None}
        within = wide or {group: f.within_10_pct for group, f in figures.items()}
        shares = [f"{group} {share:.1f}%" for group, share in within.items()]
        if "all" in figures:
            shares = [f"{within['all']:.1f}% of {figures['all'].n}"]
        facts.append(f"{held_out} within {15 if wide else 10}%: {', '.join(shares)}")
    if (c := device.calibration) is not None:
        facts.append(
            f"calibrated on {c.n} networks, {c.date}: {c.scale:.3f} times the model "
            f"{c.offset_ms:+.3g} ms, margin {c.margin:.1%} for {c.level:.0%} of networks"
        )
    facts.append(_interval_line(device.known_uncertainty))
    for fact in facts:
        yield from wrap(fact, columns(), initial_indent="  ", subsequent_indent="    ")


def _interval_line(known: "Uncertainty | None") -> str:
    """Describe the errors between which measurements of new networks stay."""
    if known is None:
        return "interval unknown"
    each = (f"{100 * e.level:g}% {e.low:+.1%} to {e.high:+.1%}" for e in known.errors)
    by = f"{known.families} families left out" if known.families else f"{known.networks} networks"
    wider = f", {known.weight:g} times as wide for estimated parts" if known.weight > 1 else ""
    return f"interval: {', '.join(each)} of the prediction, by {by}{wider}"


def eval_latency(
    file: Annotated[
        Path, argument("Measured networks, in the format of docs/reference/files.md#measured-networks.")
    ],
    device: Device,
    as_json: Json = False,
) -> None:
    """Compare a device's predictions with measured networks, by family and in all.

    Example: qnas eval-latency measured.npz --device vpu
    """
    from qnas.latency.device import load_device
    from qnas.latency.evaluation import evaluate_networks, read_networks
    from qnas.runs.latency_text import describe_figures, figures_facts

    known = load_device(device)
    figures = evaluate_networks(known, read_networks(file))
    families = {name: figures_facts(f) for name, f in figures.items() if name != "all"}
    content = {"device": known.name, "all": figures_facts(figures["all"]), "families": families}
    title = f"{known.name}: predictions against {figures['all'].n} measured networks"
    show(content, (wrapped(title), describe_figures(figures)), as_json=as_json)


def table(
    space: Annotated[str, argument("A space by name or path.", complete=completion.spaces)],
    device: Device,
    out: Annotated[Path | None, option("A file. Default: print it.")] = None,
    force: Force = False,
) -> None:
    """Print the latency table of a space on a device as CSV, the format of measured tables.

    Example: qnas table quadranet-small --device cpu
    """
    from qnas.latency.device import load_device
    from qnas.latency.device_table import load_table
    from qnas.latency.table import table_text
    from qnas.spaces.space import load_space

    found = load_space(space)
    text = table_text(load_table(load_device(device), found), found)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists() and not force:
        raise CheckpointError(f"{out}: exists already: give --force to replace it")
    write_text(out, text)
