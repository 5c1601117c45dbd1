"""An export killed at any moment leaves the former files or the new ones, and a card that speaks of them."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from helpers.command_line import succeed as qnas
from helpers.killed import every_kill, killed_before
from helpers.tiny import TINY_SPACE

from qnas.deploy.export.formats import FORMATS
from qnas.deploy.export_run import ExportRequest, export_trained
from qnas.runs.names import EXPORT_FOLDER, SUBNET_FOLDER, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors, save_tensors

pytestmark = pytest.mark.slow

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export of weights that are not those that it has now."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    space = folder.parent / "tiny.yaml"
    space.write_text(TINY_SPACE)
    few = "--resolution 8 --warmup-epochs 1 --epochs 1 --random-networks 0 -q --threads 1"
    qnas("search", *f"--device vpu --budget 2.5ms --space {space} --out {folder} {few}".split())
    qnas("train-subnet", *f"{folder} --resolution 8 --epochs 1 -q --threads 1".split())
    qnas("export", *f"{folder} --format onnx --format standalone --images 8".split())
    (folder / EXPORT_FOLDER / "notes.txt").write_text("mine")
    file = folder / SUBNET_FOLDER / WEIGHTS_FILE
    state = load_tensors(file)
    digest = save_tensors(file, {**state, "head.classifier.bias": state["head.classifier.bias"] + 0.01})
    result = folder / SUBNET_FOLDER / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "weights_sha256": digest}))
    return folder


def contents(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def assert_whole(folder: Path, run: Path, formats: set[str]) -> None:
    """Assert that a folder's card speaks of exactly the files that are there."""
    found = contents(folder)
    card = json.loads(found["model-card.json"])
    listed = {
        file: digest
        for entry in card["files"].values()
        for file, digest in zip(entry["files"], entry["digests"], strict=True)
    }
    beside = {
        "model-card.json",
        "model-card.md",
        "notes.txt",
        *(f"{name}.parity.json" for name in card["files"]),
    }
    assert found.keys() - beside == listed.keys()
    assert all(sha256(found[file]).hexdigest() == digest for file, digest in listed.items())
    assert {entry["format"] for entry in card["files"].values()} == formats
    weights = sha256((run / SUBNET_FOLDER / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert (card["weights_sha256"] == weights) == (formats == {"onnx"})


class Scene:
    """A copy of the run, and an export in it."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.former = folder / "run", contents(run / EXPORT_FOLDER)
        self._original = run
        self.out = self.run / EXPORT_FOLDER
        self.states: list[str] = []

    def prepare(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self._original, self.run)

    def export(self) -> None:
        request = ExportRequest(formats=("onnx",), images=8, force=True)
        export_trained(self.run, None, request)

    def check(self) -> None:
        if contents(self.out) == self.former:
            self.states.append("former")
        else:
            self.states.append("new")
            assert_whole(self.out, self.run, {"onnx"})
            assert "notes.txt" in contents(self.out)
        seen = {path.name for path in self.run.iterdir()} - {path.name for path in self._original.iterdir()}
        assert all(name.startswith(".export.") for name in seen), seen


def quick(monkeypatch: pytest.MonkeyPatch, scene: Scene) -> None:
    """Let the network be traced once only: its files are the same in every export."""
    scene.prepare()
    made = scene.run.parent / "made.onnx"
    scene.export()
    shutil.copy(scene.out / "model.onnx", made)

    def write(product: object, variant: object, path: Path, where: str) -> None:
        path.write_bytes(made.read_bytes())

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))


def test_the_scene_is_what_it_should_be(run: Path, tmp_path: Path) -> None:
    scene = Scene(run, tmp_path)
    scene.prepare()
    assert_whole(scene.out, scene.run, {"onnx", "standalone"})
    scene.export()
    scene.check()
    assert scene.states == ["new"]


def test_killed_before_any_file_operation(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(run, tmp_path)
    quick(monkeypatch, scene)
    operations = every_kill(scene.export, scene.run, scene.prepare, scene.check)
    assert operations > 30
    assert {"former", "new"} == set(scene.states)
    switched = scene.states.index("new")
    assert set(scene.states[switched:]) == {"new"}  # once they are new they stay so
    # what killed exports left goes with the next, whatever it exports
    for number in (switched - 1, switched + 1):
        scene.prepare()
        assert killed_before(number, scene.export, scene.run)
        scene.export()
        assert {path.name for path in scene.run.iterdir()} == {path.name for path in run.iterdir()}


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(seed: int, run: Path, tmp_path: Path) -> None:
    """Also within a system call, and in what onnx and torch write on their own."""
    scene, rng = Scene(run, tmp_path), random.Random(seed)
    scene.prepare()
    started = time.monotonic()
    scene.export()
    took = time.monotonic() - started
    for _ in range(3):
        scene.prepare()
        delay_s = rng.uniform(1e-6, took)
        process = os.fork()
        if process == 0:
            try:
                # no one handles it, so the system ends the process on the spot, as by kill -9
                signal.setitimer(signal.ITIMER_REAL, delay_s)
                scene.export()
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        scene.check()
