"""One small search over several widths and resolutions, and all facts in its result."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.searches import QUICK
from helpers.tiny import TINY_SPACE

from qnas.api.deriving import derive, pareto
from qnas.common.errors import CheckpointError, SpaceError
from qnas.common.files import write_json
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs import names
from qnas.runs.explain import explain
from qnas.runs.family_text import describe_layouts, family_lines
from qnas.runs.finished_run import read_finished_run, verify_certificate
from qnas.runs.found_arch import find_arch
from qnas.runs.report.page import write_report
from qnas.search.evaluator import evaluator_of
from qnas.search.family_selection import level_scores
from qnas.search.layout_numbers import fit_layout_numbers, open_choices
from qnas.search.problem import FamilySearch
from qnas.search.search_result import run_search
from qnas.search.searcher import Searcher
from qnas.search.selection import count_effect_networks
from qnas.solver.layouts import layouts_within, mean_limits
from qnas.solver.limits import Limits, latency_limit
from qnas.solver.solve import solve
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.family import Layout, SpaceFamily, make_family
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.loop import stream
from qnas.training.scoring import batch_statistics

CONFIG = QUICK.override(
    {
        "resolution_px": 16,
        "weights": "shared",
        "effect_networks": 60,
        "k_best": 5,
        "screened": 12,
        "random_networks": 2,
    }
)
SPACE = parse_space(TINY_SPACE.replace("layernorm", "batchnorm").replace("gelu", "relu6"), "t")
FAMILY = make_family(SPACE, [16, 32], [[16, 24], [8, 16, 24]])
BUDGET_MS = 0.6


def limits_of(space: SearchSpace) -> Limits:
    return (latency_limit(compute_table(load_device("cpu"), space), BUDGET_MS),)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=16, quiet=True)


def over(data: ImageData, family: SpaceFamily = FAMILY, **changes: Any) -> Searcher:
    within = layouts_within(family, limits_of)
    limits = mean_limits([each.limits for each in within])
    search = FamilySearch(family, limits_of, within)
    return Searcher(family.largest, limits, data, CONFIG.override(changes), family=search)


@pytest.fixture(scope="module")
def searched(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Searcher, Path]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    searcher = over(digits)
    run_search(searcher, folder, {"data": "digits", "data_digest": digits.digest})
    return searcher, folder


def passes(searcher: Searcher) -> list[tuple[int, tuple[int, ...] | None]]:
    """Return a list that gets the size of images and the widths of each pass from now on."""
    seen: list[tuple[int, tuple[int, ...] | None]] = []
    searcher.state.supernet.register_forward_pre_hook(
        lambda _, given: seen.append((given[0].shape[-1], given[2] if len(given) > 2 else None))
    )
    return seen


# ---- steps


@pytest.mark.parametrize("arch_every", [1, 1000])
def test_steps_run_at_the_widths_of_the_layout_that_they_draw(digits: ImageData, arch_every: int) -> None:
    searcher = over(digits, warmup_epochs=0, arch_every=arch_every)
    seen = passes(searcher)
    for _ in range(30):
        searcher.step()
    drawn = {(each.trained_px, each.channels) for each in searcher.problem.layouts}
    assert set(seen) <= drawn
    assert len(set(seen)) > len(drawn) / 2


def test_a_sandwich_has_the_greatest_the_drawn_and_the_least_widths(digits: ImageData) -> None:
    searcher = over(digits, weight_steps="sandwich", warmup_epochs=2)
    seen = passes(searcher)
    drawn = set()
    for _ in range(10):
        seen.clear()
        assert math.isfinite(searcher.step()["distilled_loss"])
        first, *between, last = (widths for _, widths in seen)
        assert (first, last) == (None, (16, 8))
        assert len(set(between)) == 1
        drawn |= set(between)
    assert len(drawn) > 2


def test_the_evaluator_of_a_layout_runs_its_networks(digits: ImageData) -> None:
    searcher = over(digits)
    for _ in range(3):
        searcher.step()
    state, supernet = searcher.state, searcher.state.supernet
    for each in state.problem.layouts:
        own = state.at(each.layout)
        network = tuple(0 for _ in own.problem.space.positions)
        arch = arch_from_indices(own.problem.space, network)
        evaluator = evaluator_of(own)
        built = supernet.subnet(arch, 10, each.space).eval()
        count = sum(p.numel() for p in built.parameters())
        alone = sum(layer.params for block in lower(each.space, arch, classes=10) for layer in block.layers)
        assert count == alone
        images, labels = next(stream(digits.heldout, 8, 0, 0, augment=False, device=torch.device("cpu")))
        with batch_statistics(built), torch.no_grad():
            expected = torch.nn.functional.cross_entropy(
                built(each.resized(images)), labels, reduction="none"
            )
        assert evaluator.build(arch).eval()(images).shape == (8, 10)
        found = evaluator.losses([network], images, labels)[0]
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-5)


# ---- what layouts add


def test_only_open_choices_of_layouts_have_numbers() -> None:
    layouts = [Layout(16, (8, 16)), Layout(16, (8, 24)), Layout(32, (8, 24))]
    assert open_choices(layouts) == [((-1, 16), (1, 16)), ((-1, 16), (1, 24)), ((-1, 32), (1, 24))]
    assert open_choices(layouts[:1]) == [()]
    numbers = fit_layout_numbers({Layout(px, (c, 8)): px + 0.5 * c for px in (16, 32) for c in (8, 24)})
    assert numbers.widths[1] == {}
    for px in (16, 32):
        for c in (8, 24):
            assert numbers.resolutions[px] + numbers.widths[0][c] == pytest.approx(px + 0.5 * c)


def test_without_effects_the_best_networks_of_all_layouts_score_about_alike(digits: ImageData) -> None:
    searcher = over(digits)
    rows, layouts = searcher.state.log_probabilities, searcher.problem.layouts
    scores = level_scores(layouts, rows)
    tops = [solve(rows, each.limits).score + scores.constant(each.layout) for each in layouts]
    before = [solve(rows, each.limits).score for each in layouts]
    assert sum(tops) == pytest.approx(0, abs=1e-6)
    assert max(tops) - min(tops) < 0.7 * (max(before) - min(before))


def test_effects_of_widths_are_counted(digits: ImageData) -> None:
    few, one = (
        over(digits, family, search_epochs=2000).problem for family in (FAMILY, make_family(FAMILY.largest))
    )
    for problem in (few, one):
        problem.config = problem.config.model_copy(update={"effect_networks": None})
    assert count_effect_networks(few) - count_effect_networks(one) == 32 * (1 + 1 + 2)


# ---- the result


def test_the_record_has_all_layouts_and_their_numbers(searched: tuple[Searcher, Path]) -> None:
    _, folder = searched
    document = json.loads((folder / names.FAMILY_FILE).read_text())
    assert [(e["resolution_px"], tuple(e["channels"])) for e in document["spaces"]] == [
        (layout.resolution_px, layout.channels) for layout in FAMILY.layouts()
    ]
    assert {entry["stage"] for entry in document["numbers"]} == {0, 1, 2}
    by_choice = {(entry["stage"], entry["value"]): entry["number"] for entry in document["numbers"]}
    for entry in document["spaces"]:
        values = enumerate((entry["resolution_px"], *entry["channels"]))
        assert entry["number"] == pytest.approx(sum(by_choice.get(value, 0.0) for value in values))
    assert any(entry["best"] is not None for entry in document["spaces"])


def test_the_run_is_one_in_the_space_of_the_chosen_layout(searched: tuple[Searcher, Path]) -> None:
    _, folder = searched
    run = read_finished_run(folder)
    assert run.family is not None
    assert run.space == FAMILY.at(run.family.layout)
    assert run.limits[0].amount(run.indices) <= BUDGET_MS
    verify_certificate(find_arch(folder))
    explain(run)
    told = "\n".join(family_lines(run.family))
    assert f"{FAMILY.label_of(run.family.layout)}, of 12 of tiny" in told
    assert f"{FAMILY.label_of(run.family.layout)}: trained at" in " ".join(told.split())
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<th>channels</th>" in page
    assert "-".join(map(str, run.family.layout.channels)) in page
    within = layouts_within(FAMILY, limits_of)
    assert "tiny at 12 layouts" in describe_layouts(FAMILY, within)
    assert "32 px, 6 choices of widths" in describe_layouts(FAMILY, within)


def test_a_number_that_was_changed_is_found(searched: tuple[Searcher, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(searched[1], tmp_path / "changed"))
    path = folder / names.FAMILY_FILE
    document = json.loads(path.read_text())
    entry = next(e for e in document["numbers"] if e["stage"] == 2)
    entry["number"] += 0.5
    write_json(path, document)
    with pytest.raises(CheckpointError, match="edited or damaged"):
        explain(read_finished_run(folder))
    entry["stage"] = 3
    write_json(path, document)
    with pytest.raises(CheckpointError, match=r"numbers is .*: edited or damaged"):
        read_finished_run(folder)


def test_other_budgets_are_solved_over_all_widths(searched: tuple[Searcher, Path], tmp_path: Path) -> None:
    _, folder = searched
    found = derive(folder, {"cpu": "0.4ms"}, data=None, out=tmp_path / "derived")
    assert found.space.name in {FAMILY.name_of(layout) for layout in FAMILY.layouts()}
    assert found.document["heldout_accuracy"] is not None  # ranked with the supernet, at its widths
    fronts = pareto(folder, "cpu", points=4, out=tmp_path / "pareto")
    spaces = {point["space"] for point in fronts.points}
    assert len(spaces) > 1
    for point in fronts.points:
        space = next(s for s in map(FAMILY.at, FAMILY.layouts()) if s.name == point["space"])
        assert point["macs"] == count_macs(lower(space, Arch(tuple(point["choices"]))))


def test_a_search_takes_so_many_layouts() -> None:
    many = make_family(SPACE, range(16, 48), [[16, 24, 32], [8, 16, 24]])
    with pytest.raises(SpaceError) as error:
        layouts_within(many, limits_of)
    assert str(error.value) == (
        "tiny: 32 x 3 x 3 = 288 resolutions and widths: a search takes at most 256: leave some out"
    )
