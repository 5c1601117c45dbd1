"""A run killed at any moment can be resumed, and writes the same bytes as an undisturbed one.

Every run here is the command line in a separate process, forked from one that has torch imported.
"""

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers.pictures import write_digits
from helpers.tiny import TINY_SPACE

from qnas.commands import cli
from qnas.common.files import is_partial
from qnas.runs.checkpoint import BEFORE, NEWEST
from qnas.runs.metrics import Metrics
from qnas.runs.names import (
    ARCH_FILE,
    CONFIG_FILE,
    FINALISTS_FOLDER,
    LOCK_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SEARCH_FILE,
    SECONDS_FILE,
    SPACE_FILE,
    SPEED_FILE,
    SUPERNET_FILE,
    WEIGHTS_FILE,
)

EPOCH_STEPS = 17  # of the digits in batches of 64
WARMUP_STEPS, STEPS = 2 * EPOCH_STEPS, 4 * EPOCH_STEPS
CHECKPOINT_STEPS = 5
SEARCH = (
    "search --device vpu --budget 2.5ms --resolution 8 --warmup-epochs 2 --epochs 2 --random-networks 3 -q"
)
RECIPE = "schema: qnas.recipe/1\nepochs: 3\nbatch_size: 128\nresolution_px: 8\nlearning_rate: 5e-3\n"
FINALISTS = "--finalists 4 --finalist-epochs 2 --finalist-recipe"
FINALIST_STEPS = 1151 // 128  # of an epoch
TRAIN = "train-subnet --resolution 8 --epochs 3 -q"

Plan = Callable[[], None]  # what is to happen to a process, set up in it before it starts


# ---- what may happen to a process; functions that another process can be given by name


def kill_after_step(step: int, delay_s: float) -> None:
    """Die some time after a step, wherever the process is by then."""
    write = Metrics.write

    def write_and_arm(self: Metrics, row: dict[str, object]) -> None:
        write(self, row)
        if row["step"] == step:
            # no one handles it, so the system ends the process on the spot, as by kill -9
            signal.setitimer(signal.ITIMER_REAL, delay_s)

    Metrics.write = write_and_arm  # type: ignore[method-assign,assignment]


def kill_in_finalist(number: int, step: int, delay_s: float) -> None:
    """Die some time after a step of a finalist's training."""
    from qnas.search.finalists import FinalistTrainer

    take = FinalistTrainer.step

    def step_and_arm(self: FinalistTrainer) -> dict[str, float]:
        row = take(self)
        if (self.finalist.number, self.steps_done) == (number, step):
            signal.setitimer(signal.ITIMER_REAL, delay_s)
        return row

    FinalistTrainer.step = step_and_arm  # type: ignore[method-assign]


def kill_before(event: str, file: str, skip: int = 0) -> None:
    """Kill -9 right before an operation on a file; `skip` such operations go through first."""
    left = itertools.count(skip, -1)

    def watch(found: str, arguments: tuple[object, ...]) -> None:
        if found == event and any(str(each).endswith(file) for each in arguments) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def stop_after_step(step: int, number: int) -> None:
    """Be asked to stop in the middle of a step."""
    write = Metrics.write

    def write_and_stop(self: Metrics, row: dict[str, object]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), number)
        write(self, row)

    Metrics.write = write_and_stop  # type: ignore[method-assign,assignment]


