"""`qnas train-subnet` and `qnas export`: the training of an architecture, and its export."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands import completion, options
from qnas.commands.fields import Fields, field_command, takes_fields
from qnas.commands.options import argument, choice, option
from qnas.common.text import shown
from qnas.common.units import format_ms
from qnas.runs.folders import latest_run
from qnas.runs.names import SPEED_FILE, SUBNET_FOLDER
from qnas.runs.text import field, files_in, next_command, wrapped

if TYPE_CHECKING:
    from qnas.api.training import StartedTraining
    from qnas.deploy.export_run import ExportedFiles

RECIPE = "Recipe"
# known without loading torch, for completion
FORMATS = ("vpu", "tflite", "onnx", "openvino", "torch", "aot", "executorch", "standalone")
TrainSubnetCommand = field_command(
    Fields(
        "qnas.training.recipe:Recipe",
        panels={
            options.DATA: ("resolution_px", "start_resolution_px", "batch_size"),
            "Augmentation": (
                "random_resized_crop",
                "randaugment",
                "randaugment_std",
                "mixup",
                "cutmix",
                "random_erasing",
            ),
            "Quadratic weights": ("linear_start", "quadratic_gamma", "quadratic_alpha", "quadratic_beta"),
        },
        rest=RECIPE,
        show_defaults=False,
    ),
    Fields(
        "qnas.training.recipe:TrainConfig",
        panels={
            RECIPE: ("loss", "metric", "class_weights", "sampler"),
            options.MACHINE: ("seed", "threads", "torch_device", "precision", "compile"),
        },
    ),
)


@takes_fields
def train_subnet(
    source: Annotated[
        Path | None,
        argument("A run's folder or an arch.json. Default: the latest run.", "[RUN|ARCH]", completion.runs),
    ] = None,
    data: options.Data = None,
    max_broken: options.MaxBroken = None,
    space: options.Space = None,
    weights: Annotated[
        str | None,
        choice(
            "finalist",
            "supernet",
            "scratch",
            note="  [default: finalist for a run with finalists, supernet for another run, scratch for an "
            "arch.json]",
            panel=RECIPE,
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        option(
            "A pretrained network to start from: efficientnet-lite0, -lite1, -lite2, or timm:NAME. Without a "
            "run, the whole network is trained.",
            panel=RECIPE,
            complete=completion.pretrained,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        option(
            "A shipped recipe by name (imagenet, cifar, small, finetune, ...), or the path of a YAML file. "
            "Default: by the kind of data.",
            panel=RECIPE,
            complete=completion.recipes,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        option(
            "A network to distil from, beside the labels: supernet-largest, timm:NAME (pretrained on these "
            "classes), or a trained network's folder.",
            panel=RECIPE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option("Default: RUN/subnet, or for an arch.json a new folder in runs/.", panel=options.OUTPUT),
    ] = None,
    resume: options.Resume = False,
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    **changes: Any,
) -> None:
    """Train a derived network, from the supernet's weights or from scratch.

    Example: qnas train-subnet runs/union-mobile-vpu-30ms --recipe finetune --epochs 60
    """
    from qnas.api.training import train_subnet as train
    from qnas.runs.documents import SpeedDocument, read_document
    from qnas.runs.run_text import describe_training

    trained = train(
        source,
        data=data,
        recipe=recipe,
        weights=weights,
        pretrained=pretrained,
        teacher=teacher,
        space=space,
        out=out,
        max_broken=max_broken,
        resume=resume,
        force=force,
        progress=options.progress(quiet),
        on_start=(lambda started: None) if as_json else _announce,
        **changes,
    )
    folder, result = trained.folder, trained.result
    speed = read_document(folder / SPEED_FILE, SpeedDocument)
    start = "the supernet's weights" if trained.config["from_supernet"] else "scratch"
    start = "the finalist's weights" if trained.config.get("from_finalist") else start
    if "pretrained" in trained.config:
        start = f"the weights of {trained.config['pretrained']['name']}"
    epochs = trained.config["train"]["recipe"]["epochs"]
    target = folder.parent if folder.name == SUBNET_FOLDER and out is None else folder
    kind = result.get("split_names", {}).get("test", "test")
    learned = (
        f"{trained.accuracy:.2%} on {result['test_images']} {kind} images at {result['resolution_px']} px, "
        f"after {epochs} epochs from {start}"
    )
    lines = ["", describe_training(learned, result, speed, files_in(folder))]
    lines.append(next_command(f"qnas export {target}"))
    options.show({"folder": str(folder), **result, "speed": speed}, lines, as_json=as_json)


def _announce(started: "StartedTraining") -> None:
    """Print the images of a training, and the sizes that they have one after another, before it begins."""
    from qnas.runs.run_text import trained_elsewhere

    images, stages = started.images, started.recipe.stages
    counts = f"{len(images.train_and_heldout)} training, {len(images.test)} test images"
    epochs = ", ".join(f"{count} epoch{'s' * (count > 1)} at {px} px" for px, count in stages)
    typer.echo(wrapped(f"{shown(images.name)}: {counts}; {epochs}; run in {started.folder}"))
    if started.from_finalist:
        known = started.found.document["finalist"]
        typer.echo(
            wrapped(
                f"goes on from the finalist's weights: {known['heldout_accuracy']:.1%} on held-out images "
                f"after {known['epochs']} epochs at {known['resolution_px']} px"
            )
        )
    deployed_px = started.found.space.input.resolution_px
    if images.resolution_px != deployed_px:
        typer.echo(wrapped(trained_elsewhere(images.resolution_px, deployed_px)))


def export(
    source: Annotated[
        Path | None,
        argument(
            "A run whose network is trained, a trained network's folder, or the arch.json in it. "
            "Default: the latest run.",
            "[RUN|ARCH]",
            completion.runs,
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        option(
            "vpu (Myriad X: ONNX, IR and blob), tflite, onnx, openvino, torch (torch.export's .pt2), "
            "executorch or standalone (model.py); several, by repeating it.  "
            "[default: what the devices of the search run]",
            "--format",
            complete=completion.one_of(*FORMATS),
        ),
    ] = None,
    aot: Annotated[
        bool,
        option("Also an AOTInductor package: compiled for this processor and this torch.", "--aot"),
    ] = False,
    precision: Annotated[
        str | None,
        option(
            "fp32, fp16, int8 (onnx, openvino and tflite; calibrated on training images) or int8-dynamic "
            "(tflite).  [default: without --format what the devices of the search measure, else fp32]",
            complete=completion.one_of("fp32", "fp16", "int8", "int8-dynamic"),
        ),
    ] = None,
    opset: Annotated[
        int | None,
        option("ONNX opset, 13 to 20, for runtimes that read no newer one; makes onnx the default.", least=1),
    ] = None,
    ranges: Annotated[
        str,
        choice(
            "minmax",
            "percentile",
            "entropy",
            note=" How int8 finds the range of a map on the calibration images.",
        ),
    ] = "minmax",
    symmetric: Annotated[
        bool | None,
        option(
            "int8 with zero points of 0, as TensorRT needs.  [default: if a device of the search is a GPU]",
            "--symmetric/--no-symmetric",
        ),
    ] = None,
    resolution: Annotated[
        int | None, option("Input size in pixels. Default: that of training.", least=1)
    ] = None,
    batch: Annotated[int | None, option("A fixed batch size. Default: any size.", least=1)] = None,
    out: Annotated[Path | None, option("A folder. Default: export/ in the run.")] = None,
    data: Annotated[
        str | None,
        option("Images to check files with and to calibrate int8. Default: those of the training."),
    ] = None,
    images: Annotated[int | None, option("Test images to check files with.  [default: 512]", least=1)] = None,
    max_drop: Annotated[
        float | None,
        option(
            "Largest loss of accuracy, as a share. A file is refused if the 95% interval of its loss lies "
            "above it.  [default: 0.01, int8 0.02]"
        ),
    ] = None,
    allow_drop: Annotated[
        bool,
        option("Write files of a --resolution at which the network is less accurate, too.", "--allow-drop"),
    ] = False,
    measure: Annotated[bool, option("Time the files on this machine.", "--measure")] = False,
    threads: Annotated[int, option("CPU threads of the runtimes that --measure times.", least=1)] = 1,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a trained network as files that run without qnas, each checked against torch on real images.

    Without a format, the devices of the search decide: vpu for a Myriad X, tflite for phones, torch and onnx
    for an NVIDIA GPU. In place of one that cannot be written here, onnx is written, and the command says so.

    Example: qnas export runs/union-mobile-vpu-30ms --format onnx --format standalone
    """
    from qnas.api.exporting import export as export_files

    done = export_files(
        source or latest_run(),
        formats or None,
        aot=aot,
        precision=precision,
        opset=opset,
        ranges=ranges,
        symmetric=symmetric,
        resolution_px=resolution,
        batch=batch,
        data=data,
        images=images,
        max_drop=max_drop,
        allow_drop=allow_drop,
        measure=measure,
        threads=threads,
        out=out,
        force=force,
    )
    options.show(done.facts(), _exported(done), as_json=as_json)


