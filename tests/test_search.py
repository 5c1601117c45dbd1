import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qnas import run
from qnas.arch import find_arch
from qnas.data import ImageData, load_data
from qnas.derive import sample_near, solve
from qnas.errors import ArchError, CheckpointError, InfeasibleBudgetError, Interrupted
from qnas.latency.device import device_names, load_device
from qnas.latency.table import LatencyTable, compute_table, load_table
from qnas.limits import Limits, latency_limit
from qnas.originals import parse_data_spec
from qnas.outcome import run_search
from qnas.penalty import LATENCY_LOSSES, Multiplier, penalised
from qnas.search import (
    ANNEALED_SHARE,
    ARCH_BETAS,
    FINAL_TEMPERATURE,
    PRESETS,
    SearchConfig,
    Searcher,
    check_searchable,
)
from qnas.space import SearchSpace, load_space
from qnas.supernet import (
    expected_latency,
    expected_latency_of_pairs,
    latency_tensor,
    log_probabilities,
    renormalise_pair,
    sample_pairs,
)

CONFIG = SearchConfig(
    preset="test",
    resolution_px=8,
    warmup_epochs=1,
    search_epochs=2,
    batch_size=128,
    learning_rate=5e-3,
    arch_learning_rate=0.1,
    arch_every=1,
    random_networks=3,
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture
def table(tiny_space: SearchSpace) -> LatencyTable:
    return compute_table(load_device("vpu"), tiny_space)


def within(table: LatencyTable, budget_ms: float) -> Limits:
    return (latency_limit(table, budget_ms),)


def middle(table: LatencyTable) -> float:
    return (table.fastest_ms + table.slowest_ms) / 2


def search(
    space: SearchSpace, table: LatencyTable, data: ImageData, folder: Path, config: SearchConfig = CONFIG
) -> Path:
    searcher = Searcher(space, within(table, middle(table)), data, config)
    run_search(searcher, folder, {"data": "digits"}, quiet=True)
    return folder


def test_the_derived_network_is_within_budget_and_certified(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    folder = search(tiny_space, table, digits, tmp_path / "run")
    found = find_arch(folder)
    document = found.document
    assert document["budget_ms"] == middle(table)
    assert document["latency_ms"] == table.latency_ms(found.arch.indices(tiny_space)) <= middle(table)
    certificate = document["certificate"]
    total = certificate["fixed_ms"] + sum(certificate["position_ms"])
    assert total == pytest.approx(document["latency_ms"], rel=1e-12)
    assert certificate["score"] <= certificate["score_bound"] + 1e-6
    for key in ("schema", "space", "device", "budget_ms", "latency_ms", "choices", "seed"):
        assert key in document
    report = json.loads((folder / run.SEARCH).read_text())
    assert len(report["random"]) == 3
    for network in report["random"]:
        assert 0.97 * document["latency_ms"] <= network["latency_ms"] <= document["latency_ms"]
    assert not (folder / run.CHECKPOINT).exists()


def test_one_seed_gives_one_result_and_another_seed_another(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    folders = [search(tiny_space, table, digits, tmp_path / name) for name in ("a", "b")]
    for file in (run.ARCH, run.METRICS, run.SUPERNET, run.SEARCH):
        first, second = ((folder / file).read_bytes() for folder in folders)
        assert first == second, file
    other = search(tiny_space, table, digits, tmp_path / "c", replace(CONFIG, seed=1))
    assert (other / run.METRICS).read_bytes() != (folders[0] / run.METRICS).read_bytes()


@pytest.mark.parametrize("steps", [3, 8, 15])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    steps: int, tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    whole = search(tiny_space, table, digits, tmp_path / "whole")
    folder = tmp_path / "stopped"
    searcher = Searcher(tiny_space, within(table, middle(table)), digits, CONFIG)
    step = searcher.step

    def step_and_stop() -> dict[str, float]:
        row = step()
        if searcher.steps_done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    searcher.step = step_and_stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="state is saved"):
        run_search(searcher, folder, {"data": "digits"}, quiet=True)
    assert not (folder / run.ARCH).exists()
    # what came after the checkpoint does not count
    with (folder / run.METRICS).open("a") as file:
        file.write('{"step": 1000}\n')
    fresh = Searcher(tiny_space, within(table, middle(table)), digits, CONFIG)
    run_search(fresh, folder, {"data": "digits"}, resume=True, quiet=True)
    for file_name in (run.ARCH, run.METRICS, run.SUPERNET, run.SEARCH):
        assert (whole / file_name).read_bytes() == (folder / file_name).read_bytes(), file_name


def test_resuming_something_else_is_refused(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    folder = search(tiny_space, table, digits, tmp_path / "run")
    before = (folder / run.ARCH).read_bytes()
    searcher = Searcher(tiny_space, within(table, middle(table)), digits, replace(CONFIG, batch_size=64))
    with pytest.raises(CheckpointError, match=r"changed since it started: search was .*128.*, is .*64"):
        run_search(searcher, folder, {"data": "digits"}, resume=True, quiet=True)
    same = Searcher(tiny_space, within(table, middle(table)), digits, CONFIG)
    with pytest.raises(CheckpointError, match="is complete, there is nothing to resume"):
        run_search(same, folder, {"data": "digits"}, resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="already holds a run: give --resume"):
        run_search(same, folder, {"data": "digits"}, quiet=True)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run_search(same, tmp_path / "none", {"data": "digits"}, resume=True, quiet=True)
    assert (folder / run.ARCH).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    folder = search(tiny_space, table, digits, tmp_path / "run")
    (folder / run.ARCH).unlink()
    same = Searcher(tiny_space, within(table, middle(table)), digits, CONFIG)
    run.save_checkpoint(folder, {**same.to_dict(), "metrics_bytes": 0})
    content = (folder / run.CHECKPOINT).read_bytes()
    (folder / run.CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        run_search(same, folder, {"data": "digits"}, resume=True, quiet=True)


def test_force_leaves_nothing_of_the_former_run(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    folder = search(tiny_space, table, digits, tmp_path / "run")
    (folder / run.SUBNET).mkdir()
    (folder / run.SUBNET / "weights.safetensors").write_bytes(b"of another network")
    run_search(
        Searcher(tiny_space, within(table, middle(table)), digits, CONFIG),
        folder,
        {"data": "digits"},
        force=True,
        quiet=True,
    )
    assert not (folder / run.SUBNET).exists()


def test_an_impossible_budget_is_refused_before_anything_is_trained(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData
) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"the fastest takes \d"):
        Searcher(tiny_space, within(table, 0.9 * table.fastest_ms), digits, CONFIG)
    check_searchable(tiny_space, within(table, table.fastest_ms))


def test_a_fixed_space_is_not_searched(digits: ImageData) -> None:
    space = load_space("quadranet25-xxs")
    with pytest.raises(ArchError, match="one network only"):
        check_searchable(space, within(compute_table(load_device("vpu"), space), 1e6))


def test_without_a_binding_budget_the_latency_does_not_press(
    tiny_space: SearchSpace, table: LatencyTable, digits: ImageData
) -> None:
    searcher = Searcher(tiny_space, within(table, 2 * table.slowest_ms), digits, CONFIG)
    assert not searcher.binds
    assert Searcher(tiny_space, within(table, middle(table)), digits, CONFIG).binds
    for _ in range(searcher.warmup_steps + 1):
        searcher.step()
    assert searcher.state.multiplier.value == 0
    before = searcher.state.supernet.alpha.detach().clone()
    twin = Searcher(tiny_space, within(table, 3 * table.slowest_ms), digits, CONFIG)
    twin.load(copy.deepcopy(searcher.to_dict()))
    for _ in range(3):  # a pressure would differ between the budgets
        for each in (searcher, twin):
            each.step()
    assert not torch.equal(before, searcher.state.supernet.alpha)
    torch.testing.assert_close(searcher.state.supernet.alpha, twin.state.supernet.alpha, rtol=0, atol=0)


@pytest.mark.parametrize("form", LATENCY_LOSSES)
def test_every_form_of_the_latency_loss_searches(
    form: str, tiny_space: SearchSpace, table: LatencyTable, digits: ImageData, tmp_path: Path
) -> None:
    config = replace(CONFIG, latency_loss=form, search_epochs=1)  # type: ignore[arg-type]  # from a tuple
    folder = search(tiny_space, table, digits, tmp_path / "run", config)
    assert find_arch(folder).document["latency_ms"] <= middle(table)


def test_a_space_with_batch_norm_searches(digits: ImageData, tmp_path: Path) -> None:
    # its networks are evaluated with statistics of their own
    space = load_space("proxyless-mobile")
    data = load_data(parse_data_spec("digits"), resolution_px=32, quiet=True)
    table = load_table(load_device("cpu"), space)
    config = replace(CONFIG, resolution_px=32, warmup_epochs=0, search_epochs=1, random_networks=1)
    searcher = Searcher(space, within(table, 60.0), data, replace(config, batch_size=512))
    result = run_search(searcher, tmp_path / "run", {"data": "digits"}, quiet=True)
    assert result.solution.latency_ms <= 60.0


def test_presets_are_sound() -> None:
    assert {"digits", "small", "photos"} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.preset == name


SEARCHABLE = ["quadranet-mobile", "quadranet-small", "proxyless-mobile"]


@pytest.mark.parametrize("device", list(device_names()))
@pytest.mark.parametrize("space_name", SEARCHABLE)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_expected_latency_settles_at_the_budget(device: str, space_name: str, share: float) -> None:
    """With a task that pulls with noise and a taste of its own, at the digits preset's length."""
    space = load_space(space_name)
    table = load_table(load_device(device), space)
    budget_ms = table.fastest_ms + share * (table.slowest_ms - table.fastest_ms)
    counts = [len(row) for row in table.ms]
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    cells = latency_tensor(table, mask)
    generator = torch.Generator().manual_seed(0)
    # larger blocks are better, some positions more than others, and every look at it is noisy
    capacity = (cells / cells.max(1, keepdim=True).values) ** 0.5
    taste = -0.02 * capacity * (1 + torch.rand(len(counts), 1, generator=generator, dtype=torch.float64))
    alpha = torch.nn.Parameter(1e-3 * torch.randn(mask.shape, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.Adam([alpha], lr=0.1, betas=ARCH_BETAS)
    multiplier, steps, tail = Multiplier(), 380, []
    for step in range(steps):
        temperature = FINAL_TEMPERATURE ** min(1.0, step / (ANNEALED_SHARE * steps))
        sample = sample_pairs(alpha / temperature, mask, generator)
        gates = torch.stack([path.gates for path in sample.paths if not isinstance(path, int)])
        pull = taste[sample.rows].gather(1, sample.pairs) + 0.02 * torch.randn(
            gates.shape, generator=generator, dtype=torch.float64
        )
        task = (gates * pull).sum()
        expected = expected_latency_of_pairs(alpha / temperature, mask, table.fixed_ms, cells, sample)
        (latency_pull,) = torch.autograd.grad(expected / budget_ms, alpha, retain_graph=True)
        strength = multiplier.strength(float(latency_pull.norm()))
        loss = penalised("multiplier", task, expected, budget_ms, strength)
        (alpha.grad,) = torch.autograd.grad(loss, alpha)
        task_norm = float((alpha.grad - strength * latency_pull).norm())
        before = alpha.detach() / temperature
        optimizer.step()
        renormalise_pair(alpha, before, sample, temperature)
        value = float(expected_latency(alpha.detach() / temperature, mask, table.fixed_ms, cells))
        multiplier = multiplier.after(value, budget_ms, task_norm)
        tail.append(value / budget_ms - 1)
    # sharp probabilities have whole blocks, and one of a GPU's, which is mostly launches, may be a
    # seventh of the budget and more
    one_block = max(max(row) for row in table.ms) / budget_ms
    assert abs(float(np.mean(tail[-20:]))) < max(0.05, min(0.15, one_block))
    log_p = log_probabilities(alpha.detach() / temperature, mask)
    scores = tuple(tuple(row[:n].tolist()) for row, n in zip(log_p, counts, strict=True))
    solution = solve(scores, within(table, budget_ms))
    # the latency that was allowed is used, but for less than a block
    assert solution.latency_ms > (1 - max(0.15, one_block)) * budget_ms
    # and used well: better by the task's taste than random networks of the same latency
    rivals = sample_near(table, 0.97 * solution.latency_ms, solution.latency_ms, 20, np.random.default_rng(0))

    def quality(indices: tuple[int, ...]) -> float:
        return -float(sum(taste[row, i] for row, i in enumerate(indices)))

    assert quality(solution.indices) > float(np.mean([quality(indices) for indices in rivals]))
