"""benchmarks/scale.py: its variants, sets of images, and the arithmetic of the projection."""

import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.places import ROOT

from qnas.data.lazy_images import LazyImages
from qnas.data.loading import load_data
from qnas.spaces.space import SearchSpace, load_space

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import image_sets  # type: ignore[import-not-found]
import projection  # type: ignore[import-not-found]
import scale  # type: ignore[import-not-found]

# ---- steps


def test_spaces_have_as_many_candidates_as_they_say_and_no_other_change() -> None:
    space = load_space("quadranet-mobile")
    for count, expansions in scale.CANDIDATES.items():
        own = scale.with_candidates(space, expansions)
        assert max(len(position.candidates) for position in own.positions) == count
        assert [s.channels for s in own.stages] == [s.channels for s in space.stages]
    assert scale.with_candidates(space, (2, 4)).digest == space.digest


def test_a_width_is_that_multiple_of_every_stage() -> None:
    space = load_space("quadranet-mobile")
    assert scale.with_width(space, 1.0).digest == space.digest
    for own, stage in zip(scale.with_width(space, 0.5).stages, space.stages, strict=True):
        assert own.channels == stage.channels or abs(own.channels - stage.channels / 2) <= 4
    assert scale.with_width(space, 0.5).stages[-1].channels == space.stages[-1].channels / 2


def test_paths_keep_to_the_budget_on_average_however_many_candidates(tiny_space: SearchSpace) -> None:
    few, many = (scale.with_candidates(tiny_space, values) for values in ((2, 4), range(1, 9)))
    budget_ms = scale.middle_ms(few)
    for space in (few, many):
        state = scale.make_searcher(space, budget_ms, 4).state
        shares = torch.softmax(state.supernet.alpha.masked_fill(~state.supernet.mask, -torch.inf), 1)
        table = scale.compute_table(scale.load_device("cpu"), space)
        means = (
            sum(float(share) * ms for share, ms in zip(row, own, strict=False))
            for row, own in zip(shares, table.ms, strict=True)
        )
        expected = table.fixed_ms + sum(means)
        assert expected <= budget_ms * 1.001
        if space is many:  # the even mean of all is above the budget, so that it binds
            assert expected == pytest.approx(budget_ms, rel=1e-3)


def test_all_variants_of_a_round_run_the_same_paths(
    tiny_space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = scale.make_searcher(tiny_space, scale.middle_ms(tiny_space), 4)
    ran: list[tuple[str, tuple[object, ...]]] = []
    forward = type(searcher.state.supernet).forward

    def noted(self: object, images: torch.Tensor, routes: list[object], *rest: object) -> torch.Tensor:
        ran.append((f"{images.shape[-1]} px", tuple(r for r in routes if isinstance(r, int))))
        found: torch.Tensor = forward(self, images, routes, *rest)
        return found

    monkeypatch.setattr(type(searcher.state.supernet), "forward", noted)
    variants = [scale.Variant(f"{px} px", searcher, px) for px in (16, 32)]
    times = scale.time_variants(variants, 4, 4, lambda: float(len(ran)))
    paths = {name: [path for own, path in ran if own == name] for name in ("16 px", "32 px")}
    assert sorted(paths["16 px"]) == sorted(paths["32 px"])
    assert len({*paths["16 px"]}) > 1, "other paths in another round"
    assert set(times.rounds) == {f"{px} px, {kind}" for px in (16, 32) for kind in scale.KINDS}
    assert all(len(values) == 4 for values in times.rounds.values())


def test_a_step_has_its_part_of_the_architecture_step_and_ratios_are_within_a_round() -> None:
    seconds = {
        "a, weight": [1.0, 10.0],
        "a, arch": [3.0, 30.0],
        "b, weight": [3.0, 20.0],
        "b, arch": [9.0, 60.0],
    }
    row = {"seconds": seconds}
    assert scale.whole_steps(row, "a") == [1 + 3 / scale.ARCH_EVERY, 10 + 30 / scale.ARCH_EVERY]
    assert scale.ratio(row, "b", "a") == pytest.approx((3 + 2) / 2)


# ---- processes


def test_an_efficiency_is_against_what_the_cores_allow() -> None:
    assert scale.efficiency("weak", 4, 2, 1.0, 2.0) == (2.0, 1.0)
    assert scale.efficiency("strong", 2, 2, 1.0, 0.625) == pytest.approx((1.6, 0.8))
    assert scale.efficiency("weak", 4, 16, 1.0, 1.0) == (4.0, 1.0)


def test_a_launch_that_fails_is_a_row_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = scale.Cache(tmp_path / "scale.jsonl")
    monkeypatch.setattr(scale, "launch", lambda *_: {"error": "no network interface"})
    text = scale.describe_processes(None, known)
    assert text.count("failed: no network interface") == 1 + 2 * (len(scale.RANKS) - 1)


@pytest.mark.slow
def test_steps_under_torchrun_send_the_gradients_of_a_path() -> None:
    alone, both = (scale.launch("quadranet-small", ranks, 8) for ranks in (1, 2))
    assert len(alone["step_s"]) == len(both["step_s"]) == scale.CYCLES
    assert alone["message_bytes"] == 0
    assert 0 < both["message_bytes"] < 4 * 3e6
    assert all(0 < part < whole for part, whole in zip(both["message_s"], both["step_s"], strict=True))
    failed = scale.launch("quadranet-small", 2, 7)  # cannot be split
    assert "error" in failed


# ---- images


def test_sets_have_as_many_images_as_they_say_each_with_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sets, "SHARD", 200)
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))
    drawn = image_sets.draw_images(7, (32, 24))
    assert len({*drawn}) == 7
    for kind, make in image_sets.MAKERS.items():
        spec = make(tmp_path / kind, 600, drawn)
        data = load_data(spec, resolution_px=16, memory_limit_bytes=0, quiet=True)
        assert sum(data.counts.values()) == 600
        assert len(data.classes) == image_sets.CLASSES
        assert isinstance(data.train.images, LazyImages)
        assert not data.broken
        assert not data.left_out
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert len(shards) == 3
    with tarfile.open(shards[2]) as shard:
        assert len({*shard.getnames()}) == 400


