"""The command line as a user sees it: the whole way on the embedded data, and every bad input."""

import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.command_line import joined, qnas
from helpers.measured_networks import write_networks
from helpers.pickled_forests import predictor_files, write_zip
from helpers.tiny import TINY_SPACE
from PIL import Image
from safetensors.numpy import load_file

from qnas.common.errors import QnasError
from qnas.deploy.export_run import ExportRequest
from qnas.latency.device import device_names, load_device

SEARCH = ["search", "--device", "vpu", "--resolution", "8", "--epochs", "1", "--warmup-epochs", "1", "-q"]


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail as the user's mistake; return the one line it says."""
    capsys.readouterr()
    code = qnas(*arguments)
    said = capsys.readouterr()
    assert code == 1, said.err
    assert said.err.startswith("qnas: error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search: not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY_SPACE, encoding="utf-8")
    words = ("--space", folder / "tiny.yaml", "--budget", "1ms", "--out", folder / "run")
    assert qnas(*SEARCH, *words) == 0
    return folder / "run"


@pytest.fixture
def searched(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished search."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_from_a_budget_to_a_file_that_runs(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched = tmp_path / "run"
    assert qnas(*SEARCH, "--space", tiny_yaml, "--budget", "1ms", "--out", searched) == 0
    shown = capsys.readouterr().out
    document = json.loads((searched / "arch.json").read_text())
    assert document["latency_ms"] <= document["budget_ms"] == 1.0
    for word in ("stage 1", "of 1.000 ms", "from measurements", "MACs", "parameters", "random networks"):
        assert word in " ".join(shown.split())
    assert f"next qnas train-subnet {searched}" in joined(shown)

    assert qnas("train-subnet", searched, "--epochs", "2", "--resolution", "8", "-q") == 0
    shown = capsys.readouterr().out
    assert "from the supernet's weights" in " ".join(shown.split())
    assert f"next qnas export {searched}" in joined(shown)
    result = json.loads((searched / "subnet" / "result.json").read_text())
    assert f"{result['test_accuracy']:.2%}" in shown
    weights = load_file(searched / "subnet" / "weights.safetensors")
    assert sum(w.size for w in weights.values()) == result["params"]

    assert qnas("export", searched, "--json", "--format", "onnx") == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    model = onnx.load(facts["path"])
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["classes"]) == [str(i) for i in range(10)]
    session = onnxruntime.InferenceSession(facts["path"])
    (logits,) = session.run(None, {"images": np.zeros((7, 3, 8, 8), np.float32)})
    assert logits.shape == (7, 10)
    # what stands is not overwritten without being asked to
    before = Path(facts["path"]).read_bytes()
    assert "exists already: --force replaces it" in complaint(capsys, "export", searched, "--format", "onnx")
    assert Path(facts["path"]).read_bytes() == before
    again = ("--force", "--format", "onnx", "--allow-drop")
    assert qnas("export", searched, "--resolution", "16", *again) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("model.onnx (", "(batch, 3, 16, 16)", "all 359 test images of digits", "before the export"):
        assert word in shown
    assert "of 1.000 ms on myriad-vpu at 16 px, predicted for the file; certified is" in shown
    assert "resized trained at 8 px: " in shown


def latencies_without_px(shown: str) -> list[str]:
    """Return the fields and sentences of an output that name a latency, but no resolution."""
    fields: list[str] = []
    for line in shown.splitlines():
        if line[:1].isspace() and fields:
            fields[-1] += " " + line.strip()
        else:
            fields.append(line)
    return [field for field in fields if re.search(r"\d ms\b", field) and not re.search(r"\d px\b", field)]


def test_every_printed_latency_names_its_resolution(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert latencies_without_px("latency     1.0 ms\n            of 2 ms") == ["latency     1.0 ms of 2 ms"]
    assert latencies_without_px("latency     1.0 ms\n            at 8 px") == []
    assert qnas(*SEARCH, "--space", tiny_yaml, "--budget", "1ms", "--out", run) == 0
    shown = capsys.readouterr().out
    first = " ".join(shown.partition("stage 1")[0].split())
    assert "tiny on myriad-vpu at 32 px, 10 classes, within 1.000 ms" in first
    assert "trains on digits at 8 px: 1151 train" in first
    assert (
        "the budget holds for images of 32 px, not of 8 px: qnas train-subnet ends its training at" in first
    )
    assert "test images at 8 px, with supernet weights" in " ".join(shown.split())
    outputs = {"search": shown}
    for command in (
        ["train-subnet", "--epochs", "2", "-q"],
        ["export"],
        ["derive", "--device", "vpu", "--budget", "1ms", "-q"],
    ):
        assert qnas(command[0], run, *command[1:]) == 0
        outputs[command[0]] = capsys.readouterr().out
    for name, shown in outputs.items():
        assert re.search(r"\d ms\b", shown), name
        assert not latencies_without_px(shown), name
    assert "digits: 1438 training, 359 test images; 2 epochs at 32 px; run in" in " ".join(
        outputs["train-subnet"].split()
    )
    assert "certified" not in outputs["train-subnet"] + outputs["export"]
    # tables have the resolution in their title
    assert qnas("pareto", run, "--points", "2", "-q") == 0
    assert "myriad-vpu at 32 px: networks take" in capsys.readouterr().out
    assert qnas("explain", run) == 0
    assert "myriad-vpu at 32 px, within 1.000 ms" in capsys.readouterr().out
    assert qnas("compare", run, run) == 0
    assert "tiny, 32 px" in capsys.readouterr().out


def test_a_network_trained_at_another_size_is_said_not_to_be_the_certified_one(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ("--epochs", "6", "--learning-rate", "1e-2", "--weights", "scratch")
    assert qnas("train-subnet", searched, *rate, "--resolution", "8", "-q") == 0
    shown = " ".join(capsys.readouterr().out.split())
    said = "the network is trained at 8 px, and its latency is certified at 32 px only"
    assert shown.count(said) == 2, "before and after the training"
    assert said in html.unescape((searched / "report.html").read_text())
    assert "--allow-drop writes it nevertheless" in complaint(
        capsys, "export", searched, "--resolution", "64"
    )
    assert not (searched / "export").exists()


def test_how_int8_is_made_is_asked_for_by_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def export(source: Path, out: Path | None, request: ExportRequest) -> None:
        asked.append((request.ranges, request.symmetric))
        raise QnasError("enough")

    with monkeypatch.context() as patch:
        patch.setattr("qnas.deploy.export_run.export_trained", export)
        for options in ((), ("--symmetric", "--ranges", "entropy"), ("--no-symmetric",)):
            complaint(capsys, "export", tmp_path, "--precision", "int8", *options)
    assert asked == [("minmax", None), ("entropy", True), ("minmax", False)]
    told = complaint(capsys, "export", tmp_path, "--precision", "int8", "--ranges", "percent")
    assert "--ranges percent: did you mean percentile?" in told


def test_several_formats_at_once_and_what_does_not_go(
    searched: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qnas("train-subnet", searched, "--epochs", "2", "--resolution", "8", "-q") == 0
    assert "no int8: take fp32 or fp16, or the format onnx" in complaint(
        capsys, "export", searched, "--format", "standalone", "--precision", "int8"
    )
    assert "--format onyx: did you mean onnx?" in complaint(capsys, "export", searched, "--format", "onyx")
    assert "leave out --batch 2" in complaint(capsys, "export", searched, "--batch", "2", "--measure")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        told = complaint(capsys, "export", searched, "--format", "onnx", "--format", "openvino")
        assert "pip install openvino" in told
    assert not (searched / "export").exists()
    several = ("--format", "torch", "--format", "standalone", "--precision", "fp16", "--images", "20")
    assert qnas("export", searched, *several, "--measure") == 0
    shown = capsys.readouterr().out
    for word in (
        "model_fp16.pt2",
        "model_fp16.py + model_fp16.safetensors",
        "1 thread",
        "20 of the 359 test",
    ):
        assert word in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80 + len(str(searched))
    assert {path.name for path in (searched / "export").iterdir()} == {
        *("model_fp16.pt2", "model_fp16.pt2.parity.json", "model_fp16.py", "model_fp16.py.parity.json"),
        *("model_fp16.safetensors", "model-card.json", "model-card.md"),
    }
    card = json.loads((searched / "export" / "model-card.json").read_text())
    arch = json.loads((searched / "arch.json").read_text())
    assert card["certificate"] == arch["certificate"]
    assert card["limits"] == arch["limits"]


def test_the_latest_run_needs_no_name(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no finished run under runs/" in complaint(capsys, "train-subnet")
    (tmp_path / "runs").mkdir()
    searched.rename(tmp_path / "runs" / "mine")
    assert "no trained network here: run qnas train-subnet" in complaint(capsys, "export")
    assert qnas("train-subnet", "--epochs", "1", "--resolution", "8", "-q") == 0
    assert qnas("export", "--format", "onnx") == 0
    assert (tmp_path / "runs" / "mine" / "export" / "model.onnx").is_file()


def test_a_second_search_finds_a_folder_of_its_own(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("runs/tiny-vpu-1.5ms", "runs/tiny-vpu-1.5ms-2"):
        assert qnas(*SEARCH, "--space", tiny_yaml, "--budget", "1.5 ms") == 0
        assert (tmp_path / folder / "arch.json").is_file()


def test_an_arch_json_trains_from_scratch_in_a_folder_of_its_own(
    searched: Path, tmp_path: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "elsewhere" / "arch.json"
    lone.parent.mkdir()
    lone.write_bytes((searched / "arch.json").read_bytes())
    train = ("train-subnet", lone, "--epochs", "1", "--resolution", "8", "-q")
    assert "unknown search space 'tiny'" in complaint(capsys, *train)
    assert "no supernet" in complaint(capsys, *train, "--space", tiny_yaml, "--weights", "supernet")
    assert qnas(*train, "--space", tiny_yaml) == 0
    assert "from scratch" in " ".join(capsys.readouterr().out.split())
    assert qnas("export", tmp_path / "runs" / "tiny-subnet") == 0


def test_a_recipe_is_overridden_by_flags_and_kept_in_the_run(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "schema: qnas.recipe/1\nepochs: 9\nbatch_size: 100\nlearning_rate: 1e-3\nmixup: 0.5\n",
        encoding="utf-8",
    )
    train = ("train-subnet", searched, "--recipe", mine, "--epochs", "1", "-q")
    assert qnas(*train, "--cutmix", "1", "--teacher", "supernet-largest") == 0
    asked = json.loads((searched / "subnet" / "config.json").read_text())
    recipe = asked["train"]["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["mixup"], recipe["cutmix"]) == (1, 100, 0.5, 1.0)
    assert (recipe["start_resolution_px"], recipe["resolution_px"]) == (8, 32), "of the search, of the space"
    assert asked["teacher"] == "supernet-largest"
    shown = " ".join(capsys.readouterr().out.split())
    result = json.loads((searched / "subnet" / "result.json").read_text())
    assert f"95% interval {result['top1']['low']:.2%} to {result['top1']['high']:.2%}" in shown
    assert "images/s here at 32 px" in shown
    # what the run wrote is a recipe that asks for the same
    again = (
        "train-subnet",
        searched,
        "--recipe",
        searched / "subnet" / "recipe.yaml",
        "--out",
        "again",
        "-q",
    )
    assert qnas(*again, "--teacher", "supernet-largest") == 0
    assert json.loads(Path("again/config.json").read_text())["train"] == asked["train"]
    (searched / "subnet" / "result.json").unlink()  # as if stopped
    assert "batch size was 100, is 50" in complaint(capsys, *train, "--batch-size", "50", "--resume")
    told = complaint(capsys, *train, "--ema-decay", "2")
    assert told == "qnas: error: --ema-decay: expected less than 1, got 2.0\n"


def test_one_seed_gives_one_arch_json_in_separate_processes(
    finished: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    command = [*SEARCH, "--space", str(tiny_yaml), "--budget", "1ms", "--out", "run", "--seed", "0"]
    subprocess.run([sys.executable, "-m", "qnas.commands.cli", *command], cwd=tmp_path, check=True)
    assert json.loads((finished / "arch.json").read_text())["seed"] == 0
    assert (finished / "arch.json").read_bytes() == (tmp_path / "run" / "arch.json").read_bytes()


def test_a_stopped_search_exits_130_and_resumes_from_its_folder_alone(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qnas.search.searcher import Searcher

    step = Searcher.step

    def step_and_stop(self: Searcher) -> dict[str, float]:
        row = step(self)
        if self.steps_done == 10:
            os.kill(os.getpid(), 2)
        return row

    command: list[str | Path] = [*SEARCH, "--space", tiny_yaml, "--budget", "1ms", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Searcher, "step", step_and_stop)
        assert qnas(*command) == 130
    assert "interrupted: the state is saved" in capsys.readouterr().err
    assert "its search is not complete" in complaint(capsys, "train-subnet", tmp_path / "run")
    resume: tuple[str | Path, ...] = ("search", "--resume", "--out", tmp_path / "run", "-q")
    assert "cannot resume" in complaint(capsys, *resume, "--budget", "2ms"), "with the device of the run"
    assert "cannot resume" in complaint(capsys, *resume, "--device", "cpu"), "with the budget of the run"
    assert qnas(*resume) == 0
    assert qnas(*command[:-1], tmp_path / "whole") == 0
    assert (tmp_path / "run" / "arch.json").read_bytes() == (tmp_path / "whole" / "arch.json").read_bytes()
    assert "this search is complete" in complaint(capsys, *resume)


def test_a_budget_that_does_not_bind_is_said(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert qnas(*SEARCH, "--space", tiny_yaml, "--budget", "10s", "--out", tmp_path / "run") == 0
    assert "does not bind" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas(option) == 0
    assert "qnas" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "--budget", "30ms"],
        ["search", "--device", "vpu"],
        ["search", "--device", "vpu", "--budget", "30ms", "--no-such-option"],
        ["search", "--device", "vpu", "--budget", "30ms", "--epochs", "0"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "vpo", "--budget", "30ms"], ["unknown device 'vpo'", "did you mean", "vpu"]),
        (
            ["--device", "vpu", "--budget", "30ms", "--space", "quadranet-mobil"],
            ["unknown search space", "did you mean", "quadranet-mobile"],
        ),
        (["--device", "vpu", "--budget", "30"], ["'30' has no unit", "write 30ms"]),
        (["--device", "vpu", "--budget", "-5ms"], ["above zero"]),
        (["--device", "vpu", "--budget", "0ms"], ["above zero"]),
        (["--device", "vpu", "--budget", "5 minutes"], ["unknown unit 'minutes'"]),
        (["--device", "vpu", "--budget", "1ms"], ["no network of union-mobile", "the fastest takes 2."]),
        (["--device", "vpu", "--budget", "30ms", "--data", "imagenet:x"], ["imagenet", "imagefolder"]),
        (["--device", "vpu", "--budget", "30ms", "--data", "cifar10"], ["cifar10:DIR"]),
        (["--device", "vpu", "--budget", "30ms", "--data", "imagefolder:nowhere"], ["nowhere"]),
        (["--device", "vpu", "--budget", "30ms", "--space", "quadranet36-t"], ["one network only"]),
        (["--device", "vpu", "--budget", "30ms", "--resolution", "8"], ["too small", "at least 32 px"]),
        (
            ["--device", "vpu", "--budget", "30ms", "--latency-loss", "x"],
            ["error: --latency-loss: expected 'multiplier'", "got 'x'"],
        ),
        (["--device", "vpu", "--budget", "30ms", "--resume", "--out", "nowhere"], ["nowhere"]),
        (["--resume"], ["--resume needs --out"]),
        (
            ["--device", "vpu", "--device", "cpu", "--budget", "30ms"],
            ["2 times --device and 1 times --budget", "--device vpu --budget ... --device cpu --budget ..."],
        ),
        (
            ["--device", "vpu", "--budget", "30ms", "--device", "myriad-vpu", "--budget", "40ms"],
            ["myriad-vpu is given twice"],
        ),
        (["--device", "vpu", "--budget", "30ms", "--max-params", "2.5T"], ["--max-params '2.5T'", "2.5M"]),
        (["--device", "vpu", "--budget", "30ms", "--max-macs", "0"], ["--max-macs '0'", "above zero"]),
        (["--device", "vpu", "--budget", "30ms", "--max-macs", "1M"], ["at most 1.00M MACs", "smallest has"]),
        (
            ["--device", "vpu", "--budget", "30ms", "--weights", "x"],
            ["error: --weights: expected", "'nested'"],
        ),
        (["--device", "vpu", "--budget", "30ms", "--gradient", "x"], ["--gradient: expected 'two-path'"]),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = complaint(capsys, "search", *arguments)
    for word in words:
        assert word in said
    assert list(tmp_path.iterdir()) == []


def test_a_broken_space_reports_everything_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: qnas.space/1\nname: mine\nnorm: layer\nactivation: gelu\ninput: {resolution_px: -1}\n"
        "stem: {channels: 8, kernel: 2, stride: 2}\ntransition: conv\n"
        "candidates: [{block: quadro, kernel: 3, expansion: 2}]\nstages: []\n"
    )
    said = complaint(capsys, "describe", path)
    for key in ("mine.yaml", "norm", "resolution_px", "quadro", "stages", "head", "source"):
        assert key in said


def test_an_arch_of_another_space_or_schema_is_refused(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = searched / "arch.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": "qnas.arch/0"}))
    assert "schema: expected 'qnas.arch/1', got 'qnas.arch/0'" in complaint(capsys, "describe", searched)
    path.write_text(json.dumps(document))
    said = complaint(capsys, "describe", path, "--space", "quadranet-mobile")
    assert "belongs to space 'tiny'" in said
    path.write_text("{")
    assert "not JSON" in complaint(capsys, "train-subnet", searched)


def own_device(tmp_path: Path, tiny_yaml: Path) -> Path:
    """A device of one's own: a file, and a measured table beside it."""
    device = tmp_path / "board.json"
    device.write_text(
        json.dumps(
            {
                "schema": "qnas.device/1",
                "name": "board",
                "title": "a board on my desk",
                "runtime": "mine 1.0",
                "precision": "float32",
                "batch": 1,
                "unit": "ms",
                "kind": "measured",
                "source": "measured by hand",
                "date": "2026-11-21",
            }
        )
    )
    assert qnas("table", tiny_yaml, "--device", "cpu", "--out", tmp_path / "board" / "tiny.csv") == 0
    return device


def test_a_device_of_ones_own_is_searched_for(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = own_device(tmp_path, tiny_yaml)
    command = [
        "--resolution",
        "8",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--json",
        "-q",
        "--budget",
        "200us",
    ]
    assert qnas("search", "--device", device, "--space", tiny_yaml, *command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"] == "board"
    assert document["latency_ms"] <= 0.2
    assert "no latency table for space quadranet-small" in complaint(
        capsys, "search", "--device", device, "--budget", "30ms", "--space", "quadranet-small"
    )


def test_a_table_that_lacks_a_row_is_refused(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = own_device(tmp_path, tiny_yaml)
    table = tmp_path / "board" / "tiny.csv"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(row for row in rows if not row.startswith("1.2,") or "k5_e4" not in row))
    said = complaint(capsys, "search", "--device", device, "--budget", "1ms", "--space", tiny_yaml)
    assert "tiny.csv" in said
    assert "1.2" in said
    assert "quadra_k5_e4" in said


def write_photos(folder: Path) -> Path:
    """Write 20 photographs of cats and 20 of dogs; return one of them."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.jpg")
    return folder / "dogs" / "07.jpg"


def test_bad_data_is_refused_before_training(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "photos"
    data.mkdir()
    search = [*SEARCH, "--space", str(tiny_yaml), "--budget", "1ms", "--data", f"imagefolder:{data}"]
    assert str(data) in complaint(capsys, *search)
    victim = write_photos(data)
    assert qnas(*search, "--out", tmp_path / "good") == 0
    victim.write_bytes(victim.read_bytes()[:400])
    assert "07.jpg" in complaint(capsys, *search, "--out", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_broken_images_up_to_a_limit_are_left_out_and_listed(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and derivation have the limit of the search."""
    victim = write_photos(tmp_path / "photos")
    victim.write_bytes(victim.read_bytes()[:400])
    run = tmp_path / "run"
    search = [*SEARCH, "--space", str(tiny_yaml), "--budget", "1ms", "--random-networks", "0"]
    asked = ["--data", f"imagefolder:{tmp_path / 'photos'}", "--max-broken", "0.03", "--out", str(run)]
    assert qnas(*search, *asked) == 0
    assert f"1 broken image left out, listed in {run / 'broken.csv'}" in joined(capsys.readouterr().out)
    assert qnas("train-subnet", run, "--epochs", "1", "--resolution", "8", "-q") == 0
    assert "1 image left out: broken.csv" in capsys.readouterr().out
    for folder, result in ((run, "search.json"), (run / "subnet", "result.json")):
        with (folder / "broken.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row["file"] == str(victim)
        assert row["problem"].startswith("not a whole image: ")
        assert json.loads((folder / result).read_text())["broken_images"] == 1
    assert qnas("derive", run, "--device", "vpu", "--budget", "1.2ms", "--out", tmp_path / "derived") == 0
    assert "not ranked" not in " ".join(capsys.readouterr().out.split())
    assert qnas("export", run, "--format", "onnx") == 0  # which looks at the images that it needs alone
    assert "test images of photos" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_holds_a_run_is_left_alone(
    searched: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in searched.iterdir()}
    command: list[str | Path] = [*SEARCH, "--space", tiny_yaml, "--budget", "1ms", "--out", searched]
    assert "already holds a run" in complaint(capsys, *command)
    assert {path.name: path.read_bytes() for path in searched.iterdir()} == before
    assert qnas(*command, "--force", "--seed", "5") == 0
    assert json.loads((searched / "arch.json").read_text())["seed"] == 5


def test_a_folder_that_cannot_be_written_is_named(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    command: list[str | Path] = [
        *SEARCH,
        "--space",
        tiny_yaml,
        "--budget",
        "1ms",
        "--out",
        tmp_path / "file" / "run",
    ]
    assert "file" in complaint(capsys, *command)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_describe_counts_the_family_and_a_space(
    json_option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("describe", "quadranet36-t", *json_option) == 0
    shown = capsys.readouterr().out
    if json_option:
        facts = json.loads(shown)
        assert facts["params"] == pytest.approx(23.6e6, rel=0.01)
        assert facts["macs"] == pytest.approx(4.1e9, rel=0.01)
        assert sum(block["macs"] for block in facts["blocks"]) == facts["macs"]
    else:
        assert "23.6M parameters" in shown
        assert max(map(len, shown.splitlines())) <= 80
    assert qnas("describe", "quadranet-mobile", *json_option) == 0
    shown = capsys.readouterr().out
    if json_option:
        macs = json.loads(shown)["macs"]
        assert macs["min"] < 100e6
        assert macs["max"] > 350e6


def test_predict_and_devices_show_every_device(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    commands: list[list[str | Path]] = [["predict", searched], ["devices"]]
    for command in commands:
        assert qnas(*command) == 0
        shown = capsys.readouterr().out
        for device in ("cortex-a76", "myriad-vpu", "a100"):
            assert device in shown
    assert qnas("predict", searched, "--device", "vpu", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["latency_ms"] == json.loads((searched / "arch.json").read_text())["latency_ms"]
    assert "has many networks" in complaint(capsys, "predict", "quadranet-mobile")


def test_a_search_is_solved_again_for_another_device_and_trained(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arch = json.loads((searched / "arch.json").read_text())
    # the same device and budget: the same network, from the written probabilities
    command: list[str | Path] = ["derive", searched, "--device", "vpu", "--budget", "1ms", "--json"]
    assert qnas(*command) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["choices"] == arch["choices"]
    assert again["certificate"] == arch["certificate"]
    assert "exists already" in complaint(capsys, *command)
    assert qnas("derive", searched, "--device", "cpu", "--budget", "1ms") == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if str(searched) not in line) <= 80
    assert "on cortex-a76" in shown
    folder = searched / "derived" / "cpu-1ms"
    document = json.loads((folder / "arch.json").read_text())
    assert document["latency_ms"] <= document["limit_ms"] == document["budget_ms"] == 1.0
    assert qnas("train-subnet", folder, "--epochs", "1", "--resolution", "8", "-q") == 0
    assert json.loads((folder / "subnet" / "config.json").read_text())["from_supernet"] is True
    assert "the fastest takes" in complaint(
        capsys, "derive", searched, "--device", "cpu", "--budget", "1us", "--force"
    )
    assert "not the folder of a finished search" in complaint(
        capsys, "derive", folder, "--device", "cpu", "--budget", "1ms"
    )
    (searched / "search.json").write_text("{}")
    assert "search.json: schema: missing" in complaint(
        capsys, "derive", searched, "--device", "cpu", "--budget", "2ms"
    )


def test_several_devices_and_counts_all_hold(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--device", "cpu", "--budget", "800us", "--max-params", "5k", "--max-macs", "1M"]
    command: list[str | Path] = [*SEARCH, "--space", tiny_yaml, "--budget", "3ms", *limits]
    assert qnas(*command, "--k-best", "5", "--random-networks", "2") == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "runs" / "tiny-vpu-3ms-cpu-800us-5k-params-1M-macs"
    document = json.loads((folder / "arch.json").read_text())
    assert [(entry["name"], entry["budget"]) for entry in document["limits"]] == [
        ("myriad-vpu", 3.0),
        ("cortex-a76", 0.8),
        ("params", 5000.0),
        ("macs", 1e6),
    ]
    assert all(entry["amount"] <= entry["limit"] for entry in document["limits"])
    assert (document["device"], document["budget_ms"]) == ("myriad-vpu", 3.0)
    for file in ("table-myriad-vpu.csv", "table-cortex-a76.csv"):
        assert (folder / file).is_file()
    for words in (
        "of 0.8000 ms",
        "of 5.00K parameters",
        "of 1.00M MACs",
        "number",
        "MACs alone would choose",
    ):
        assert words in " ".join(shown.split()), words
    assert max(len(line) for line in shown.splitlines() if str(folder.name) not in line) <= 80
    config = json.loads((folder / "config.json").read_text())
    assert [entry["budget"] for entry in config["limits"]] == ["3ms", "800us", "5k", "1M"]
    assert config["search"]["k_best"] == 5
    assert (config["device"], config["budget"]) == ("vpu", "3ms")
    # and all hold when it is solved again
    again: list[str | Path] = [
        "derive",
        folder,
        "--device",
        "cpu",
        "--budget",
        "700us",
        "--device",
        "vpu",
        "--budget",
        "2.9ms",
    ]
    assert qnas(*again, "--max-params", "4500", "--json", "-q") == 0
    derived = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in derived["limits"]] == ["cortex-a76", "myriad-vpu", "params"]
    assert all(entry["amount"] <= entry["limit"] for entry in derived["limits"])
    assert len(derived["ranking"]) == derived["certificate"]["solved"] <= 5
    assert derived["heldout_accuracy"] == derived["ranking"][0]["heldout_accuracy"]


def test_a_stopped_search_under_several_limits_resumes_from_its_folder_alone(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qnas.search.searcher import Searcher

    step = Searcher.step

    def step_and_stop(self: Searcher) -> dict[str, float]:
        row = step(self)
        if self.steps_done == 20:
            os.kill(os.getpid(), 2)
        return row

    limits = ["--budget", "1.5ms", "--device", "cpu", "--budget", "300us", "--max-params", "5k"]
    with monkeypatch.context() as patch:
        patch.setattr(Searcher, "step", step_and_stop)
        assert qnas(*SEARCH, "--space", tiny_yaml, *limits, "--out", "run") == 130
    resume = ("search", "--resume", "--out", "run", "-q")
    assert "max-params" in complaint(capsys, *resume, "--max-params", "x")
    assert "cannot resume" in complaint(capsys, *resume, "--max-params", "4k")
    assert qnas(*resume) == 0
    document = json.loads(Path("run/arch.json").read_text())
    assert [entry["name"] for entry in document["limits"]] == ["myriad-vpu", "cortex-a76", "params"]


def test_without_its_data_a_search_is_solved_again_and_not_ranked(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((searched / "config.json").read_text())
    (searched / "config.json").write_text(json.dumps(config | {"data": "cifar10:nowhere"}))
    command: list[str | Path] = ["derive", searched, "--device", "vpu", "--budget", "1ms", "--force"]
    capsys.readouterr()
    assert qnas(*command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the first network by the search's scores, not ranked on held-out images: /" in shown
    assert "nowhere: no such file or folder" in shown
    assert "nowhere" in complaint(capsys, *command, "--rerank")
    (searched / "supernet.safetensors").unlink()
    assert qnas(*command, "--json") == 0
    derived = json.loads(capsys.readouterr().out)
    assert (derived["ranking"], derived["heldout_accuracy"]) == ([], None)
    assert derived["certificate"]["rank"] == 1
    assert qnas(*command, "--no-rerank") == 0
    assert "not ranked" not in capsys.readouterr().out


def test_a_budget_far_from_the_search_is_said(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command: list[str | Path] = ["derive", searched, "--device", "vpu", "--no-rerank", "--force"]
    assert qnas(*command, "--budget", "4ms") == 0
    assert "far from what was searched for" in " ".join(capsys.readouterr().out.split())
    assert qnas(*command, "--budget", "4ms", "--json") == 0
    assert "below what is allowed" in json.loads(capsys.readouterr().out)["warning"]
    document = json.loads((searched / "search.json").read_text())
    expected = f"{document['expected_ms']:.6f}ms"
    assert qnas(*command, "--budget", expected, "--json") == 0
    assert json.loads(capsys.readouterr().out)["warning"] is None


def test_a_calibrated_devices_margin_is_kept_and_recorded(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(load_device("vpu").to_json()) | {"name": "board", "aliases": []}
    content["calibration"] = {
        "scale": 1.1,
        "offset_ms": 0.01,
        "margin": 0.25,
        "level": 0.9,
        "n": 20,
        "date": "2026-01-01",
        "source": "test",
    }
    (tmp_path / "board.json").write_text(json.dumps(content))
    command: list[str | Path] = [*SEARCH, "--space", tiny_yaml, "--budget", "1.2ms", "--out", "run"]
    command[2] = "board.json"
    assert qnas(*command) == 0
    assert "a margin of 25.0% is kept" in capsys.readouterr().out
    assert qnas("devices", "board.json") == 0
    listed = capsys.readouterr().out
    assert "board: Myriad" in listed
    assert "calibrated on 20 networks, 2026-01-01: 1.100 times the model +0.01 ms" in listed
    assert max(map(len, listed.splitlines())) <= 80
    arch = json.loads(Path("run/arch.json").read_text())
    assert arch["margin"] == 0.25
    assert arch["limit_ms"] == pytest.approx(1.2 / 1.25)
    assert arch["latency_ms"] <= arch["limit_ms"]
    total = arch["certificate"]["fixed_ms"] + sum(arch["certificate"]["position_ms"])
    assert total == pytest.approx(arch["latency_ms"])


def test_a_search_without_effects_says_that_they_were_not_asked_for(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas(*SEARCH, "--space", tiny_yaml, "--budget", "1ms", "--effect-networks", "0") == 0
    assert "by the probabilities, as asked by --effect-networks 0" in joined(capsys.readouterr().out)


def test_an_unknown_source_of_latencies_is_refused(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected device or nn-meter" in complaint(capsys, "predict", searched, "--latency", "guess")


def test_nn_meters_predictors_answer_search_derive_and_predict(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))
    command: list[str | Path] = [*SEARCH, "--space", tiny_yaml, "--latency", "nn-meter", "--out", "run"]
    told = complaint(capsys, *command, "--budget", "1ms")
    assert "myriadvpu_openvino2019r2.zip" in told
    assert "qnas predictors import" in told
    assert "own model says" in told
    told = complaint(capsys, "predict", "quadranet25-xxs", "--latency", "nn-meter")
    assert "no nn-Meter predictors are imported: qnas predictors list says" in told
    archive = write_zip(tmp_path / "a.zip", predictor_files("myriad-vpu"))
    assert qnas("predictors", "import", archive, "--device", "vpu", "-q") == 0
    capsys.readouterr()
    assert qnas("predict", "quadranet25-xxs", "--latency", "nn-meter", "--json") == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert only["device"] == "myriad-vpu"  # the one that was imported
    assert {layer["kind"] for layer in only["dearest"]} <= {"direct", "stand-in", "uncovered"}
    assert "stand-in" in only["note"]
    assert qnas(*command, "--budget", "100s") == 0
    assert "direct" in capsys.readouterr().out
    arch = json.loads(Path("run/arch.json").read_text())
    assert arch["latency_source"] == "nn-meter"
    again = ["derive", "run", "--device", "vpu", "--budget", "100s", "--latency", "nn-meter"]
    assert qnas(*again, "--json") == 0
    assert json.loads(capsys.readouterr().out)["certificate"] == arch["certificate"]


def test_an_exported_file_is_predicted_as_its_architecture_and_measured(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("train-subnet", searched, "--epochs", "1", "-q") == 0
    assert qnas("export", searched, "--resolution", "32", "--format", "onnx") == 0
    capsys.readouterr()
    facts = []
    for target in (searched, searched / "export" / "model.onnx"):
        assert qnas("predict", target, "--device", "vpu", "--json") == 0
        facts += json.loads(capsys.readouterr().out)
    assert facts[0]["latency_ms"] == pytest.approx(facts[1]["latency_ms"], rel=1e-5)
    assert len(facts[1]["dearest"]) == 5
    assert qnas("predict", searched / "export" / "model.onnx") == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[1:])) <= 80
    before = json.loads((searched / "arch.json").read_text())
    assert qnas("measure", searched, "--repeats", "5") == 0
    shown = capsys.readouterr().out
    assert "for myriad-vpu: the measurement is" in shown
    after = json.loads((searched / "arch.json").read_text())
    measured = after.pop("measured")
    assert after == before
    assert 0 < measured["p50_ms"] <= measured["p95_ms"]
    assert measured["runtime"].startswith("onnxruntime")
    file = searched / measured["file"]
    assert measured["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    again = ("--force", "--format", "onnx", "--allow-drop")
    assert qnas("export", searched, "--resolution", "8", *again) == 0
    assert "--resolution 32 --force" in complaint(capsys, "measure", searched)
    file.unlink()
    assert "run qnas export" in complaint(capsys, "measure", searched)
    (searched / "broken.onnx").write_bytes(b"no")
    assert "broken.onnx" in complaint(capsys, "predict", searched / "broken.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("space", ["quadranet-small", "quadranet-small-mixed", "proxyless-mobile"])
def test_a_file_of_a_space_is_predicted_as_its_architecture_on_every_device(
    space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("sample", "--space", space, "--n", "1", "--format", "onnx", "--out", "sample", "-q") == 0
    (network,) = (tmp_path / "sample").glob("*.onnx")
    capsys.readouterr()
    found = []
    for target in (network, network.with_suffix(".json")):
        assert qnas("predict", target, "--json") == 0
        found.append({p["device"]: p["latency_ms"] for p in json.loads(capsys.readouterr().out)})
    assert set(found[0]) == set(device_names())
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_predictions_are_compared_with_measured_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_networks(tmp_path / "networks.npz", "vpu", (1.0, 1.08, 1.2, np.nan), "aabb")
    assert qnas("eval-latency", "networks.npz", "--device", "vpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "myriad-vpu"
    assert set(found["families"]) == {"a", "b"}
    every = found["all"]
    assert every["n"] == 3
    assert every["within_5"] == pytest.approx(1 / 3, abs=1e-3)
    assert every["within_10"] == pytest.approx(2 / 3, abs=1e-3)
    assert every["bias"] == pytest.approx(0.28 / 3, abs=1e-3)
    assert every["rmspe"] == pytest.approx(((0.08**2 + 0.2**2) / 3) ** 0.5, abs=1e-3)
    assert found["families"]["a"]["within_10"] == 1.0
    assert set(every) == {"n", "rmspe", "within_5", "within_10", "bias", "spearman"}
    assert qnas("eval-latency", "networks.npz", "--device", "vpu") == 0
    shown = capsys.readouterr().out
    assert "66.7%" in shown
    assert max(map(len, shown.splitlines())) <= 80
    (tmp_path / "broken.npz").write_bytes(b"no")
    assert "broken.npz" in complaint(capsys, "eval-latency", "broken.npz", "--device", "vpu")
    assert "myriad-vpu" in complaint(capsys, "eval-latency", "networks.npz", "--device", "cpu")


def test_a_profile_of_a_shipped_devices_name_is_refused_before_anything_is_measured(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = complaint(capsys, "profile", "--space", tiny_yaml, "--device-name", "cpu")
    assert "a device that ships has this name" in told
    assert not Path("devices").exists()
