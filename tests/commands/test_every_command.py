"""Laws of all commands: text of at most 80 columns, --json for scripts, silence when quiet."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.command_line import commands, qnas
from helpers.finished_runs import make_record
from helpers.measured_networks import fill_in, write_networks
from helpers.pickled_forests import predictor_files, write_zip
from helpers.tiny import TINY_SPACE

from qnas.nn.kernels import native
from qnas.spaces.space import load_space

RUN = "runs/union-mobile-vpu-30ms-adreno-630-20ms"
SMALL = "--epochs 1 --resolution 8"

# each command with what it is run with; those that take longer come in the order in which they build on
# each other
QUICK = {
    "check-data": "digits",
    "derive": f"{RUN} --device cpu --budget 20ms --device vpu --budget 30ms --max-params 2.5M --force",
    "pareto": f"{RUN} --device cpu,vpu,gpu,adreno-640 --points 4 --force",
    "report": RUN,
    "explain": RUN,
    "compare": f"{RUN} {RUN}-2 {RUN} {RUN}-2 {RUN} {RUN}-2 {RUN}",
    "tensorboard": RUN,
    "describe": "proxyless-mobile",
    "predict": f"{RUN} --device all",
    "devices": "",
    "rivals": "--device vpu --budget 30ms --device adreno-630 --budget 40ms --max-params 5M",
    "eval-latency": "networks.npz --device vpu",
    "table": "quadranet-small --device cpu",
    "predictors list": "",
    "predictors import": "myriadvpu_openvino2019r2.zip --device vpu",
    "predictors remove": "--device vpu",
    "fit-latency": "board/latencies.csv --device-name a-board-with-a-long-name --force",
    "calibrate": "board --device cpu --device-name a-calibrated-board-with-a-long-name --force",
    "doctor": "",
}
LONG = {
    "search": f"--space tiny.yaml --device vpu --budget 3ms --device adreno-630 --budget 1ms {SMALL} "
    "--out run --warmup-epochs 1 --random-networks 2 --force",
    "train-subnet": f"run {SMALL} --force",
    "export": "run --format onnx --format standalone --images 20 --measure --force",
    "sample": "--space tiny.yaml --n 3 --out few --force",
    "measure": "few --repeats 2 --force",
    "profile": "--space tiny.yaml --repeats 1 --force",
}


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished searches, measured networks, nn-Meter's predictors and a space."""
    place = tmp_path_factory.mktemp("every")
    mobile = load_space("union-mobile")
    for number, name in enumerate((RUN, f"{RUN}-2")):
        make_record(place / name, mobile, seed=number, share=0.3, rank=5, devices=("vpu", "adreno-630"))
        row = {"step": 1, "loss": 2.0}
        (place / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (place / "tiny.yaml").write_text(TINY_SPACE)
    write_zip(place / "myriadvpu_openvino2019r2.zip", predictor_files("myriad-vpu"))
    write_networks(place / "networks.npz", "vpu", (1.0, 1.08), "ab")
    return place


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    native.library()  # from the user's cache: in an empty one they are compiled, for many seconds
    monkeypatch.setenv("QNAS_HOME", str(folder / "home"))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Said:
    capsys.readouterr()
    code = qnas(*words)
    shown = capsys.readouterr()
    return Said(code, shown.out, shown.err)


def check(capsys: pytest.CaptureFixture[str], name: str, arguments: str) -> None:
    """Run a command as text and as JSON."""
    words = [*name.split(), *arguments.split()]
    options = {option for parameter in commands()[name].params for option in parameter.opts}
    text = said(capsys, *words)
    assert text.code == 0, text.err
    assert "\x1b" not in text.out + text.err, "colour where there is no terminal"
    if name == "table":
        assert "--json" not in options  # CSV is what scripts read
        return
    for line in text.out.splitlines():
        # a path is not broken, so that it can be copied; what it is stands in the first 12 columns
        assert len(line) <= 80 or len(line[12:].split()) == 1, line
    if name == "predictors remove":
        said(capsys, "predictors", "import", "myriadvpu_openvino2019r2.zip", "--device", "vpu", "-q")
    quiet = said(capsys, *words, "--json", *(["--quiet"] if "--quiet" in options else []))
    assert quiet.code == 0, quiet.err
    assert isinstance(json.loads(quiet.out), dict | list)
    # what is wrong is said nevertheless
    assert all(line.startswith("qnas: warning: ") for line in quiet.err.splitlines()), quiet.err


def test_no_command_is_left_out() -> None:
    assert QUICK.keys() | LONG.keys() == commands().keys()


@pytest.fixture(scope="module")
def _board(folder: Path) -> None:
    """A sample of networks with times that a shipped device's model makes up."""
    from qnas.commands.own_device import sample

    sample("quadranet-small", 40, "cpu", "arch", folder / "board", seed=0, force=False, quiet=True)
    fill_in(folder / "board", "vpu")


@pytest.mark.usefixtures("_board")
@pytest.mark.parametrize("name", QUICK)
def test_it_fits_80_columns_and_scripts_can_read_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(capsys, name, QUICK[name])


@pytest.mark.slow
def test_those_that_take_longer_too(capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in LONG.items():
        check(capsys, name, arguments)