def stop_in(where: str) -> None:
    """Be asked to stop by SIGTERM as a function is called: `qnas.data.loading.load_data`."""
    owner, _, name = where.rpartition(".")
    module, _, kind = owner.partition(":")
    holder = __import__(module, fromlist=["_"])
    holder = getattr(holder, kind) if kind else holder
    function = getattr(holder, name)

    def stop(*arguments: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    setattr(holder, name, stop)


def save_every(steps: int, seconds: float) -> None:
    """Save the state so often."""
    from qnas.search import finalists
    from qnas.search import search_result as outcome
    from qnas.training import loop as train
    from qnas.training import subnet_trainer as train_subnet

    for user in (outcome, finalists, train_subnet):
        user.run_to_end = partial(train.run_to_end, interval=train.Interval(steps, seconds))  # type: ignore[attr-defined]


def fill_the_disk() -> None:
    """Let no file have more than 20 kB, so that the state does not fit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


# ---- processes


def child(words: list[str], log: Path, plans: tuple[Plan, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for plan in plans:
        plan()
    sys.argv = ["qnas", *words]
    cli.main()


class Workplace:
    """A folder with a space, and processes that run commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.space = folder / "tiny.yaml"
        self.space.write_text(TINY_SPACE)
        self.log = folder / "log"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["helpers.warm"])
        with pytest.MonkeyPatch.context() as patches:  # Python 3.11 gives that process no other path
            patches.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
            forkserver.ensure_running()

    def qnas(self, command: str, *plans: Plan) -> int:
        """Run a command; return its exit code, below zero where a signal ended it."""
        words = [*command.split(), "--threads", "1"]
        often = partial(save_every, CHECKPOINT_STEPS, 1e9)
        process: BaseProcess = self._context.Process(target=child, args=(words, self.log, (often, *plans)))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "hangs"
        return process.exitcode

    def search(self, out: Path, *plans: Plan) -> int:
        return self.qnas(f"{SEARCH} --space {self.space} --out {out}", *plans)

    def resume(self, out: Path, *plans: Plan) -> int:
        return self.qnas(f"search --resume --out {out} -q", *plans)

    @property
    def said(self) -> str:
        return self.log.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal_runs(whole: Path, folder: Path) -> None:
    expected, found = contents(whole), contents(folder)
    assert sorted(found) == sorted(expected)
    # measured, so never the same
    for name in expected.keys() - {SPEED_FILE, f"{FINALISTS_FOLDER}/{SECONDS_FILE}"}:
        assert found[name] == expected[name], name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(place: Workplace) -> Path:
    """A search that nothing happened to, and that saved its state at other moments than all others."""
    folder = place.folder / "whole"
    assert place.search(folder, partial(save_every, 10**9, 0.05)) == 0, place.said
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {ARCH_FILE, SEARCH_FILE, SUPERNET_FILE, CONFIG_FILE, SPACE_FILE} < set(contents(folder))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def rest_slow(*values: object, fast: int) -> list[object]:
    """Mark all but the first `fast` values as slow: each takes two processes or more."""
    return [*values[:fast], *(pytest.param(value, marks=pytest.mark.slow) for value in values[fast:])]


@pytest.mark.parametrize("seed", rest_slow(*range(20), fast=1))
def test_killed_at_random_moments_of_warm_up_and_search(
    seed: int, place: Workplace, whole: Path, out: Path
) -> None:
    rng = random.Random(seed)
    in_warm_up = sorted(rng.sample(range(1, WARMUP_STEPS - 1), 2))
    in_search = sorted(rng.sample(range(WARMUP_STEPS, STEPS - 3), 2))
    start = place.search
    for step in (*in_warm_up, *in_search):
        assert start(out, partial(kill_after_step, step, rng.uniform(1e-6, 0.01))) == -signal.SIGALRM, (
            place.said
        )
        assert not (out / ARCH_FILE).exists()
        start = place.resume
    assert place.resume(out) == 0, place.said
    assert_equal_runs(whole, out)


# what a save does, in order, to the checkpoint that is written and to the two that stay
SAVING = [
    *[("open", NEWEST), ("open", NEWEST), ("os.rename", BEFORE)],
    *[("open", NEWEST), ("os.rename", NEWEST)],
]


@pytest.mark.parametrize("moment", rest_slow(3, 4, 0, 1, 2, fast=2))
@pytest.mark.parametrize("saves", rest_slow(9, 1, fast=1))  # in the search, in the warm-up
def test_killed_while_a_checkpoint_is_written(
    saves: int, moment: int, place: Workplace, whole: Path, out: Path
) -> None:
    event, file = SAVING[moment]
    if event == "open":  # three times a save: made, written, and brought to the disk
        number = sum(name == "open" for name, _ in SAVING[:moment])
        plan = partial(kill_before_write, file, 3 * saves + number)
    else:
        plan = partial(kill_before, event, file, saves - (file == BEFORE))  # nothing steps back for the first
    assert place.search(out, plan) == -signal.SIGKILL, place.said
    assert place.resume(out) == 0, place.said
    assert_equal_runs(whole, out)