def _exported(done: "ExportedFiles") -> Iterator[str]:
    from qnas.deploy.export.formats import FORMATS
    from qnas.deploy.export.parity import describe_drop
    from qnas.deploy.file_latency import describe_latency
    from qnas.deploy.targets import describe_device

    for file in done.files:
        parity, px = file.parity, file.resolution_px
        names = " + ".join(file.files)
        yield field("file", f"{done.folder / names} ({file.size_bytes / 1e6:.1f} MB, {file.precision})")
        batch = file.batch or "batch"
        image = (
            f"{px}, {px}, {done.channels}"
            if FORMATS[file.format].channels_last
            else f"{done.channels}, {px}, {px}"
        )
        yield field("input", f"images ({batch}, {image}), float32, normalised as its metadata say")
        yield field(
            "check",
            f"{file.runtime} on {parity.source}: differs from the network by at most "
            f"{parity.max_difference / parity.scale:.1e} of the largest output, on average by "
            f"{parity.mean_difference / parity.scale:.1e}; the same class for {parity.agreement:.2%}",
        )
        yield field(
            "accuracy",
            f"{parity.accuracy:.2%} on them, {parity.network_accuracy:.2%} before the export"
            f"{describe_drop(parity.drop_interval95)}",
        )
        for seen in file.checks:
            yield field("check", seen)
        yield field("runs on", file.runs_on)
        if measured := done.measured.get(file.files[0]):
            threads = f"{measured['threads']} thread" + "s" * (measured["threads"] > 1)
            p50, p95 = format_ms(measured["p50_ms"]), format_ms(measured["p95_ms"])
            yield field("measured", f"{p50} (p95 {p95}), {measured['runtime']}, {threads}")
    yield field("files", files_in(done.folder))
    if done.resizing is not None:
        yield field("resized", done.resizing.describe())
    for predicted in done.predicted:
        yield field("latency", describe_latency(predicted.facts()))
    for device in done.devices:
        yield field("device", options.as_flags(describe_device(device.facts())))
