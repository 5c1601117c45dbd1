"""The command line: parse, call, print. Heavy imports are inside the commands.

Exit codes: 0 done, 1 what the user can mend (one line on stderr), 2 usage, 130 interrupted with the
state saved.
"""

import json
import platform
import sys
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from qnas import __version__
from qnas.errors import CheckpointError, Interrupted, QnasError, UsageError

if TYPE_CHECKING:
    from qnas.arch import Arch
    from qnas.search import SearchResult
    from qnas.space import SearchSpace

app = typer.Typer(
    name="qnas",
    help="Search for an image network inside a latency budget, train it, export it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what a former run wrote.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, fashion-mnist:DIR, cifar10:DIR or imagefolder:DIR. Default: digits for a search, "
        "else what the run was searched on.",
        show_default=False,
    ),
]
Space = Annotated[
    str | None,
    typer.Option(help="A shipped space by name, or the path of your own YAML.", show_default=False),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random. One seed, one result.")]
Epochs = Annotated[int | None, typer.Option(min=1, show_default=False)]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images a step.", show_default=False)]
Threads = Annotated[
    int | None, typer.Option(min=0, help="Of torch; 0 takes all cores.  [default: 1 for digits, else 0]")
]
Resolution = Annotated[
    int | None, typer.Option(min=1, help="Height and width in pixels while training.", show_default=False)
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qnas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def search(
    device: Annotated[
        str | None,
        typer.Option(help="A device by name or alias (qnas devices), or the path of your own device file."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="The latency that the network may take, with its unit: 30ms, 800us.")
    ] = None,
    space: Space = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one in runs/.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.  [default: 0]")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of searching, after the warm-up.", show_default=False)
    ] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs of weights alone, before it.", show_default=False)
    ] = None,
    batch_size: BatchSize = None,
    resolution: Resolution = None,
    latency_loss: Annotated[
        str | None, typer.Option(help="multiplier, add-linear or mul-log.  [default: multiplier]")
    ] = None,
    random_networks: Annotated[
        int | None, typer.Option(min=0, help="Random networks of equal latency to compare with.")
    ] = None,
    threads: Threads = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the best network of a space within a latency budget.

    Example: qnas search --device vpu --budget 30ms
    """
    asked = {"device": device, "budget": budget, "space": space, "data": data}
    config = {
        "seed": seed,
        "search_epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "batch_size": batch_size,
        "resolution_px": resolution,
        "latency_loss": latency_loss,
        "random_networks": random_networks,
        "threads": threads,
    }
    former = _former_request(out) if resume else {}
    for key, default in (("space", "quadranet-mobile"), ("data", "digits")):
        asked[key] = asked[key] or former.get(key, default)
    for key, example in (("device", "--device vpu"), ("budget", "--budget 30ms")):
        asked[key] = asked[key] or former.get(key)
        if asked[key] is None:
            raise typer.BadParameter(f"missing, for instance {example}", param_hint=f"--{key}")
    if former:
        config = {key: former["search"][key] if value is None else value for key, value in config.items()}
    result = _search(asked, config, out, resume=resume, force=force, quiet=quiet, announce=not as_json)
    _print_search(result, as_json=as_json)


def _former_request(out: Path | None) -> dict[str, Any]:
    from qnas.run import read_config

    if out is None:
        raise UsageError("--resume needs --out: the folder of the run to go on with")
    request = read_config(out)
    if "search" not in request:
        raise CheckpointError(f"{out}: this run is not a search")
    return request


def _search(
    asked: dict[str, Any],
    changes: dict[str, Any],
    out: Path | None,
    *,
    resume: bool,
    force: bool,
    quiet: bool,
    announce: bool,
) -> "SearchResult":
    from qnas.latency.device import load_device
    from qnas.latency.table import load_table
    from qnas.space import load_space
    from qnas.units import format_ms, parse_latency

    budget_ms = parse_latency(asked["budget"])
    space = load_space(asked["space"])
    device = load_device(asked["device"])
    table = load_table(device, space)

    # torch takes seconds to import: what can be refused is refused before
    from qnas.data import load_data
    from qnas.lower import check_resolution
    from qnas.originals import parse_data_spec
    from qnas.search import Searcher, check_searchable, preset_for, run_search
    from qnas.train import set_up_process

    check_searchable(space, table, budget_ms)
    spec = parse_data_spec(asked["data"])
    config = preset_for(spec.kind, **changes)
    check_resolution(space, config.resolution_px)
    set_up_process(config.threads)
    data = load_data(spec, resolution_px=config.resolution_px, channels=space.input.channels, quiet=quiet)
    searcher = Searcher(space, table, budget_ms, data, config)
    folder = out or _free_folder(
        space.name, device.aliases[0] if device.aliases else device.name, asked["budget"]
    )
    if announce:
        counts = ", ".join(f"{count} {name}" for name, count in data.counts.items())
        typer.echo(
            f"{space.name} on {device.name} within {format_ms(budget_ms)}: "
            f"networks take {format_ms(table.fastest_ms)} to {format_ms(table.slowest_ms)}"
        )
        typer.echo(f"{data.name} at {config.resolution_px} px: {counts} images; run in {folder}")
        if not searcher.binds:
            typer.echo("the budget does not bind: the slowest network of the space is within it")
    request = {
        "command": "search",
        "device": asked["device"],
        "budget": asked["budget"],
        "budget_ms": budget_ms,
        "space": asked["space"],
        "space_digest": space.digest,
        "table_digest": table.digest,
        "data": str(spec),
        "data_digest": data.digest,
        "versions": versions(),
    }
    return run_search(searcher, folder, request, resume=resume, force=force, quiet=quiet)


def _free_folder(*parts: str) -> Path:
    from qnas.run import free_folder

    return free_folder("-".join(part.replace(" ", "") for part in parts))


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import numpy
    import scipy
    import torch

    return {
        "qnas": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }


def _print_search(result: "SearchResult", *, as_json: bool) -> None:
    from qnas import run
    from qnas.text import (
        choices_by_stage,
        field,
        files_in,
        format_count,
        latency_line,
        mean_and_spread,
    )
    from qnas.units import format_ms

    searcher, derived, folder = result.searcher, result.derived, result.folder
    document = json.loads((folder / run.ARCH).read_text(encoding="utf-8"))
    rivals = [score.accuracy for score in result.random]
    if as_json:
        _print_json({"run": str(folder), **document, "random_accuracies": rivals})
        return
    indices = result.solution.indices
    lowest = format_ms(min((score.latency_ms for score in result.random), default=0.0))
    expected = format_ms(result.expected_ms)
    compared = (
        f"{mean_and_spread(rivals)} for {len(rivals)} random networks of {lowest} or more, "
        f"best {max(rivals):.1%}"
        if rivals
        else "no random networks to compare with"
    )
    lines = [
        "",
        choices_by_stage(searcher.space, derived.arch),
        "",
        field("latency", latency_line(searcher.table, indices, searcher.budget_ms)),
        field("", f"expected of the architecture parameters: {expected}"),
        field(
            "size",
            f"{format_count(document['macs'])} MACs, {format_count(document['params'])} parameters, "
            f"at {searcher.space.input.resolution_px} px",
        ),
        field(
            "accuracy",
            f"{derived.accuracy:.1%} on {len(searcher.data.test)} test images, with supernet weights",
        ),
        field("", compared),
        field("files", files_in(folder)),
        f"next        qnas train-subnet {folder}",  # not wrapped: to be copied
    ]
    typer.echo("\n".join(lines))


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


@app.command("train-subnet")
def train_subnet(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|ARCH]",
            help="A run's folder or an arch.json. Default: the latest run.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    space: Space = None,
    weights: Annotated[
        str | None,
        typer.Option(help="supernet or scratch.  [default: supernet for a run, scratch for an arch.json]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Default: RUN/subnet, or for an arch.json a new folder in runs/.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    resolution: Resolution = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    threads: Threads = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a derived network, from the supernet's weights or from scratch.

    Example: qnas train-subnet runs/quadranet-mobile-vpu-30ms
    """
    from qnas import run
    from qnas.arch import find_arch
    from qnas.data import load_data
    from qnas.lower import check_resolution
    from qnas.originals import parse_data_spec
    from qnas.text import field, files_in
    from qnas.train import set_up_process
    from qnas.train_subnet import has_supernet, recipe_for
    from qnas.train_subnet import train_subnet as train

    found = find_arch(source or run.latest_run(), space)
    searched = has_supernet(found)
    if weights not in (None, "supernet", "scratch"):
        raise UsageError(f"--weights {weights!r}: expected supernet or scratch")
    if weights == "supernet" and not searched:
        raise UsageError(f"--weights supernet: no {run.SUPERNET} in {found.folder}, name a run's folder")
    from_supernet = searched and weights != "scratch"
    former = run.read_config(found.folder) if searched else {}
    spec = parse_data_spec(data or former.get("data", "digits"))
    config = recipe_for(
        spec.kind,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        resolution_px=resolution,
        learning_rate=learning_rate,
        threads=threads,
    )
    check_resolution(found.space, config.resolution_px)
    set_up_process(config.threads)
    if out is None:
        out = found.folder / run.SUBNET if searched else _free_folder(found.space.name, "subnet")
    images = load_data(
        spec, resolution_px=config.resolution_px, channels=found.space.input.channels, quiet=quiet
    )
    score = train(
        found,
        images,
        config,
        out,
        {
            "command": "train-subnet",
            "choices": list(found.arch.choices),
            "space_digest": found.space.digest,
            "data": str(spec),
            "data_digest": images.digest,
            "versions": versions(),
        },
        from_supernet=from_supernet,
        resume=resume,
        force=force,
        quiet=quiet,
    )
    if as_json:
        _print_json({"folder": str(out), "test_accuracy": score.accuracy, "test_images": score.images})
        return
    start = "the supernet's weights" if from_supernet else "scratch"
    target = found.folder if out == found.folder / run.SUBNET else out
    learned = f"{score.accuracy:.2%} on {score.images} test images, after {config.epochs} epochs from {start}"
    lines = [
        "",
        field("accuracy", learned),
        field("files", files_in(out)),
        f"next        qnas export {target}",
    ]
    typer.echo("\n".join(lines))