def kill_before_write(file: str, skip: int) -> None:
    """Kill -9 right before the partial file of a file is opened; `skip` openings go through first."""
    left = itertools.count(skip, -1)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and is_partial(Path(str(arguments[0])), file) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


FILES = [ARCH_FILE, CONFIG_FILE, SPACE_FILE, METRICS_FILE, SEARCH_FILE, SUPERNET_FILE, REPORT_FILE]


@pytest.mark.parametrize("file", rest_slow(*FILES, fast=2))
def test_killed_before_a_file_is_there(file: str, place: Workplace, whole: Path, out: Path) -> None:
    """At the start; and after the last step, while the derived network is evaluated and written."""
    event = "open" if file == METRICS_FILE else "os.rename"
    assert place.search(out, partial(kill_before, event, file)) == -signal.SIGKILL, place.said
    if file == CONFIG_FILE:  # not even a run: started again, without --force
        assert place.resume(out) == 1
        assert "not a run folder" in place.said
        assert place.search(out) == 0, place.said
    else:
        assert place.resume(out) == 0, place.said
    assert_equal_runs(whole, out)


def test_killed_between_the_result_and_the_end(place: Workplace, whole: Path, out: Path) -> None:
    assert place.search(out, partial(kill_before, "os.remove", NEWEST, 1)) == -signal.SIGKILL, place.said
    assert (out / NEWEST).exists()
    assert place.resume(out) == 1
    assert "this search is complete" in place.said
    (out / LOCK_FILE).unlink(missing_ok=True)
    assert_equal_runs(whole, out)


