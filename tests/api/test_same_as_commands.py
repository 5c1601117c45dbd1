"""The Python API and the command line do the same work: their files are the same, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.command_line import succeed
from helpers.tiny import SOME, TINY_SPACE

import qnas
from qnas.runs.names import ARCH_FILE, CONFIG_FILE, RESULT_FILE, SUPERNET_FILE, WEIGHTS_FILE

OPTIONS = "--warmup-epochs 1 --epochs 1 --resolution 8 --random-networks 2 --k-best 5 --threads 1 -q"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[qnas.SearchResult, Path]:
    """The same search by the API and by the command, each trained and exported there."""
    folder = tmp_path_factory.mktemp("both")
    space = folder / "tiny.yaml"
    space.write_text(TINY_SPACE)
    limits = {"vpu": "1ms", "cpu": "500us"}
    result = qnas.run_search(space, limits, out=folder / "api", max_params="6k", threads=1, **SOME)
    asked = [word for name, budget in limits.items() for word in ("--device", name, "--budget", budget)]
    command = folder / "command"
    succeed("search", *asked, "--max-params", "6k", "--space", space, "--out", command, *OPTIONS.split())
    return result, command


def assert_same(one: Path, other: Path, *files: str) -> None:
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_search_writes_the_same_run(both: tuple[qnas.SearchResult, Path]) -> None:
    result, command = both
    names = {path.name for path in result.folder.iterdir() if path.is_file()}
    assert {ARCH_FILE, SUPERNET_FILE, "report.html"} < names
    assert names == {path.name for path in command.iterdir() if path.is_file()}
    # this run lies beside the other one, and is named in its page
    assert_same(result.folder, command, *(names - {"report.html", "search.json"}))
    assert qnas.load_run(command).document == result.document


def test_a_derivation_writes_the_same_network(
    both: tuple[qnas.SearchResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, command = both
    derived = qnas.derive(result, {"cpu": "700us"}, max_macs="2M", out=tmp_path / "api")
    assert capsys.readouterr() == ("", "")
    limits = ("--device", "cpu", "--budget", "700us", "--max-macs", "2M")
    succeed("derive", command, *limits, "--out", tmp_path / "command", "-q")
    documents = [json.loads((tmp_path / name / ARCH_FILE).read_text()) for name in ("api", "command")]
    assert documents[0].pop("supernet").endswith(f"api/{SUPERNET_FILE}")
    assert documents[1].pop("supernet").endswith(f"command/{SUPERNET_FILE}")
    assert documents[0] == documents[1]
    assert derived.heldout_accuracy == documents[0]["heldout_accuracy"] is not None
    assert derived.latencies_ms == {"cortex-a76": derived.latency_ms}
    assert derived.latency_ms <= 0.7


def test_a_confidence_is_the_same_by_api_and_command(
    both: tuple[qnas.SearchResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, command = both
    derived = qnas.derive(result, {"cpu": "700us"}, confidence=0.9, rerank=False, out=tmp_path / "api")
    words = ("--device", "cpu", "--budget", "700us", "--confidence", "0.9", "--no-rerank")
    succeed("derive", command, *words, "--out", tmp_path / "command", "-q")
    assert "its upper end stays within the budget" in " ".join(capsys.readouterr().out.split())
    documents = [json.loads((tmp_path / name / ARCH_FILE).read_text()) for name in ("api", "command")]
    assert documents[0]["limits"] == documents[1]["limits"]
    interval = derived.intervals["cortex-a76"]
    assert interval is not None
    assert interval.low_ms < derived.latency_ms < interval.high_ms <= 0.7
    plain = qnas.derive(result, {"cpu": "700us"}, rerank=False, out=tmp_path / "plain")
    assert plain.certificate["score"] >= derived.certificate["score"]
    again = qnas.DerivedNetwork.load(tmp_path / "api")
    assert again.intervals == derived.intervals
    assert again.limits[0].confidence == 0.9


def test_pareto_fronts_are_the_same(both: tuple[qnas.SearchResult, Path], tmp_path: Path) -> None:
    result, command = both
    fronts = qnas.pareto(result, ["vpu", "cpu"], points=3, out=tmp_path / "api")
    out = tmp_path / "command"
    succeed("pareto", command, "--device", "vpu,cpu", "--points", "3", "--out", out, "-q")
    assert_same(fronts.folder, out, "pareto.csv", "pareto.json", "pareto.png")
    assert {point["device"] for point in fronts.points} == {"myriad-vpu", "cortex-a76"}


def test_a_training_and_an_export_write_the_same_network(
    both: tuple[qnas.SearchResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, command = both
    capsys.readouterr()
    trained = qnas.train_subnet(result, epochs=1, threads=1, out=tmp_path / "api")
    files = qnas.export(trained, ["onnx"], images=20)
    assert capsys.readouterr() == ("", "")
    out = tmp_path / "command"
    succeed("train-subnet", command, "--epochs", "1", "--threads", "1", "--out", out, "-q")
    succeed("export", out, "--format", "onnx", "--images", "20")
    assert_same(trained.folder, out, ARCH_FILE, CONFIG_FILE, RESULT_FILE, WEIGHTS_FILE)
    assert_same(files.folder, out / "export", "model.onnx")
    assert trained.accuracy == json.loads((out / RESULT_FILE).read_text())["test_accuracy"]
    network = qnas.TrainedNetwork.load(trained.folder).build()
    assert not network.training
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, len(trained.classes))


def test_an_export_goes_into_the_run_that_the_network_was_trained_in(
    both: tuple[qnas.SearchResult, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(both[0].folder, tmp_path / "run")
    trained = qnas.train_subnet(run, epochs=1, threads=1)
    assert trained.folder == run / "subnet"
    assert qnas.export(trained, ["standalone"], images=4).folder == run / "export"


@pytest.mark.slow
def test_the_demo_is_the_same_through_the_api_and_the_command(tmp_path: Path) -> None:
    result = qnas.run_search("quadranet-mobile", {"vpu": "30ms"}, data="digits", out=tmp_path / "api")
    space = ("--space", "quadranet-mobile", "--data", "digits")
    succeed("search", "--device", "vpu", "--budget", "30ms", *space, "--out", tmp_path / "command", "-q")
    assert_same(result.folder, tmp_path / "command", ARCH_FILE)
    assert result.latency_ms <= 30
