"""A search from Python: its result, errors, progress and interruption, and a caller's own losses."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import FEW, TINY_SPACE
from torch import Tensor

import qnas
from qnas.common.errors import CheckpointError, Interrupted, QnasError, TableError, UsageError
from qnas.common.progress import Report
from qnas.nn.subnet import subnet_state
from qnas.runs.names import ARCH_FILE, METRICS_FILE, SEARCH_FILE, SUPERNET_FILE
from qnas.runs.tensors import load_supernet
from qnas.spaces.space import SearchSpace, parse_space


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> qnas.SearchResult:
    return search(tmp_path_factory.mktemp("runs") / "run")


def search(out: Path, **changes: Any) -> qnas.SearchResult:
    space = parse_space(TINY_SPACE, "tiny.yaml")
    return qnas.run_search(space, {"vpu": "1ms"}, out=out, **{**FEW, **changes})


def test_nothing_is_printed_and_the_callers_threads_stay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        search(tmp_path / "run", threads=threads)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert capfd.readouterr() == ("", "")


def test_a_function_is_told_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[Report] = []
    found = search(tmp_path / "run", progress=reports.append)
    assert capsys.readouterr() == ("", "")
    steps = [report for report in reports if report.phase == "search" and report.warning is None]
    rows = (found.folder / METRICS_FILE).read_text().splitlines()
    assert [report.done for report in steps] == list(range(1, len(rows) + 1))
    assert {report.total for report in steps} == {len(rows)}
    assert {report.phase for report in reports} >= {"search", "rank", "compare"}


def test_a_result_reads_its_folder(result: qnas.SearchResult) -> None:
    again = qnas.load_run(result.folder)
    assert again.document == result.document
    assert again.arch == result.arch
    assert again.latency_ms <= 1.0
    assert again.certificate["rank"] == result.ranking[0]["rank"]
    assert 0 <= again.accuracy <= 1
    assert again.report.is_file()
    assert "tiny: " in repr(again)
    with pytest.raises(CheckpointError, match="not the folder of a finished search"):
        qnas.load_run(result.folder.parent)


def test_a_built_network_has_the_supernets_weights(result: qnas.SearchResult) -> None:
    network = result.build()
    assert not network.training
    weights = subnet_state(load_supernet(result.folder / SUPERNET_FILE), result.space, result.arch)
    state = network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    logits = network(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 10)
    assert logits.std() > 0


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    result: qnas.SearchResult, tmp_path: Path
) -> None:
    def stop(report: Report) -> None:
        if report.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="the state is saved in"):
        search(out, progress=stop)
    assert not (out / ARCH_FILE).exists()
    with pytest.raises(CheckpointError, match="cannot resume"):
        qnas.run_search(budgets={"vpu": "2ms"}, out=out, resume=True, space=result.space)
    qnas.run_search(out=out, resume=True)  # with its space, of which the run has a copy
    for name in (ARCH_FILE, METRICS_FILE):
        assert (out / name).read_bytes() == (result.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": {"vpu": "1"}}, "'1' has no unit: write 1ms"),
        ({"budgets": {"vpu": 1}}, "'1' has no unit: write 1ms"),
        ({"budgets": None}, "`budgets`: expected a device with its budget"),
        ({"budgets": {"vpo": "1ms"}}, "unknown device 'vpo'"),
        ({"max_params": "many"}, "`max_params` 'many': expected a number"),
        ({"space": "quadranet-mobil"}, "did you mean quadranet-mobile"),
        ({"resume": True}, "`resume=True` needs `out`"),
        ({"data": "imagefolder:nowhere"}, "nowhere"),
        ({"search_epochs": 0}, "`search_epochs`: expected at least 1, got 0"),
        ({"serch_epochs": 1}, "`serch_epochs`: unknown key"),
        ({"resolution_px": 8}, "too small"),
        ({"preset": "digit"}, "unknown search preset 'digit'"),
        ({"budgets": "4ms"}, "`budgets='4ms'`: expected devices with budgets"),
        ({"budgets": ["cpu", "4ms"]}, "`budgets=['cpu', '4ms']`: expected devices with budgets"),
        ({"budgets": 3}, "`budgets=3`: expected devices with budgets"),
        ({"budgets": [3]}, "`budgets=[3]`: expected devices with budgets"),
        ({"budgets": {3: "4ms"}}, "`device=3`: expected a name or a path"),
        ({"space": 3}, "`space=3`: expected a name or a path"),
        ({"loss": 3}, "`loss=3`: expected a name or a function"),
        ({"metric": 3}, "`metric=3`: expected a name or a function"),
        ({"max_broken": "x"}, "`max_broken='x'`: expected a share, 0 to 1"),
        ({"max_broken": 1.5}, "`max_broken=1.5`: expected a share, 0 to 1"),
        ({"progress": 3}, "`progress=3`: expected True, False or a function"),
    ],
)
def test_errors_name_arguments_and_come_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"budgets": {"vpu": "30ms"}, **changes}
    with pytest.raises(QnasError) as error:
        qnas.run_search(**arguments)
    assert message in str(error.value)
    assert "--" not in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_kept(result: qnas.SearchResult) -> None:
    with pytest.raises(CheckpointError, match="already holds a run"):
        search(result.folder)
    with pytest.raises(CheckpointError, match="`force=True` replaces it"):
        qnas.derive(result, {"vpu": "1ms"}, out=result.folder)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, classes), (B,) or (B, classes) -> (B,)."""
    shares = F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets
    return (logits.softmax(1) - shares).square().sum(1)