def test_a_set_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DIFFERENT", 10)
    task = {"kind": "shards", "images": 400, "limit": 0, "size": (32, 32), "resolution_px": 32}
    known = scale.Cache(tmp_path / "scale.jsonl")
    row = scale.image_row(task, tmp_path / "work", known)
    assert not list((tmp_path / "work").iterdir()), "the set is removed"
    for start in (row["first"], row["again"]):
        assert start["images"] == 400
        assert not start["in_memory"]
        assert start["images_per_s"] > 0
        assert start["held_bytes"] >= 0
    assert len(scale.image_cells(row)) == 9
    assert scale.image_row(task, tmp_path / "work", scale.Cache(tmp_path / "scale.jsonl")) == row
    broken = scale.image_row({**task, "images": 100}, tmp_path / "work", known)  # too few of each class
    assert "expected at least 3" in broken["error"]
    assert len(scale.image_cells(broken)) == 9


# ---- the projection


def row_of(machine: str, forward_s: float, weight_s: float, arch_s: float, batch: int) -> scale.Row:
    seconds = {"forward": forward_s, "weight": weight_s, "arch": arch_s}
    median = {f"224 px, {kind}": value for kind, value in seconds.items()}
    return {"machine": machine, "space": scale.SPACES[0], "batch": batch, "median_s": median}


def hours(line: str) -> float:
    (found,) = re.findall(r"\*\*([\d.]+) hours\*\*", line)
    return float(found)


def test_the_hours_are_those_of_the_steps() -> None:
    costs = projection.measured_costs(row_of("NVIDIA X", 0.1, 0.5, 1.5, 64))
    cluster = projection.Cluster(gpus=4, efficiency=0.5, batch=128)
    lines = list(projection.arithmetic(costs, cluster, "quadranet-mobile"))
    # 0.8 x 1,281,167 images in batches of 512, 10 + 30 epochs; the architecture's in the last 30, every third
    epoch = 1_024_934 // 512
    seconds = (40 * epoch * 1.0 + 30 * epoch // 3 * 3.0) / 0.5
    assert hours(lines[-2]) == pytest.approx(seconds / 3600, abs=0.05)
    # 300 epochs in batches of 4096, of which each GPU has 1024: 16 times those of the measurement
    assert hours(lines[-1]) == pytest.approx(300 * (1_281_167 // 4096) * 8.0 / 0.5 / 3600, abs=0.05)


def test_costs_follow_from_a_forward_pass_and_launches_bound_small_batches(tmp_path: Path) -> None:
    gpu = tmp_path / "gpu.json"
    network = {"network": "QuadraNet36-T", "dtype": "float32", "images_per_s": 1000.0}
    gpu.write_text(json.dumps({"device": "NVIDIA X", "batch": 64, "networks": [network]}))
    costs = projection.derived_costs(row_of("a CPU", 0.1, 0.3, 0.8, 8), gpu)
    share, launch_s = (
        projection.relative_ms(scale.SPACES[0]),
        projection.launch_seconds(scale.SPACES[0]),
    )
    assert costs.weight.image_s == pytest.approx(3 * share / 1000)
    assert costs.arch.image_s == pytest.approx(8 * share / 1000)
    assert costs.weight.step_s(1) == pytest.approx(3 * launch_s)
    assert costs.weight.step_s(100_000) == pytest.approx(100 * 3 * share)
    said = " ".join(costs.lines)
    assert all(word in said for word in ("measured, NVIDIA X", "measured, a CPU", "predicted", "assumed"))


def test_one_gpu_needs_no_efficiency_and_a_wrong_one_is_refused() -> None:
    assert projection.Cluster(gpus=1, efficiency=0.5).slower == 1
    assert projection.Cluster(gpus=8, efficiency=0.8).slower == pytest.approx(1.25)
    with pytest.raises(ValueError, match=r"0 < efficiency <= 1 must hold, but got .*efficiency=1\.2"):
        projection.Cluster(efficiency=1.2)


def test_what_was_measured_on_a_gpu_is_taken_before_what_is_derived(tmp_path: Path) -> None:
    known = scale.Cache(tmp_path / "scale.jsonl")
    options = type("Options", (), {"gpus": 8, "efficiency": 0.9, "gpu_batch": 64, "million": False})
    assert "was not run" in scale.describe_imagenet(options, known)
    common = {"part": "steps", "study": "resolution"}
    for number, machine in enumerate(("NVIDIA X", "a CPU")):
        row = row_of(machine, 0.1, 0.3, 0.8, 8)
        known.put({**common, "machine": machine, "space": row["space"]}, row | {"number": number})
    text = scale.describe_imagenet(options, known)
    assert "measured, NVIDIA X" in text
    assert "a CPU" not in text
    assert "torchrun --standalone --nproc-per-node 8" in text
    assert "--efficiency 0.9" in text
