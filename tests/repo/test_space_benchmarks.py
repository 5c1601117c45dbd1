"""Families of blocks and pretrained networks in benchmarks/, without their trainings."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.places import ROOT

from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.pretrained.catalogue import network_space
from qnas.nn.pretrained.derivation import own_arch
from qnas.solver.kinds import kinds_of
from qnas.spaces.arch import make_arch
from qnas.spaces.lower import count_macs, lower

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import experiments  # type: ignore[import-not-found]
import families  # type: ignore[import-not-found]
import pretrained  # type: ignore[import-not-found]
import table_three  # type: ignore[import-not-found]
import union_quality as union  # type: ignore[import-not-found]
from experiments import WINDOW

QUESTION = pretrained.Question(images=40, px=224, minutes=1.0, threads=1)

# ---- families of blocks


def test_families_have_the_candidates_of_their_kinds_and_the_union_has_all() -> None:
    of_tiny = families.union_of(families.TINY)
    kinds = set(kinds_of(of_tiny)[0])
    assert set(kinds_of(families.family_of(families.TINY, "inverted"))[0]) == {"mbconv", ""}
    quadratic = families.family_of(families.TINY, "quadratic")
    assert set(kinds_of(quadratic)[0]) == kinds - {"mbconv", "quadra_linear"}
    assert quadratic.stages == of_tiny.stages
    assert quadratic.digest != of_tiny.digest
    assert families.family_of(families.TINY, families.UNION) is of_tiny
    # where stages have candidates of their own, those are of the family too
    mobile = kinds_of(families.family_of(families.MOBILE, "quadratic"))
    assert [set(row) for row in mobile[:2]] == [{"star", ""}, kinds - {"mbconv", "quadra_linear"}]
    inverted = families.family_of(families.MOBILE, "inverted")
    assert {name for row in kinds_of(inverted) for name in row} == {"mbconv", ""}
    assert inverted.positions[0].names == ("mbconv_k3_e1", "mbconv_k3_e3", "identity")


def test_random_networks_of_a_family_take_the_budget_in_the_union() -> None:
    task = families.Task("cpu", 0.15, "digits")
    for family, count in union.RANDOM.items():
        found = families.random_networks(task, family, count)
        assert len({(space.digest, arch) for space, arch in found}) == count
        assert (len({space.digest for space, _ in found}) > 1) == (family == families.LAYOUTS)
        for space, arch in found:
            latency_ms = compute_table(load_device("cpu"), space).latency_ms(arch.indices(space))
            assert WINDOW * task.budget_ms <= latency_ms <= task.budget_ms * (1 + 1e-9)
            if family == "inverted":
                assert all(name.startswith("mbconv") or name == "identity" for name in arch.choices)


def test_other_devices_have_one_budget_on_the_first_data() -> None:
    tasks = union.tasks_of(["cpu", "gpu"], ["a", "b"], [0.1, 0.2])
    assert [(task.device, task.data, task.budget) for task in tasks] == [
        ("cpu", "a", 0.1),
        ("cpu", "a", 0.2),
        ("cpu", "b", 0.1),
        ("cpu", "b", 0.2),
        ("gpu", "a", 0.2),
    ]


def test_a_searched_network_of_the_usual_layout_is_one_of_the_union() -> None:
    inverted = families.family_of(families.TINY, "inverted")
    row = {"of_space": inverted.to_yaml(), "choices": [p.names[0] for p in inverted.positions]}
    space, arch = families.network_of(families.TINY, row)
    assert space is families.union_of(families.TINY)
    assert list(arch.choices) == row["choices"]
    stages = tuple(stage.model_copy(update={"channels": stage.channels + 8}) for stage in inverted.stages)
    wider = inverted.model_copy(update={"stages": stages})
    space, _ = families.network_of(families.TINY, row | {"of_space": wider.to_yaml()})
    assert [stage.channels for stage in space.stages] == [24, 40, 72]


@pytest.mark.parametrize("arm", ["inverted", families.ALONE, families.LAYOUTS])
def test_a_search_is_a_line_with_its_network_and_its_time(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "RECIPE", replace(families.RECIPE, images=200, epochs=2))
    monkeypatch.setattr(experiments, "PILOT_STEPS", 1)
    families.images_of.cache_clear()
    small = replace(families.TINY, seconds=0.1, finalists=2)
    task = families.Task("cpu", 0.3, "digits", small)
    searched = experiments.Cache(tmp_path / "searches.jsonl")
    row = families.search(task, arm, 0, searched)
    assert families.search(task, arm, 0, searched) is row
    assert families.search_parts(task, arm, 1) != {
        key: row[key] for key in families.search_parts(task, arm, 0)
    }
    assert row["latency_ms"] <= task.budget_ms
    assert row["epochs"] == (1, 1)
    assert row["spent_s"] > 0
    space, arch = families.network_of(small, row)
    if arm == "inverted":
        assert all(name.startswith("mbconv") or name == "identity" for name in arch.choices)
    trained = experiments.Cache(tmp_path / "trainings.jsonl")
    (found,) = [families.train(task, space, arch, trained)]
    parts = families.parts_of(task, space, arch)
    assert trained.get(parts) is found
    assert parts.get("px", 32) == 32 * space.input.resolution_px // 96
    families.images_of.cache_clear()


def test_gains_are_over_random_networks_of_the_union() -> None:
    def of(kind: str, accuracy: float) -> object:
        return union.Outcome(kind, accuracy, 1.0, 10**6, 10**3)

    task = families.Task("cpu", 0.15, "digits:x")
    found = [of("random union", 0.5), of("random union", 0.6), of("random inverted", 0.4)]
    found += [of("searched union", 0.58), of("searched union", 0.62)]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in union.describe(task, found).splitlines()
    ]
    by_kind = {row[0]: row for row in lines if row}
    assert by_kind["random union"][1:5] == ["2", "55.0 ± 7.1%", "+0.0", ""]
    assert by_kind["random inverted"][3] == "-15.0"
    assert by_kind["searched union"][3:5] == ["+5.0", "1, 2"]
    text = union.describe(task, [*found, of("searched inverted", 0.65), of("searched quadratic", 0.3)])
    assert text.endswith(
        "For a user: a search of the union gains +5.0 over random ones, of which the best of 2 is +5.0 from "
        "their mean, and it ends -5.0 beside one of the inverted blocks alone."
    )
    assert union.verdict([of("random quadratic", 0.4), of("random inverted", 0.5)]) == [
        "For a user: random quadratic networks are -10.0 points beside random inverted residuals."
    ]
    assert union.verdict(found[:2]) == []


def test_parts_of_a_latency_add_up_to_it() -> None:
    task = families.Task("cpu", 0.15, "digits:x")
    rows = [line.split("|")[1:-1] for line in union.describe_parts(task).splitlines()[2:]]
    by_family = {row[0].strip(): [float(cell) for cell in row[1:]] for row in rows}
    for family, count in union.RANDOM.items():
        networks = families.random_networks(task, family, count)
        _, macs, *parts = by_family[f"random {family}"]
        latencies_ms = [compute_table(load_device("cpu"), s).latency_ms(a.indices(s)) for s, a in networks]
        assert sum(parts) == pytest.approx(sum(latencies_ms) / count, abs=0.003)
        assert macs == pytest.approx(
            sum(count_macs(lower(*each)) for each in networks) / count / 1e6, abs=0.06
        )


def test_a_table_of_one_latency_has_means_and_the_papers_rows() -> None:
    task = families.Task("vpu", "30ms", "digits:x", families.MOBILE)
    assert task.budget_ms == 30.0
    space = families.union_of(families.MOBILE)
    small, large = (
        make_arch(space, tuple(position.names[at] for position in space.positions)) for at in (0, 1)
    )
    macs = [count_macs(lower(space, arch)) for arch in (small, large)]
    arms = {
        "inverted": [table_three.Found(small, 0.5), table_three.Found(large, 0.7)],
        "quadratic": [table_three.Found(large, 0.9)],
        "union": [],
    }
    text = table_three.describe(task, arms)
    rows = {
        row[0]: row
        for row in ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())
        if row
    }
    assert list(rows)[2:] == ["inverted", "quadratic", "ProxylessNAS, paper", "QuadraNet, paper"]
    assert rows["inverted"][1] == f"{sum(macs) / 2e6:.0f}"
    for device, cell in zip(("cpu", "vpu", "gpu"), rows["quadratic"][3:6], strict=True):
        own_ms = families.table_of(families.MOBILE, device).latency_ms(large.indices(space))
        assert float(cell) == pytest.approx(own_ms, abs=0.005)
    assert rows["inverted"][6].startswith("60.0 ± 14.1%")
    assert "+30.0 points beside inverted residuals (paper: +0.5); `quadratic` is ahead" in text


# ---- around a pretrained network


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("test", 80)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                (folder / split / name / f"{number}.jpg").write_bytes(b"")
    return pretrained.Arms(replace(QUESTION, images=8), 3, folder, folder / "work", 1)


def test_a_seed_draws_as_many_images_of_each_class_and_few_test_images(arms: pretrained.Arms) -> None:
    folder = Path(arms.data.removeprefix("imagefolder:"))
    assert [len(list((folder / "train" / name).iterdir())) for name in "ab"] == [4, 4]
    assert [len(list((folder / "test" / name).iterdir())) for name in "ab"] == [2, 2]


def test_arms_have_the_networks_that_they_are_named_for(arms: pretrained.Arms) -> None:
    whole = arms.network("whole", None)
    assert whole.latency_ms == pytest.approx(2 * arms.budget_ms)
    own = whole.arch.choices
    for name in ("smaller images", "smaller images, quadratic", "cut"):
        assert arms.network(name, None).latency_ms <= arms.budget_ms
    smaller = arms.network("smaller images", None)
    assert smaller.arch.choices == own
    larger = pretrained.space_at(pretrained.NETWORK, smaller.space.input.resolution_px + pretrained.PX_STEP)
    assert pretrained.latency_ms(larger, whole.arch) > arms.budget_ms
    products = arms.network("smaller images, quadratic", None)
    assert products.space.input.resolution_px < smaller.space.input.resolution_px
    assert [name.replace("_factored", "") for name in products.arch.choices] == list(own)
    assert all("factored" in name for name in products.arch.choices)
    cut = arms.network("cut", None)
    assert cut.space.input.resolution_px == 224
    assert cut.arch.choices != own == own_arch(cut.space, network_space(pretrained.NETWORK)).choices
    scratch = arms.network("from scratch", cut)
    assert (scratch.arch, dict(scratch.settings)) == (cut.arch, {"recipe": "photos"})
    # many images need no epochs for the classifier alone
    assert "head_epochs" not in cut.settings
    assert arms.network("searched", cut) is cut


def test_plans_and_answers_are_lines_of_one_file(tmp_path: Path) -> None:
    kept = pretrained.Answers(tmp_path / "lines.jsonl")
    assert kept.plan(QUESTION) is None
    plan = pretrained.Plan(QUESTION, {"searched": (2, 3), "whole": (0, 4)}, 5.0, "a processor")
    answer = pretrained.Answer(QUESTION, "whole", 1, 0.8, 2.0, 224, 10**6, (0, 4), 60.0, ("a", "b"))
    kept.add(plan)
    kept.add(answer)
    kept.add(pretrained.Plan(QUESTION, {"searched": (9, 9)}, 5.0, "another"))
    assert kept.plan(QUESTION) == plan
    assert kept.plan(replace(QUESTION, images=41)) is None
    assert kept.all() == [answer]
    assert kept.find(QUESTION, "whole", 1) == answer
    assert kept.find(QUESTION, "whole", 2) is None
    assert "80.0%" in pretrained.describe(QUESTION, kept.all())