def share_of_zeros(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == 0).float().mean())


def test_a_loss_and_a_metric_of_the_callers_own_train_rank_and_report(tmp_path: Path) -> None:
    found = search(tmp_path / "run", loss=squared_error, metric=share_of_zeros)
    name = f"{__name__}.squared_error"
    assert found.config["search"]["loss"] == name
    assert found.run.found["derived"]["metrics"] == {
        f"{__name__}.share_of_zeros": pytest.approx(0.1, abs=0.9)
    }
    assert all(entry["heldout_loss"] <= 2 for entry in found.ranking)
    # a ranking by another loss would compare what is not comparable
    unranked = qnas.derive(found, {"vpu": "1ms"}, out=tmp_path / "a")
    assert name in unranked.unranked
    assert unranked.heldout_accuracy is None
    with pytest.raises(CheckpointError, match="give it again as `loss`"):
        qnas.derive(found, {"vpu": "1ms"}, rerank=True, out=tmp_path / "b")
    ranked = qnas.derive(found, {"vpu": "1ms"}, loss=squared_error, out=tmp_path / "c")
    assert ranked.heldout_accuracy is not None


def test_a_search_with_datasets_is_ranked_with_them_alone(tiny_space: SearchSpace, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [(torch.rand(3, 8, 8, generator=generator), i % 3) for i in range(240)]
    given = qnas.Datasets(images)
    found = qnas.run_search(tiny_space, {"vpu": "1ms"}, data=given, out=tmp_path / "run", **FEW)
    assert str(found.config["data"]).startswith("dataset:")
    assert (found.folder / SEARCH_FILE).is_file()
    assert found.build()(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(QnasError, match="give them again as `data`"):
        qnas.derive(found, {"vpu": "1ms"}, rerank=True, out=tmp_path / "a")
    assert qnas.derive(found, {"vpu": "1ms"}, data=given, rerank=True, out=tmp_path / "b").document["ranking"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": "random"}, UsageError, "`weights='random'`: expected finalist, supernet or scratch"),
        ({"epochs": 0}, UsageError, "`epochs`: expected at least 1"),
        ({"recipe": "cifer"}, UsageError, "did you mean cifar"),
        ({"teacher": "nowhere"}, UsageError, "`teacher='nowhere'`: expected supernet-largest"),
        ({"linear_start": True}, UsageError, "`weights='scratch'`"),
        ({"epoch": 3}, UsageError, "`epoch`: unknown setting (did you mean epochs"),
        ({"loss": 3}, UsageError, "`loss=3`: expected a name or a function"),
        ({"loss": F.cross_entropy}, UsageError, "`loss`: expected one loss for each image of a batch"),
    ],
)
def test_errors_of_a_training_name_arguments(
    changes: dict[str, Any],
    error: type[QnasError],
    message: str,
    result: qnas.SearchResult,
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as raised:
        qnas.train_subnet(result, out=tmp_path / "subnet", **{"threads": 1, **changes})
    assert message in str(raised.value)
    assert "--" not in str(raised.value)
    assert not (tmp_path / "subnet").exists()


def test_an_architecture_alone_trains_from_scratch(result: qnas.SearchResult, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "resolution_px": 8, "threads": 1}
    trained = qnas.train_subnet((result.space, result.arch), out=tmp_path / "run", **settings)
    assert trained.config["from_supernet"] is False
    assert trained.arch == result.arch
    with pytest.raises(CheckpointError, match="no trained network here"):
        qnas.TrainedNetwork.load(result.folder)


WRONG: Any = 3
NONE: Any = None
UNPAIRED: Any = ("cpu", "4ms")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: qnas.load_run(WRONG), "`folder=3`: expected a name or a path"),
        (lambda r: qnas.derive(r, {"vpu": "1ms"}, k_best=0), "`k_best=0`: expected a whole number from 1"),
        (lambda r: qnas.derive(r, UNPAIRED), "expected devices with budgets"),
        (lambda r: qnas.pareto(r, points=1), "`points=1`: expected a whole number from 2"),
        (lambda r: qnas.pareto(r, []), "`devices=[]`: expected at least one"),
        (lambda r: qnas.train_subnet(WRONG), "`source=3`: expected a name or a path"),
        (lambda r: qnas.train_subnet((r.space, qnas.Arch(("x",)))), "1 choices, but space"),
        (lambda r: qnas.export(WRONG), "`trained=3`: expected a name or a path"),
        (lambda r: qnas.export(r, batch=0), "`batch=0`: expected a whole number from 1"),
        (lambda r: qnas.export(r, "onix"), "`formats='onix'`"),
        (lambda r: qnas.export(r), "no trained network here"),
        (lambda r: qnas.predict(r.folder, NONE), "`device=None`: expected a name or a path"),
        (lambda r: qnas.predict((r.space, qnas.Arch(("x",))), "cpu"), "1 choices, but space"),
        (lambda r: qnas.predict(WRONG, "cpu"), "`network=3`: expected a name or a path"),
    ],
)
def test_what_a_function_cannot_take_is_said_of_its_argument(
    call: Callable[[qnas.SearchResult], object], message: str, result: qnas.SearchResult
) -> None:
    with pytest.raises(QnasError) as error:
        call(result)
    assert message in str(error.value)


def test_a_device_made_in_python_is_a_key_of_budgets_and_its_run_keeps_its_table(tmp_path: Path) -> None:
    board = qnas.device_from_function("board", layer=lambda kernel: 1e-3 * kernel.out_px)
    space, out = parse_space(TINY_SPACE, "tiny.yaml"), tmp_path / "run"
    found = qnas.run_search(space, {board: "10ms"}, out=out, **FEW)
    assert list(found.latencies_ms) == ["board"]
    again = qnas.derive(found, {board: "10ms"}, rerank=False)
    assert again.latency_ms <= 10
    with pytest.raises(CheckpointError, match="no trained network here"):
        qnas.export(again)
    fronts = qnas.pareto(found, points=2, rerank=False)  # of the run's own table
    assert {point["device"] for point in fronts.points} == {"board"}
    assert qnas.pareto(found, "cpu", points=2, rerank=False, force=True).points
    with pytest.raises(TableError, match="a device that was made in Python is given again in `budgets`"):
        qnas.run_search(out=out, resume=True)
