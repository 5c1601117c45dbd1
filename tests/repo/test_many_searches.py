"""examples/many_searches.py: a grid of searches as jobs, which go on when they are stopped."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.places import ROOT

import qnas
from qnas.runs.checkpoint import NEWEST
from qnas.runs.names import ARCH_FILE, LOCK_FILE, METRICS_FILE

submitit = pytest.importorskip("submitit")

SCRIPT = ROOT / "examples" / "many_searches.py"
PRESET = """\
schema: qnas.search-preset/1
preset: few
resolution_px: 8
warmup_epochs: 1
search_epochs: {epochs}
batch_size: 64
learning_rate: 2e-3
arch_learning_rate: 0.1
arch_every: 2
threads: 1
effect_networks: 0
k_best: 2
random_networks: 1
"""
DEADLINE_S = 1800  # of a busy machine


def command(place: Path, *more: str) -> list[str]:
    """Return the command that submits searches of a tiny space to this machine."""
    common = ("--space", str(place / "tiny.yaml"), "--preset", str(place / "few.yaml"), "--minutes", "20")
    return [sys.executable, str(SCRIPT), str(place / "runs"), *common, *more]


def made(place: Path, tiny_yaml: Path, epochs: int) -> Path:
    """Write the preset beside the space, and return the folder of both."""
    (place / "few.yaml").write_text(PRESET.format(epochs=epochs))
    assert tiny_yaml.parent == place
    return place


def printed(place: Path, submit: list[str]) -> list[str]:
    """Run a command and return its lines, through a file: its jobs hold its output, and a pipe would wait."""
    with (place / "printed.txt").open("w+") as file:
        subprocess.run(submit, stdout=file, stderr=subprocess.STDOUT, check=True)
        file.seek(0)
        return file.read().splitlines()


def until(holds: Any, what: str) -> Any:
    """Wait until a function returns something, and return it."""
    end = time.monotonic() + DEADLINE_S
    while not (found := holds()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def steps(run: Path) -> list[int]:
    """Return the steps of a run so far."""
    lines = (run / METRICS_FILE).read_text().splitlines() if (run / METRICS_FILE).is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def holder(run: Path, other_than: int) -> int | None:
    """Return the process that works in a run's folder, None where there is no other."""
    content = (run / LOCK_FILE).read_text() if (run / LOCK_FILE).is_file() else ""
    return int(content) if content not in ("", str(other_than)) else None


def mark(run: Path) -> bytes:
    """Change a digit of the first row, so that it is seen whether it is written again; return the row."""
    (first, *_) = (run / METRICS_FILE).read_bytes().splitlines()
    marked = first[:-2] + (b"1" if first[-2:-1] != b"1" else b"2") + b"}"
    with (run / METRICS_FILE).open("r+b") as file:
        file.write(marked)
    return marked


def test_a_grid_has_every_budget_of_every_device_with_every_seed(tmp_path: Path) -> None:
    grid = runpy.run_path(str(SCRIPT))["grid"]
    found = grid(tmp_path, ["cpu=4ms,6ms", "devices/own.json=9000img/s"], [0, 7])
    assert {(device, budget, seed) for _, device, budget, seed in found} == {
        *(("cpu", "4ms", 0), ("cpu", "4ms", 7), ("cpu", "6ms", 0), ("cpu", "6ms", 7)),
        *(("devices/own.json", "9000img/s", 0), ("devices/own.json", "9000img/s", 7)),
    }
    folders = [out for out, *_ in found]
    assert len({*folders}) == 6
    assert all(out.parent == tmp_path for out in folders)


def test_a_job_starts_goes_on_or_is_done_by_what_is_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[dict[str, Any]] = []
    found = type("Found", (), {"latency_ms": 3.9, "accuracy": 0.5})
    monkeypatch.setattr(qnas, "run_search", lambda **given: called.append(given))
    monkeypatch.setattr(qnas, "load_run", lambda folder: found)
    search, out = runpy.run_path(str(SCRIPT))["Search"](), tmp_path / "cpu-4ms-3"
    task = (out, "cpu", "4ms", {"seed": 3})
    search(*task)
    out.mkdir()
    (out / "config.json").touch()  # written first
    again = search.checkpoint(*task)  # what runs when its time is up
    assert again.args == task
    assert again.result() == "cpu-4ms-3  3.900 ms  accuracy 50.0%"
    (out / ARCH_FILE).touch()  # written last
    search(*task)
    common = {"budgets": {"cpu": "4ms"}, "out": out, "seed": 3}
    assert called == [{**common, "resume": False}, {**common, "resume": True}]


@pytest.mark.slow
def test_jobs_go_on_when_their_time_is_up_and_when_they_were_killed(tmp_path: Path, tiny_yaml: Path) -> None:
    place = made(tmp_path, tiny_yaml, epochs=90)
    run = place / "runs" / "cpu-250us-0"
    submit = command(place, "--target", "cpu=250us", "--cluster", "local")
    (line,) = printed(place, submit)
    assert line.startswith("cpu-250us-0  submitted as ")
    number = line.split()[-1]
    until(lambda: (run / NEWEST).is_file(), "no checkpoint")
    marked = mark(run)
    worker = until(lambda: holder(run, other_than=0), "no process")
    os.kill(worker, signal.SIGUSR2)  # what SLURM sends before the time is up
    worker = until(lambda: holder(run, other_than=worker), "not queued again")
    before = len(steps(run))
    until(lambda: len(steps(run)) > before, "does not go on")
    os.kill(int(number), signal.SIGKILL)  # what watches the job on this machine
    os.kill(worker, signal.SIGKILL)
    assert not (run / ARCH_FILE).exists()
    lines = printed(place, [*submit, "--wait"])
    assert lines[0].startswith("cpu-250us-0  submitted as ")
    assert "accuracy" in lines[-1]
    found = steps(run)
    assert found == list(range(1, len(found) + 1))
    assert (run / METRICS_FILE).read_bytes().startswith(marked), "began again from the start"
    # a third call has nothing to do but to list it
    assert printed(place, submit) == lines[-1:]


@pytest.mark.slow
def test_searches_of_a_grid_have_results_of_their_own(tmp_path: Path, tiny_yaml: Path) -> None:
    place = made(tmp_path, tiny_yaml, epochs=1)
    targets = ("--target", "cpu=250us,400us", "--seeds", "0", "1")
    submit = command(place, *targets, "--cluster", "debug", "--wait")
    assert sum("accuracy" in line for line in printed(place, submit)) == 4
    for budget in ("250us", "400us"):
        for seed in (0, 1):
            run = place / "runs" / f"cpu-{budget}-{seed}"
            document = json.loads((run / ARCH_FILE).read_text())
            assert document["latency_ms"] <= float(budget[:-2]) / 1000
            assert json.loads((run / "config.json").read_text())["search"]["seed"] == seed
