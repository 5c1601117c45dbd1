"""`qnas train-subnet` and `qnas export`: from an architecture to a file to ship."""

from pathlib import Path
from typing import Annotated

import typer

from qnas.commands.options import (
    BatchSize,
    Compile,
    Data,
    Epochs,
    Force,
    Json,
    Precision,
    Quiet,
    Resolution,
    Resume,
    Seed,
    Space,
    Threads,
    TorchDevice,
    free_folder,
    print_json,
    versions,
)
from qnas.errors import UsageError


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
    torch_device: TorchDevice = None,
    precision: Precision = None,
    compile_: Compile = None,
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
    from qnas.distributed import world_of_environment
    from qnas.lower import check_resolution
    from qnas.originals import parse_data_spec
    from qnas.text import field, files_in
    from qnas.train import set_up_process
    from qnas.train_subnet import has_supernet, recipe_for, supernet_file
    from qnas.train_subnet import train_subnet as train

    found = find_arch(source or run.latest_run(), space)
    searched = has_supernet(found)
    if weights not in (None, "supernet", "scratch"):
        raise UsageError(f"--weights {weights!r}: expected supernet or scratch")
    if weights == "supernet" and not searched:
        raise UsageError(f"--weights supernet: no {run.SUPERNET} in {found.folder}, name a run's folder")
    from_supernet = searched and weights != "scratch"
    former = run.read_config(supernet_file(found).parent) if searched else {}
    spec = parse_data_spec(data or former.get("data", "digits"))
    config = recipe_for(
        spec.kind,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        resolution_px=resolution,
        learning_rate=learning_rate,
        threads=threads,
        torch_device=torch_device,
        precision=precision,
        compile=compile_,
    )
    check_resolution(found.space, config.resolution_px)
    set_up_process(config.threads)
    world = world_of_environment()
    quiet = quiet or not world.is_main
    if out is None:
        out = found.folder / run.SUBNET if searched else free_folder(found.space.name, "subnet")
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
        world=world,
    )
    if not world.is_main:
        return
    if as_json:
        print_json({"folder": str(out), "test_accuracy": score.accuracy, "test_images": score.images})
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
        print_json(report.facts())
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
