"""`qnas train-subnet` and `qnas export`: from an architecture to a file to ship."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qnas.commands.options import (
    Compile,
    Data,
    Force,
    Json,
    Precision,
    Quiet,
    Resume,
    Seed,
    Space,
    Threads,
    TorchDevice,
    free_folder,
    print_json,
    versions,
)
from qnas.errors import CheckpointError, UsageError


def _of_recipe(help_text: str, *names: str) -> Any:
    """Return the option of a field of the recipe, which it overrides."""
    return typer.Option(*names, help=help_text, show_default=False, rich_help_panel="Recipe")


def train_subnet(
    context: typer.Context,
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
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A shipped recipe by name (imagenet, cifar, small, finetune, ...), or the path of your own "
            "YAML. Default: by the kind of data.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A network to learn from beside the labels: supernet-largest, timm:NAME (pretrained on "
            "these classes), or a trained network's folder.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Default: RUN/subnet, or for an arch.json a new folder in runs/.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    torch_device: TorchDevice = None,
    precision: Precision = None,
    compile_: Compile = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
    # the fields of a recipe by name, read from the context; tests hold that none is missing
    epochs: Annotated[int | None, _of_recipe("Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _of_recipe("Images a step, over all processes.")] = None,
    resolution_px: Annotated[
        int | None, _of_recipe("Height and width in pixels while training.", "--resolution")
    ] = None,
    learning_rate: Annotated[float | None, _of_recipe("Of AdamW, after the warm-up.")] = None,
    warmup_epochs: Annotated[float | None, _of_recipe("In which the rate rises.")] = None,
    weight_decay: Annotated[float | None, _of_recipe("Not on norms and biases.")] = None,
    gradient_clip: Annotated[float | None, _of_recipe("Largest norm of all gradients.")] = None,
    accumulation: Annotated[
        int | None, _of_recipe("Parts that a batch is taken in, for less memory.")
    ] = None,
    label_smoothing: Annotated[float | None, _of_recipe("0 to 1.")] = None,
    randaugment: Annotated[float | None, _of_recipe("Magnitude, 0 (off) to 10.")] = None,
    randaugment_std: Annotated[float | None, _of_recipe("Of the magnitude.")] = None,
    mixup: Annotated[float | None, _of_recipe("Alpha of the Beta distribution; 0 is off.")] = None,
    cutmix: Annotated[float | None, _of_recipe("Alpha of the Beta distribution; 0 is off.")] = None,
    random_erasing: Annotated[float | None, _of_recipe("Share of the images.")] = None,
    stochastic_depth: Annotated[float | None, _of_recipe("Rate of the last block.")] = None,
    ema_decay: Annotated[float | None, _of_recipe("Of the weights' moving average; 0 is off.")] = None,
    linear_start: Annotated[
        bool | None,
        _of_recipe("Start with all quadratic products at zero.", "--linear-start/--no-linear-start"),
    ] = None,
    quadratic_gamma: Annotated[
        float | None, _of_recipe("Rate of the quadratic weights, as a share of the others'.")
    ] = None,
    quadratic_alpha: Annotated[float | None, _of_recipe("Further decay of theirs (L2).")] = None,
    quadratic_beta: Annotated[float | None, _of_recipe("Their shrinkage to zero (L1).")] = None,
    teacher_weight: Annotated[float | None, _of_recipe("Of the teacher's loss, 0 to 1.")] = None,
    teacher_temperature: Annotated[float | None, _of_recipe("That softens its answers.")] = None,
) -> None:
    """Train a derived network, from the supernet's weights or from scratch.

    Example: qnas train-subnet runs/quadranet-mobile-vpu-30ms --recipe finetune --epochs 60
    """
    from qnas import run
    from qnas.acceleration import choose_acceleration
    from qnas.arch import find_arch
    from qnas.data import load_data
    from qnas.distributed import world_of_environment
    from qnas.files import read_json
    from qnas.lower import check_resolution
    from qnas.originals import parse_data_spec
    from qnas.recipe import DEFAULTS, Recipe, load_recipe
    from qnas.teacher import load_teacher
    from qnas.text import describe_training, files_in
    from qnas.train import set_up_process
    from qnas.train_subnet import TrainConfig, has_supernet, supernet_file
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
    changes = {name: context.params.get(name) for name in Recipe.model_fields}
    resolved = load_recipe(recipe or DEFAULTS[spec.kind]).override(changes)
    if resolved.resolution_px is None:
        px = former["search"]["resolution_px"] if searched else found.space.input.resolution_px
        resolved = resolved.override({"resolution_px": px})
    config = TrainConfig(
        resolved,
        seed=seed,
        # for digits threads cost more than they do
        threads=(1 if spec.kind == "digits" else 0) if threads is None else threads,
        torch_device=torch_device or "auto",  # type: ignore[arg-type]  # checked
        precision=precision or "auto",  # type: ignore[arg-type]  # checked
        compile=bool(compile_),
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
    taught, teacher_digest = None, ""
    if teacher is not None:
        taught, teacher_digest = load_teacher(
            teacher,
            found,
            images,
            weight=resolved.teacher_weight,
            temperature=resolved.teacher_temperature,
            device=choose_acceleration(config.torch_device, config.precision, world.local_rank).device,
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
            **({"teacher": teacher, "teacher_digest": teacher_digest} if taught else {}),
            "versions": versions(),
        },
        from_supernet=from_supernet,
        teacher=taught,
        resume=resume,
        force=force,
        quiet=quiet,
        world=world,
    )
    if not world.is_main:
        return
    result, speed = (read_json(out / name, CheckpointError) for name in (run.RESULT, run.SPEED))
    if as_json:
        print_json({"folder": str(out), **result, "speed": speed})
        return
    start = "the supernet's weights" if from_supernet else "scratch"
    target = found.folder if out == found.folder / run.SUBNET else out
    learned = (
        f"{score.accuracy:.2%} on {score.images} test images, after {resolved.epochs} epochs from {start}"
    )
    typer.echo(f"\n{describe_training(learned, result, speed, files_in(out))}")
    typer.echo(f"next        qnas export {target}")


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