@pytest.mark.parametrize("number", rest_slow(signal.SIGTERM, signal.SIGINT, fast=1))
@pytest.mark.parametrize("step", rest_slow(WARMUP_STEPS + 3, WARMUP_STEPS // 2, STEPS, fast=1))
def test_asked_to_stop_it_saves_and_exits_130(
    step: int, number: int, place: Workplace, whole: Path, out: Path
) -> None:
    assert place.search(out, partial(stop_after_step, step, number)) == 130, place.said
    assert f"qnas: interrupted: the state is saved in {out}" in place.said
    assert (out / METRICS_FILE).read_text().count("\n") == step  # not one step is lost
    assert place.resume(out) == 0, place.said
    assert_equal_runs(whole, out)


@pytest.mark.parametrize("where", ["qnas.data.loading.load_data", "qnas.nn.supernet:Supernet.subnet"])
def test_asked_to_stop_outside_the_steps_it_exits_130(
    where: str, place: Workplace, whole: Path, out: Path
) -> None:
    """While data are loaded, before there is anything to save; and in the final evaluation."""
    assert place.search(out, partial(stop_in, where)) == 130, place.said
    assert "Traceback" not in place.said
    start = place.resume if out.exists() else place.search
    assert place.resume(out, partial(stop_in, where)) == (130 if out.exists() else 1)
    assert start(out) == 0, place.said
    assert_equal_runs(whole, out)


@pytest.mark.parametrize("damage", rest_slow("cut", "flipped", "empty", fast=1))
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    damage: str, place: Workplace, whole: Path, out: Path
) -> None:
    step = WARMUP_STEPS + 3
    assert place.search(out, partial(stop_after_step, step, signal.SIGTERM)) == 130, place.said
    content = bytearray((out / NEWEST).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    (out / NEWEST).write_bytes(content[: {"cut": len(content) // 2, "flipped": None, "empty": 0}[damage]])
    # killed before it has saved anew, it is told again
    for plan in ((partial(kill_after_step, step - 1, 1e-6),), ()):
        assert place.resume(out, *plan) == (-signal.SIGALRM if plan else 0), place.said
        went_back = step - step % CHECKPOINT_STEPS
        assert f"qnas: warning: {out / NEWEST} is damaged" in place.said
        assert f"went back to the one before it, of step {went_back}" in place.said
    assert_equal_runs(whole, out)


def test_with_all_checkpoints_damaged_it_stops(place: Workplace, out: Path) -> None:
    assert place.search(out, partial(stop_after_step, WARMUP_STEPS, signal.SIGTERM)) == 130, place.said
    for name in (NEWEST, BEFORE):
        (out / name).write_bytes(b"no")
    assert place.resume(out) == 1
    (line,) = (line for line in place.said.splitlines() if line.startswith("qnas: error: "))
    assert f"{NEWEST} is damaged" in line
    assert f"{BEFORE} is damaged" in line
    assert "--force without --resume starts anew" in line


def test_a_full_disk_is_one_line_and_leaves_no_half_file(place: Workplace, out: Path) -> None:
    assert place.search(out, fill_the_disk) == 1
    (line,) = (line for line in place.said.splitlines() if "warning" not in line and "error" in line)
    assert line.startswith("qnas: error: ")
    assert "checkpoint.pt: File too large" in line
    assert "Traceback" not in place.said
    assert not (out / ARCH_FILE).exists()
    assert not list(out.glob("*.partial"))
    assert not list(out.glob(".*"))


def test_asked_something_else_it_is_not_resumed(place: Workplace, tmp_path: Path, out: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(TINY_SPACE)
    command = f"{SEARCH} --space {mine} --out {out}"
    assert place.qnas(command, partial(stop_after_step, WARMUP_STEPS, signal.SIGTERM)) == 130, place.said
    before = contents(out)
    mine.write_text(TINY_SPACE.replace("channels: 16", "channels: 24"))
    assert place.resume(out) == 1
    assert "the space changed" in place.said
    assert "channels 16 -> 24 in stage 2" in place.said
    mine.write_text(TINY_SPACE)
    assert place.qnas(f"search --resume --out {out} --seed 7 --batch-size 32 -q") == 1
    assert "batch size was 64, is 32; seed was 0, is 7" in place.said
    assert contents(out) == before


@pytest.fixture(scope="module")
def whole_finals(place: Workplace) -> tuple[str, Path]:
    """The command of a search with finalists, and its run to which nothing happened."""
    recipe, folder = place.folder / "finals.yaml", place.folder / "finals"
    recipe.write_text(RECIPE)
    command = f"{SEARCH} --space {place.space} {FINALISTS} {recipe} --out"
    assert place.qnas(f"{command} {folder}", partial(save_every, 10**9, 0.05)) == 0, place.said
    assert f"{FINALISTS_FOLDER}/{WEIGHTS_FILE}" in contents(folder)
    return command, folder


# in a rung, at its end, between two rungs, in the last one, and before the files of the finals
FINALIST_KILLS = [
    (partial(kill_in_finalist, 2, FINALIST_STEPS, 0.002), -signal.SIGALRM),
    (partial(kill_before, "os.rename", f"{FINALISTS_FOLDER}/{WEIGHTS_FILE}"), -signal.SIGKILL),
    (partial(kill_in_finalist, 1, 3, 1e-6), -signal.SIGALRM),
    (partial(kill_in_finalist, 4, FINALIST_STEPS, 0.01), -signal.SIGALRM),
    (partial(kill_before, "os.rename", f"{FINALISTS_FOLDER}/{SECONDS_FILE}"), -signal.SIGKILL),
    (partial(kill_before, "os.rename", ARCH_FILE), -signal.SIGKILL),
]


@pytest.mark.parametrize("at", rest_slow(*range(len(FINALIST_KILLS)), fast=2))
def test_killed_in_the_finals_it_goes_on_alike(
    at: int, place: Workplace, whole_finals: tuple[str, Path], out: Path
) -> None:
    (command, whole), (plan, code) = whole_finals, FINALIST_KILLS[at]
    assert place.qnas(f"{command} {out}", plan) == code, place.said
    assert not (out / ARCH_FILE).exists()
    assert place.resume(out) == 0, place.said
    assert_equal_runs(whole, out)


@pytest.mark.slow
def test_killed_again_and_again_in_the_finals_it_goes_on_alike(
    place: Workplace, whole_finals: tuple[str, Path], out: Path
) -> None:
    command, whole = whole_finals
    found = json.loads((whole / SEARCH_FILE).read_text())["finalists"]
    start = f"{command} {out}"
    for number, step in ((1, 2), (3, 5), (found["winner"], FINALIST_STEPS + 4)):
        plan = partial(kill_in_finalist, number, step, 0.002)
        assert place.qnas(start, plan) == -signal.SIGALRM, place.said
        start = f"search --resume --out {out} -q"
    assert place.resume(out) == 0, place.said
    assert_equal_runs(whole, out)


def test_asked_for_other_finalists_it_is_not_resumed(
    place: Workplace, whole_finals: tuple[str, Path], out: Path
) -> None:
    command, _ = whole_finals
    assert place.qnas(f"{command} {out}", partial(stop_after_step, WARMUP_STEPS, signal.SIGTERM)) == 130
    assert place.qnas(f"search --resume --out {out} --finalists 5 -q") == 1
    assert "finalists was 4, is 5" in place.said
    recipe = place.folder / "finals.yaml"
    recipe.write_text(RECIPE.replace("5e-3", "4e-3"))
    try:
        assert place.resume(out) == 1
    finally:
        recipe.write_text(RECIPE)
    assert "learning rate was 0.005, is 0.004" in place.said


EVERYTHING = (
    "--random-resized-crop 0.4 --randaugment 5 --mixup 0.4 --cutmix 1 --random-erasing 0.25 "
    "--stochastic-depth 0.2 --ema-decay 0.9 --accumulation 2"
)


@pytest.fixture(scope="module", params=["digits", pytest.param("shards", marks=pytest.mark.slow)])
def whole_training(
    request: pytest.FixtureRequest, place: Workplace, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The command of a training that does all there is to do, and its run to which nothing happened."""
    folder = tmp_path_factory.mktemp(request.param)
    data = request.param
    if data == "shards":
        data = f"shards:{write_digits(folder / 'data')}"
    train = f"{TRAIN} {whole} --weights scratch --recipe digits --data {data} {EVERYTHING} --out"
    out = folder / "whole"
    assert place.qnas(f"{train} {out}", partial(save_every, 10**9, 0.05)) == 0, place.said
    return train, out


@pytest.mark.parametrize("seed", rest_slow(*range(10), fast=1))
def test_training_killed_at_random_moments_goes_on_alike(
    seed: int, place: Workplace, whole_training: tuple[str, Path], out: Path
) -> None:
    train, expected = whole_training
    rng = random.Random(seed)
    rows = (expected / METRICS_FILE).read_text().count("\n")
    command = f"{train} {out}"
    for step in sorted(rng.sample(range(1, rows - 3), 3)):
        plan = partial(kill_after_step, step, rng.uniform(1e-6, 0.01))
        assert place.qnas(command, plan) == -signal.SIGALRM, place.said
        assert not (out / RESULT_FILE).exists()
        command = f"{train} {out} --resume"
    assert place.qnas(command) == 0, place.said
    assert_equal_runs(expected, out)


def test_training_a_network_that_was_killed_goes_on_alike(place: Workplace, whole: Path, out: Path) -> None:
    train = f"{TRAIN} {whole} --out"
    assert place.qnas(f"{train} {out.parent / 'whole'}", partial(save_every, 10**9, 0.05)) == 0, place.said
    assert place.qnas(f"{train} {out}", partial(kill_after_step, 30, 0.002)) == -signal.SIGALRM, place.said
    resume = f"{train} {out} --resume"
    assert place.qnas(resume, partial(kill_before, "os.rename", RESULT_FILE)) == -signal.SIGKILL, place.said
    assert place.qnas(resume.replace("--epochs 3", "--epochs 4")) == 1
    assert "epochs was 3, is 4" in place.said
    assert place.qnas(resume) == 0, place.said
    assert_equal_runs(out.parent / "whole", out)
    assert place.qnas(resume) == 1
    assert "this training is complete" in place.said
