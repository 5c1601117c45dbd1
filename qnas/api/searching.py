"""A search from Python: from a space, budgets and images to a network within the budgets."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnas.api.limits import AskedLimits, Budgets, limits_once, named
from qnas.api.results import SearchResult
from qnas.common.arguments import check_arguments
from qnas.common.errors import CheckpointError, InfeasibleBudgetError, QnasWarning, TableError, UsageError
from qnas.common.resources import DEFAULT_SPACE, stems
from qnas.latency.prediction import DEVICE
from qnas.nn.pretrained.catalogue import network_space, space_around
from qnas.nn.pretrained.derivation import check_fits
from qnas.runs.folders import free_folder, latest_run, read_config
from qnas.runs.names import FAMILY_SPACE_FILE, SPACE_FILE
from qnas.search.config import SearchConfig, default_preset
from qnas.solver.layouts import Within, layouts_within, mean_limits
from qnas.solver.limits import Limits
from qnas.solver.solve import check_has_choice, check_searchable
from qnas.spaces.family import SpaceFamily, load_family, make_family, multiplied_widths
from qnas.spaces.lower import check_resolution
from qnas.spaces.space import FEWEST_CLASSES, SearchSpace

if TYPE_CHECKING:
    from qnas.api.session import Progress
    from qnas.data.image_data import ImageData
    from qnas.data.loading import GivenData
    from qnas.search.problem import FamilySearch, Problem
    from qnas.training.losses import LossFunction, Metric
    from qnas.training.recipe import TrainConfig

DATA = "digits"  # the default
OF_ONE_LAYOUT = ("space_digest", "table_digest", "cells_digest")  # keys of a config.json


@dataclass(frozen=True)
class Started:
    """A search that is about to train: the argument of `on_start` in `run_search`."""

    space: SearchSpace
    limits: Limits
    images: "ImageData"
    folder: Path
    finalists: "TrainConfig | None" = None  # how they are trained, if there are any
    # of a family: it, with its layouts that have networks within the limits; space and limits are then those
    # of the largest layout and of the means over the layouts
    family: SpaceFamily | None = None
    within: tuple[Within, ...] = ()


def run_search(
    space: str | Path | SearchSpace | SpaceFamily | None = None,
    budgets: Budgets | None = None,
    *,
    resolutions: Sequence[int] | None = None,
    width_multipliers: Sequence[float] | None = None,
    data: "GivenData | None" = None,
    out: str | Path | None = None,
    max_params: str | int | None = None,
    max_macs: str | int | None = None,
    max_energy: str | None = None,
    confidence: float | None = None,
    latency: str | None = None,
    max_broken: float | None = None,
    preset: str | Path | None = None,
    pretrained: str | None = None,
    loss: "str | LossFunction | None" = None,
    metric: "str | Metric | None" = None,
    resume: bool = False,
    force: bool = False,
    progress: "Progress" = False,
    on_start: Callable[[Started], None] = lambda started: None,
    **settings: Any,
) -> SearchResult:
    """Search for the best network of a space within latency budgets, and return it with its certificate.

    `space` is a shipped space by name, a YAML file, a SearchSpace or a SpaceFamily (default:
    union-mobile). With several input resolutions, `resolutions=[128, 160, 192, 224]` or a list in the
    file, the search chooses one of them too: the run is then one in the space at that resolution, and the
    others are in its family.json. So it does with `width_multipliers=[0.75, 1.0]`, multiples of each stage's
    channels, or with lists of channels in the file, for shared weights alone. `budgets` maps devices, by
    name or as Device values, to latencies with units: `{"vpu": "30ms", "cpu": "20ms"}`;
    `max_params` and `max_macs` limit the network further ("2.5M"), and `max_energy` ("30mJ") its energy on
    each of the devices whose file states energies. A throughput device also takes "5000img/s". `data` is
    `digits`, `cifar10:DIR`, `imagefolder:DIR` and so on, a map-style Dataset, or `Datasets` (default:
    digits). `settings` are fields of SearchConfig, such as `search_epochs`, `seed`, `weights` or `sampler`,
    that override the `preset`. With `finalists=8`, that many different networks within the budgets are
    trained by themselves, and the best is the result.
    `loss` and `metric` are names or callables (see `qnas.training.losses`).

    `pretrained` is a network whose weights the search starts from: `efficientnet-lite0`, -lite1 or -lite2,
    or `timm:NAME`. The default space is then the one around it, and any other must have its stem, widths and
    head. Images are normalised as the space's input says, as that network was trained. The run needs the
    network's package until it has ended, and not afterwards.

    `confidence` keeps the upper end of the network's latency interval at this level within each budget, in
    place of the prediction.

    The budgets hold for images of the space's own resolution, and for as many classes as the data have: the
    run's space is the given one with such a head, except where a device's table was measured with fewer
    classes. The search trains at the resolution of its preset, or at `resolution_px`: the smaller one of
    digits and other small images saves time, and `train_subnet` ends at the space's.

    The run's folder is `out`, by default a new one in runs/. An interrupted search (Ctrl-C raises
    Interrupted) continues with `resume=True` and the same `out`, to the same result as without interruption.
    `progress` is True for a bar on stderr, or a function that is called with a Report after each step.
    With several processes (torchrun), the first returns and the others end with SystemExit.

    Raises QnasError for an invalid request, if possible before anything is trained.
    """
    check_arguments(max_broken=max_broken, loss=loss, metric=metric, progress=progress, pretrained=pretrained)
    former = _former(out) if resume else {}
    if pretrained is None and "pretrained" in former:
        pretrained = str(former["pretrained"]["name"])
    around = DEFAULT_SPACE if pretrained is None or former else space_around(pretrained)
    given = former.get("space", around) if space is None else space
    multipliers = former.get("width_multipliers") if width_multipliers is None else width_multipliers
    family = _family(
        given,
        former.get("resolutions_px") if resolutions is None else resolutions,
        multipliers,
        former,
        out,
    )
    if pretrained is not None:
        check_fits(family.largest, network_space(pretrained))
    asked = AskedLimits.of(
        budgets, max_params, max_macs, former, max_energy=max_energy, confidence=confidence
    )
    source = latency or former.get("latency", DEVICE)
    known = family.largest
    limits = _check_early(family, asked, source)

    # these modules import torch, which takes seconds: all checks that need no torch are done above
    from qnas.data.loading import kind_of, reopen

    data = reopen(data, former, DATA)
    if former and preset is None:
        replaced = {key for key, part in (("loss", loss), ("metric", metric)) if callable(part)}
        kept = {key: value for key, value in former["search"].items() if key not in replaced}
        config = SearchConfig.check(kept, f"{out}: search")
    else:
        own = default_preset(kind_of(data), is_pretrained=pretrained is not None)
        config = SearchConfig.load(preset or own)
    config = config.override(settings | named(loss=loss, metric=metric))
    is_free = settings.get("resolution_px") is None and not former
    px = _trained_px(config, family, is_free=is_free)
    config = config.override({"resolution_px": px})
    is_default = not former and (preset is None or str(preset) in stems(SearchConfig.FOLDER, ".yaml"))
    broken = former.get("max_broken") if max_broken is None else max_broken

    from qnas.api import session
    from qnas.nn.pretrained.catalogue import load_pretrained
    from qnas.search.finalists import finalist_recipe, finalist_training
    from qnas.search.search_result import follow_search
    from qnas.search.search_result import run_search as search_in_folder
    from qnas.search.searcher import Searcher
    from qnas.training.processes import world_of_environment

    recipe = None
    if config.finalists:
        recipe = finalist_recipe(config, kind_of(data), is_pretrained=pretrained is not None)

    start = None if pretrained is None else load_pretrained(pretrained)
    folder = Path(out) if out is not None else free_folder(f"{known.name}-{asked.label}")
    world, display = world_of_environment(), session.display_of(progress)
    with session.threads_set(config.threads):
        crops = recipe is not None and recipe.random_resized_crop > 0
        images = session.load_images(data, known, px, broken, progress, keep_originals=crops)
        family, limits = _of_data(family, limits, len(images.classes), asked, source, former)
        known, over_layouts = family.largest, None
        if len(family) == 1:
            check_searchable(known, limits)
        else:
            over_layouts = _over_layouts(family, asked, source)
            limits = mean_limits([each.limits for each in over_layouts.within])
        is_asked = settings.get("batch_size") is not None or not is_default
        batch_size = session.fit_batch(config.batch_size, len(images.train), world, asked=is_asked)
        config = config.override({"batch_size": batch_size})
        objective = session.objective_of(config, loss, metric, images.train.labels, images)
        searcher = Searcher(known, limits, images, config, world, objective, over_layouts, start)
        finalists = (
            None if recipe is None else finalist_training(config, recipe, known, len(images.train), world)
        )
        if finalists is not None and over_layouts is not None:
            from qnas.search.sizes import check_sizes

            check_sizes(known, family.resolutions_px, finalists.resolution_px)
        if not world.is_main:  # takes the same steps, writes nothing
            follow_search(searcher, finalists=finalists, resume=resume)
            raise SystemExit
        for text in _warnings_of(searcher.problem):
            warnings.warn(text, QnasWarning, stacklevel=2)
        within = over_layouts.within if over_layouts is not None else ()
        of_family = family if within else None
        on_start(Started(known, limits, images, folder, finalists, of_family, within))
        request = _request(asked, limits, source, given, family) | {
            **({} if start is None else {"pretrained": start.record()}),
            **session.record_images(data, images, broken),
            "versions": session.versions(),
        }
        if (arch_batch := searcher.problem.arch_batch_size) < batch_size:
            request |= {"arch_batch_size": arch_batch}
        if within or resolutions is not None or "resolutions_px" in former:
            request |= {"resolutions_px": list(family.resolutions_px)}
        if multipliers is not None:
            request |= {"width_multipliers": [float(by) for by in multipliers]}
        search_in_folder(
            searcher,
            folder,
            request,
            finalists=finalists,
            resume=resume,
            force=force,
            display=display,
        )
    return SearchResult.load(folder)


def _trained_px(config: SearchConfig, family: SpaceFamily, *, is_free: bool) -> int:
    """Return the size of the training images; one that is free is raised to what all resolutions need.

    Raises SpaceError where the space has no networks for it.
    """
    largest = family.largest
    px = config.resolution_px or largest.input.resolution_px
    if len(family) > 1:
        from qnas.search.sizes import check_sizes, least_trained_px

        if is_free:
            px = max(px, least_trained_px(largest, family.resolutions_px))
        check_sizes(largest, family.resolutions_px, px)
    check_resolution(largest, px)
    return px


def _warnings_of(problem: "Problem") -> Iterator[str]:
    """Yield what a user should know of a search before it trains."""
    from qnas.search.paths import left_untrained

    if problem.arch_batch_size < problem.batch_size:
        yield (
            f"architecture steps take {problem.arch_batch_size} images, not {problem.batch_size}: there are "
            f"{len(problem.data.heldout)} held-out images"
        )
    if problem.config.weight_steps == "whole" and (untrained := left_untrained(problem)):
        yield (
            f"weight steps of the whole network train no {' or '.join(untrained)} blocks, so such "
            "blocks are hardly ever chosen; `weight_steps=path` trains them too"
        )


def _request(
    asked: AskedLimits,
    limits: Limits,
    source: str,
    given: str | Path | SearchSpace | SpaceFamily,
    family: SpaceFamily,
) -> dict[str, Any]:
    """Return what config.json says of the limits and the space; of a family, what all its layouts share."""
    known, entries = family.largest, asked.entries(limits)
    request = {
        "command": "search",
        "device": entries[0]["device"],
        "latency": source,
        "budget": entries[0]["budget"],
        "budget_ms": limits[0].budget,
        "limits": entries,
        "space": known.name if isinstance(given, SearchSpace | SpaceFamily) else str(given),
        "space_digest": known.digest,
        "table_digest": entries[0]["table_digest"],
    }
    if len(family) == 1:
        return request
    shared = [{key: each[key] for key in each if key not in OF_ONE_LAYOUT} for each in entries]
    request = {key: value for key, value in request.items() if key not in OF_ONE_LAYOUT}
    return request | {"limits": shared, "family_digest": family.digest}


def _over_layouts(family: SpaceFamily, asked: AskedLimits, source: str) -> "FamilySearch":
    """Return a family as a search takes it. Raises InfeasibleBudgetError where no layout has a network."""
    from qnas.search.problem import FamilySearch

    limits_of = limits_once(asked, source)
    return FamilySearch(family, limits_of, layouts_within(family, limits_of))


def _check_early(family: SpaceFamily, asked: AskedLimits, source: str) -> Limits:
    """Check limits before the data are opened, and return them: those of the largest layout.

    The data may have fewer classes, so that networks take less.
    """
    limits_of = limits_once(asked, source)
    limits = limits_of(family.at(family.largest_layout))

    def check(of: SpaceFamily) -> None:
        if len(of) == 1:
            check_searchable(of.largest, limits_of(of.largest))
        else:
            check_has_choice(of.largest)
            layouts_within(of, limits_of)

    try:
        check(family)
    except InfeasibleBudgetError:
        try:
            check(family.with_classes(FEWEST_CLASSES))
        except (InfeasibleBudgetError, TableError):
            pass
        else:
            return limits
        raise
    return limits


def _of_data(
    family: SpaceFamily,
    limits: Limits,
    classes: int,
    asked: AskedLimits,
    source: str,
    former: Mapping[str, Any],
) -> tuple[SpaceFamily, Limits]:
    """Return the family with the classes of the data, and its limits; a run that goes on keeps its own.

    Where a device's table was measured for fewer classes, they stay as they are.
    """
    same = former.get("space_digest") == family.largest.digest or former.get("family_digest") == family.digest
    if classes == family.largest.head.classes or same:
        return family, limits
    return _limits_with(family, classes, asked, source) or (family, limits)


def _limits_with(
    family: SpaceFamily, classes: int, asked: AskedLimits, source: str
) -> tuple[SpaceFamily, Limits] | None:
    """Return a family for a number of classes with its limits; None where a table was measured for fewer."""
    own = family.with_classes(classes)
    try:
        return own, asked.limits(own.at(own.largest_layout), source)
    except TableError:
        return None


def _family(
    given: str | Path | SearchSpace | SpaceFamily,
    resolutions_px: Sequence[int] | None,
    multipliers: Sequence[float] | None,
    former: Mapping[str, Any],
    out: str | Path | None,
) -> SpaceFamily:
    """Return the requested family, which has one space where there are no lists.

    A run on a space that was made in Python records its name and keeps a copy in its folder, which has the
    run's resolutions and widths.
    """
    if not isinstance(given, SearchSpace | SpaceFamily):
        check_arguments(space=given)
        is_file = bool(Path(given).suffix)
        if former and out is not None and not is_file and str(given) not in stems("search_spaces", ".yaml"):
            return load_family(Path(out) / (FAMILY_SPACE_FILE if "family_digest" in former else SPACE_FILE))
        family = load_family(given)
    else:
        family = make_family(given) if isinstance(given, SearchSpace) else given
    if resolutions_px is None and multipliers is None:
        return family
    return make_family(
        family.largest,
        family.resolutions_px if resolutions_px is None else resolutions_px,
        family.widths if multipliers is None else multiplied_widths(family.largest, multipliers),
    )


def _former(out: str | Path | None) -> Mapping[str, Any]:
    if out is None:
        raise UsageError("`resume=True` needs `out`: the folder of the run to continue")
    request = read_config(Path(out))
    if "search" not in request:
        raise CheckpointError(f"{out}: this run is not a search")
    return request


def load_run(folder: str | Path | None = None) -> SearchResult:
    """Return a finished search from its folder; without a folder the latest in runs/.

    Raises CheckpointError if there is none.
    """
    return SearchResult.load(latest_run() if folder is None else folder)