@app.command()
def export(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run whose network is trained, or a trained network's folder. Default: the latest run.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: export/model.onnx in the run.", show_default=False)
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Input size in pixels. Default: that of training.", show_default=False),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a trained network as ONNX, and check the file against torch.

    Example: qnas export runs/quadranet-mobile-vpu-30ms
    """
    from qnas import run
    from qnas.deploy import export_trained
    from qnas.text import field
    from qnas.units import format_ms

    report = export_trained(source or run.latest_run(), out, resolution_px=resolution, force=force)
    if as_json:
        _print_json(report.facts())
        return
    file, px = report.file, report.resolution_px
    difference = f"{file.max_difference / file.scale:.1e} of the output's scale"
    lines = [
        field("file", f"{file.path} ({file.size_bytes / 1e6:.1f} MB, opset {file.opset})"),
        field(
            "input", f"images (batch, {report.channels}, {px}, {px}), float32, normalised as its metadata say"
        ),
        field("check", f"onnxruntime differs from torch by at most {difference}, on {file.inputs} inputs"),
    ]
    if report.latency_ms is not None and report.budget_ms is not None:
        took, budget = format_ms(report.latency_ms, round_up=True), format_ms(report.budget_ms)
        searched = f"{took} of {budget} on {report.device} at {report.deployed_px} px, as searched"
        lines.append(field("latency", searched))
    typer.echo("\n".join(lines))


@app.command()
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

    found, arch = _find_network(target, space)
    if arch is None:
        if as_json:
            _print_json(space_facts(found))
        else:
            typer.echo(describe_space(found))
        return
    blocks = lower(found, arch)
    if as_json:
        _print_json(network_facts(found, blocks))
    else:
        typer.echo(describe_network(found, blocks))


def _find_network(target: str, space: str | None) -> "tuple[SearchSpace, Arch | None]":
    """Return a space and the architecture that is meant; None where the space has many."""
    from qnas.arch import find_arch, only_arch
    from qnas.space import load_space

    path = Path(target)
    if path.is_dir() or path.suffix == ".json":
        found = find_arch(path, space)
        return found.space, found.arch
    searched = load_space(target)
    return searched, only_arch(searched) if searched.is_fixed else None


@app.command()
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

    found, arch = _find_network(target, space)
    if arch is None:
        raise ArchError(f"space {found.name} has many networks: give a run's folder or an arch.json")
    indices = arch.indices(found)
    rows = []
    for name in device_names() if device == "all" else [device]:
        table = load_table(load_device(name), found)
        rows.append((table.device, table.latency_ms(indices), table.coverage(indices)))
    if as_json:
        _print_json(
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


@app.command()
def devices(as_json: Json = False) -> None:
    """List the devices whose latencies are known, and how well.

    Example: qnas devices
    """
    from qnas.latency.device import device_names, load_device

    known = [load_device(name) for name in device_names()]
    if as_json:
        _print_json([json.loads(device.to_json()) for device in known])
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


@app.command()
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


def _fail(message: str, code: int) -> NoReturn:
    print(f"qnas: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command line; what the user can mend becomes one line and exit code 1."""
    try:
        app()
    except QnasError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"error: {where}{error.strerror or error}", 1)
    except Interrupted as error:
        _fail(f"interrupted: {error}", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


if __name__ == "__main__":
    main()
