"""Profiles on a runtime of known cost: an overhead per call, and a cost for every weight."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import typer
from helpers.command_line import joined
from torch import nn
from typer.testing import CliRunner

from qnas.commands.profile import profile
from qnas.common.errors import CheckpointError, Interrupted, TableError
from qnas.deploy.profiling import COPIES, NETWORKS, REPEATS, Profile, distinct_blocks, profile_space
from qnas.deploy.runtimes import Runtime, Shape
from qnas.deploy.timing import Maker, host_stopwatch
from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.table import RUNTIME
from qnas.nn.blocks import build_block, count_parameters
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import Slot, count_params, fill, lower, skeleton
from qnas.spaces.space import SearchSpace, load_space

EMPTY_MS = 0.25
MS_PER_WEIGHT = 1e-4


class Machine:
    """A runtime on a clock of its own."""

    def __init__(self, threads: int = 1, interrupt_at: int = -1, cheap_kernel: int = 0) -> None:
        self.now_ns = 0
        self.calls = 0
        self.compiled = 0
        self._interrupt_at = interrupt_at
        self._cheap_kernel = cheap_kernel
        self.runtime = Runtime(
            "fake",
            "cpu",
            threads,
            "fake 1.0",
            "no settings",
            self._compile,
            host_stopwatch(lambda: self.now_ns),
        )

    def _compile(self, module: nn.Module, shape: Shape) -> Maker:
        self.compiled += 1
        weights = count_parameters(module)
        if any(isinstance(m, nn.Conv2d) and m.kernel_size[0] == self._cheap_kernel for m in module.modules()):
            weights //= 2
        cost_ns = round((EMPTY_MS + MS_PER_WEIGHT * weights) * 1e6)

        def call() -> None:
            self.now_ns += cost_ns
            self.calls += 1
            if self.calls == self._interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)

        return lambda: call

    def profile(
        self,
        space: SearchSpace,
        folder: Path,
        *,
        name: str = "board",
        resume: bool = False,
        force: bool = False,
    ) -> Profile:
        return profile_space(
            space, self.runtime, name=name, folder=folder, repeats=6, resume=resume, force=force, quiet=True
        )


def test_every_block_of_a_space_is_a_part_once(tiny_space: SearchSpace) -> None:
    parts = distinct_blocks(tiny_space)
    # four candidates at 8 channels, one at 16, a transition, stem and head: identity costs nothing
    assert [part.name for part in parts.values()] == [
        "stem",
        "1.1 quadra_k3_e2",
        "1.1 quadra_k3_e4",
        "1.1 quadra_k5_e2",
        "1.1 quadra_k5_e4",
        "2.transition",
        "2.1 quadra_k3_e2",
        "head",
    ]
    chains = {part.name: part.copies for part in parts.values() if part.copies > 1}
    assert set(chains) == {name for name in (p.name for p in parts.values()) if "quadra" in name}
    assert set(chains.values()) == {COPIES}


@pytest.mark.parametrize("name", ["quadranet-small", "proxyless-mobile", "quadranet25-xxs"])
def test_a_part_takes_its_input_and_a_chain_fits_itself(name: str) -> None:
    space = load_space(name)
    for part in distinct_blocks(space).values():
        if part.block.layers[0].resolution_px > 32:
            continue
        with torch.no_grad():
            y = part.build().eval()(torch.zeros(1, *part.shape))
        assert (y.shape[1:] == part.shape) == (part.copies > 1)


def test_a_chain_has_weights_of_its_own_and_norms_that_do_something(tiny_space: SearchSpace) -> None:
    part = next(p for p in distinct_blocks(tiny_space).values() if p.copies > 1)
    chain = part.build()
    assert count_parameters(chain) == COPIES * count_parameters(build_block(part.block))
    for norm in (m for m in chain.modules() if isinstance(m, nn.LayerNorm)):
        assert norm.weight.std() > 0.01
        assert norm.bias.std() > 0.01


def test_cells_are_what_blocks_cost_without_what_a_call_adds(tiny_space: SearchSpace, tmp_path: Path) -> None:
    done = Machine().profile(tiny_space, tmp_path)
    fixed = dict(done.table.fixed)
    assert fixed[RUNTIME].latency_ms == pytest.approx(EMPTY_MS)
    for part in skeleton(tiny_space):
        if isinstance(part, Slot):
            row = done.table.ms[tiny_space.positions.index(part.position)]
            blocks = [fill(tiny_space, part, c) for c in part.position.candidates]
            expected = [MS_PER_WEIGHT * count_params([b]) for b in blocks]
            assert row == pytest.approx(expected, abs=2e-6)
            assert all((ms > 0) == bool(b.layers) for ms, b in zip(row, blocks, strict=True))
        else:
            assert fixed[part.name].latency_ms == pytest.approx(
                MS_PER_WEIGHT * count_params([part]), abs=2e-6
            )


def test_every_part_and_network_is_compiled_once(tiny_space: SearchSpace, tmp_path: Path) -> None:
    machine = Machine()
    done = machine.profile(tiny_space, tmp_path)
    assert machine.compiled == 1 + len(done.parts) + NETWORKS  # and the empty graph


def test_where_costs_add_up_sums_are_whole_networks(tiny_space: SearchSpace, tmp_path: Path) -> None:
    done = Machine().profile(tiny_space, tmp_path)
    assert len(done.networks) == NETWORKS
    assert abs(done.bias) < 1e-4
    figures = done.device.accuracy["whole networks of tiny"]["all"]
    assert (figures.n, figures.within_5_pct) == (NETWORKS, 100.0)
    arch = arch_from_indices(tiny_space, (0, 3, 0, 1))
    expected = EMPTY_MS + MS_PER_WEIGHT * count_params(lower(tiny_space, arch))
    assert done.table.latency_ms(arch.indices(tiny_space)) == pytest.approx(expected, abs=1e-5)


def test_the_written_device_is_read_as_any_other(tiny_space: SearchSpace, tmp_path: Path) -> None:
    done = Machine(threads=3).profile(tiny_space, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["board", "board.json", "tiny.csv"]
    device = load_device(tmp_path / "board.json")
    table = load_table(device, tiny_space)
    assert (table.ms, table.fixed_ms) == (done.table.ms, done.table.fixed_ms)
    assert table.coverage((0, 0, 0, 0)) == 1.0
    assert device.kind == "measured"
    assert "3 threads" in device.title
    assert "fake 1.0" in device.runtime
    assert re.search(r"\d+ cores.*clock", device.source)
    assert {cell.source for row in table.cells for cell in row} == {"measured: +-0.0%", "no operator"}


def test_a_larger_block_that_is_faster_is_reported(tiny_space: SearchSpace, tmp_path: Path) -> None:
    assert Machine().profile(tiny_space, tmp_path).outliers == ()
    odd = Machine(cheap_kernel=5).profile(tiny_space, tmp_path, force=True)
    assert any("1.1 quadra_k5_e2 takes" in text and "quadra_k3_e2" in text for text in odd.outliers)
    assert len(odd.outliers) == len(set(odd.outliers))


def test_an_interrupted_profile_goes_on_to_the_same_table(tiny_space: SearchSpace, tmp_path: Path) -> None:
    machine = Machine()
    expected = machine.profile(tiny_space, tmp_path / "whole").table
    with pytest.raises(Interrupted):
        Machine(interrupt_at=machine.calls // 2).profile(tiny_space, tmp_path)
    assert not (tmp_path / "board.json").exists()
    with pytest.raises(CheckpointError, match="an interrupted measurement: `resume=True`"):
        Machine().profile(tiny_space, tmp_path)
    with pytest.raises(CheckpointError, match=r"machine was .*1 thread.*, is .*2 threads"):
        Machine(threads=2).profile(tiny_space, tmp_path, resume=True)
    assert Machine().profile(tiny_space, tmp_path, resume=True).table == expected


def test_a_measurement_is_replaced_only_when_forced(tiny_space: SearchSpace, tmp_path: Path) -> None:
    Machine().profile(tiny_space, tmp_path)
    with pytest.raises(CheckpointError, match=r"tiny\.csv: exists already: `force=True`"):
        Machine().profile(tiny_space, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"describes another device: .*1 thread, this one is .*2 threads"
    ):
        Machine(threads=2).profile(tiny_space, tmp_path)
    assert "2 threads" in Machine(threads=2).profile(tiny_space, tmp_path, force=True).device.title


def test_a_second_space_joins_the_device_and_keeps_what_was_there(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    Machine().profile(tiny_space, tmp_path)
    file = tmp_path / "board.json"
    content = json.loads(file.read_text())
    calibration = {"scale": 1.1, "offset_ms": 0.0, "margin": 0.05, "level": 0.9, "n": 20}
    content["calibration"] = {**calibration, "date": "2026-01-01", "source": "by hand"}
    file.write_text(json.dumps(content))
    other = load_space("quadranet-small")
    device = Machine().profile(other, tmp_path).device
    assert set(device.accuracy) == {"whole networks of tiny", "whole networks of quadranet-small"}
    assert device.calibration is not None
    with pytest.raises(
        CheckpointError, match="describes another device"
    ):  # the other space's table would lie
        Machine(threads=2).profile(tiny_space, tmp_path, force=True)
    again = Machine().profile(tiny_space, tmp_path, force=True).device
    assert again.calibration is None  # it was made for the table that is gone


def test_a_bad_name_is_refused_before_anything_is_measured(tiny_space: SearchSpace, tmp_path: Path) -> None:
    machine = Machine()
    with pytest.raises(TableError, match="device a/b: name"):
        machine.profile(tiny_space, tmp_path, name="a/b")
    assert machine.calls == 0


def _invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(profile)
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_command_measures_this_machine(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_yaml.parent)
    options = ["--space", "tiny.yaml", "--runtime", "torch", "--repeats", "3", "--quiet"]
    code, text = _invoke(*options)
    assert code == 0
    assert "8 blocks of tiny" in text
    assert "--space tiny.yaml --budget" in joined(text)
    lines = [line for line in text.splitlines() if not line.startswith("next")]  # that is to be copied
    assert max(map(len, lines)) <= 80
    code, text = _invoke(*options, "--force", "--json")
    facts = json.loads(text)
    assert (facts["device"], facts["device_file"]) == ("local-torch", "devices/local-torch.json")
    table = load_table(load_device(facts["device_file"]), load_space("tiny.yaml"))
    assert table.fastest_ms == facts["fastest_ms"] > 0
    assert len(facts["networks"]) == NETWORKS


def test_the_command_repeats_as_often_as_a_profile_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(*_: object, repeats: int, **__: object) -> None:
        asked.append(repeats)
        raise TableError("enough")

    monkeypatch.setattr("qnas.deploy.profiling.profile_space", refuse)
    for options in ([], ["--repeats", "7"]):
        with pytest.raises(TableError, match="enough"):
            _invoke("--runtime", "torch", *options)
    assert asked == [REPEATS, 7]
