"""The training of one network from Python."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnas.api.limits import named
from qnas.api.results import Source, TrainedNetwork, find_source
from qnas.common.arguments import check_arguments
from qnas.common.errors import CheckpointError, UsageError, nearest
from qnas.common.resources import stems
from qnas.runs.folders import free_folder, latest_run, read_config
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import CONFIG_FILE, SUBNET_FOLDER, SUPERNET_FILE
from qnas.spaces.lower import check_resolution
from qnas.spaces.space import load_space
from qnas.training.recipe import Recipe, TrainConfig, default_recipe

if TYPE_CHECKING:
    from qnas.api.session import Progress
    from qnas.data.image_data import ImageData
    from qnas.data.loading import GivenData
    from qnas.training.losses import LossFunction, Metric


@dataclass(frozen=True)
class StartedTraining:
    """A training that is about to begin: the argument of `on_start` in `train_subnet`."""

    found: FoundArch
    recipe: Recipe
    images: "ImageData"
    folder: Path
    from_finalist: bool = False  # whether the training of the search's finalist goes on


def train_subnet(
    source: Source | None = None,
    *,
    data: "GivenData | None" = None,
    recipe: str | Path | Recipe | None = None,
    weights: str | None = None,
    pretrained: str | None = None,
    teacher: str | None = None,
    space: str | None = None,
    out: str | Path | None = None,
    max_broken: float | None = None,
    loss: "str | LossFunction | None" = None,
    metric: "str | Metric | None" = None,
    resume: bool = False,
    force: bool = False,
    progress: "Progress" = False,
    on_start: Callable[[StartedTraining], None] = lambda started: None,
    **settings: Any,
) -> TrainedNetwork:
    """Train one network on its own, from the supernet's weights or from scratch.

    `source` is a search's result, a derived network, a run's folder, an arch.json, or a space with an Arch
    of it (default: the latest run). `data` defaults to that of the search. `recipe` is a shipped
    recipe by name, a YAML file or a Recipe (default: by the kind of data); `settings` are fields of the
    recipe and of TrainConfig that override it, such as `epochs`, `learning_rate`, `class_weights` or `seed`.
    `weights` is "finalist", "supernet" or "scratch" (default: the first of these that there are): of a search
    with finalists, the training of the best one goes on. `pretrained` starts from a pretrained network's
    weights instead (`efficientnet-lite0`, `timm:NAME`): those of the given network's channels and kernels,
    or without `source` the whole pretrained network, as one of `space` (default: the one around it).
    `teacher` is
    "supernet-largest", "timm:NAME" or a trained network's folder. `loss`, `metric`, `resume`, `progress` and
    `on_start` as in `run_search`.

    Unless `resolution_px` is given here or in the recipe, the training starts at the resolution of the
    search and ends at the space's own, for which the predicted latencies hold.

    Writes `out`, by default `RUN/subnet`, or a new folder in runs/ for an architecture without a run.
    Raises QnasError for an invalid request, if possible before anything is trained.
    """
    from qnas.api import session
    from qnas.data.loading import kind_of, reopen
    from qnas.nn.pretrained.catalogue import load_pretrained, space_around
    from qnas.nn.pretrained.derivation import check_fits, own_arch
    from qnas.training.acceleration import choose_acceleration
    from qnas.training.processes import world_of_environment
    from qnas.training.subnet_trainer import train_subnet as train_in_folder
    from qnas.training.supernet_weights import finalist_file, is_finalist, supernet_file
    from qnas.training.teacher import load_teacher

    check_arguments(max_broken=max_broken, loss=loss, metric=metric, progress=progress, pretrained=pretrained)
    start = None
    if pretrained is not None:
        if weights is not None:
            raise UsageError(f"`weights='{weights}'`: `pretrained` has the weights to start from")
        start = load_pretrained(pretrained)
        if source is None:
            around = space_around(pretrained) if space is None else load_space(space)
            check_fits(around, start.space)
            source, space = (around, own_arch(around, start.space)), None
    found = find_source(latest_run() if source is None else source, space)
    searched = supernet_file(found).is_file()
    if weights not in (None, "finalist", "supernet", "scratch"):
        raise UsageError(f"`weights='{weights}'`: expected finalist, supernet or scratch")
    if weights == "finalist" and not is_finalist(found):
        raise UsageError(
            f"`weights='finalist'`: no {finalist_file(found)}, name the folder of a search with finalists"
        )
    if weights == "supernet" and not searched:
        raise UsageError(f"`weights='supernet'`: no {SUPERNET_FILE} in {found.folder}, name a run's folder")
    from_finalist = start is None and (is_finalist(found) if weights is None else weights == "finalist")
    from_supernet = start is None and searched and weights != "scratch"
    if from_finalist:
        from_supernet = found.document["finalist"]["from"] == "supernet"
    former = read_config(supernet_file(found).parent) if searched else {}
    data = reopen(data, former, None if searched else "digits")
    searched_px = former.get("search", {}).get("resolution_px")
    if searched and searched_px is None:
        raise CheckpointError(f"{supernet_file(found).parent / CONFIG_FILE}: search.resolution_px: missing")
    changes = settings | named(loss=loss, metric=metric)
    is_pretrained = start is not None or (from_supernet and "pretrained" in found.document)
    own = default_recipe(kind_of(data), is_pretrained=is_pretrained)
    config = _resolve(recipe or own, kind_of(data), found.space.input.resolution_px, searched_px, changes)
    for px, _ in config.recipe.stages:
        check_resolution(found.space, px)
    broken = former.get("max_broken") if max_broken is None else max_broken
    if out is None:
        out = found.folder / SUBNET_FOLDER if searched else free_folder(f"{found.space.name}-{SUBNET_FOLDER}")
    world = world_of_environment()
    with session.threads_set(config.threads):
        images = session.load_images(
            data,
            found.space,
            config.resolution_px,
            broken,
            progress,
            keep_originals=config.recipe.random_resized_crop > 0,
        )
        batch_size = session.fit_batch(
            config.recipe.batch_size,
            len(images.train_and_heldout),
            world,
            parts=config.recipe.accumulation,
            asked=settings.get("batch_size") is not None or not _is_shipped(recipe),
        )
        config = config.override({"recipe": config.recipe.override({"batch_size": batch_size})})
        taught, teacher_digest = None, ""
        if teacher is not None:
            device = choose_acceleration(config.torch_device, config.precision, world.local_rank).device
            taught, teacher_digest = load_teacher(
                teacher,
                found,
                images,
                weight=config.recipe.teacher_weight,
                temperature=config.recipe.teacher_temperature,
                device=device,
            )
        request = {
            "command": "train-subnet",
            "choices": list(found.arch.choices),
            "space_digest": found.space.digest,
            **session.record_images(data, images, broken),
            **({"teacher": teacher, "teacher_digest": teacher_digest} if taught else {}),
            "versions": session.versions(),
        }
        if world.is_main:
            on_start(StartedTraining(found, config.recipe, images, Path(out), from_finalist))
        train_in_folder(
            found,
            images,
            config,
            Path(out),
            request,
            from_supernet=from_supernet,
            from_finalist=from_finalist,
            teacher=taught,
            pretrained=start,
            objective=session.objective_of(config, loss, metric, images.train_and_heldout.labels, images),
            resume=resume,
            force=force,
            display=session.display_of(progress),
            world=world,
        )
    if not world.is_main:
        raise SystemExit
    return TrainedNetwork.load(out)


def _is_shipped(recipe: str | Path | Recipe | None) -> bool:
    """Whether a recipe is a shipped one, whose batch size the user did not ask for."""
    return recipe is None or (not isinstance(recipe, Recipe) and str(recipe) in stems(Recipe.FOLDER, ".yaml"))


def _resolve(
    recipe: str | Path | Recipe,
    kind: str,
    px: int,
    searched_px: int | None,
    changes: dict[str, Any],
) -> TrainConfig:
    """Return the training settings for a kind of data, with changes to the recipe and to the other fields.

    Without another request, images have `px` pixels at the end, and at the start those of the search.
    """
    fields = {*Recipe.model_fields, *TrainConfig.model_fields} - {"recipe", "file_schema"}
    for name in changes.keys() - fields:
        raise UsageError(f"`{name}`: unknown setting ({nearest(name, fields)})")
    base = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    resolved = base.override({name: value for name, value in changes.items() if name in Recipe.model_fields})
    if resolved.resolution_px is None:
        start_px = resolved.start_resolution_px or searched_px
        resolved = resolved.override({"resolution_px": px, "start_resolution_px": start_px})
    # on feature maps as small as those of digits, more threads cost more than they gain
    config = TrainConfig(recipe=resolved, threads=1 if kind == "digits" else 0)
    return config.override({k: v for k, v in changes.items() if k not in Recipe.model_fields})
