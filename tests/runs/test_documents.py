"""The documents of a run: what was edited or damaged is refused in a line that names the file and the key."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.finished_runs import make_record, make_training, search_metrics
from helpers.mutants import (
    MUTANTS,
    attack,
    bounded,
    byte_mutants,
    check_refusal,
    document_mutants,
    json_mutants,
    mutated_bytes,
    read_or_refuse,
)
from helpers.places import ROOT
from helpers.run_readers import FILES, READERS
from helpers.tiny import TINY_SPACE
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from qnas.api.deriving import pareto
from qnas.common.errors import ArchError, QnasError, QnasWarning, TableError
from qnas.latency.device import load_device
from qnas.runs import documents
from qnas.runs.explain import explain
from qnas.runs.finished_run import read_finished_run
from qnas.runs.found_arch import find_arch, read_result
from qnas.runs.metrics import read_metrics
from qnas.runs.names import PARETO_FOLDER
from qnas.spaces.space import load_space, parse_space

FAULTS = ROOT.parent / "shared" / "faults"


def make_run(folder: Path, **options: Any) -> Path:
    """Write a finished search with its metrics, its front and its training."""
    run = make_record(folder, parse_space(TINY_SPACE, "tiny.yaml"), data="digits", **options)
    rows = search_metrics(run.space)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    make_training(run)
    pareto(folder, points=3, k_best=1, rerank=False, out=folder / PARETO_FOLDER)
    return folder


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(shared_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def scratch(shared_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run in which each mutant replaces a file that is put back afterwards."""
    return Path(shutil.copytree(shared_run, tmp_path_factory.mktemp("scratch") / "run"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(load: Callable[[], object], path: Path) -> str:
    with pytest.raises(QnasError) as error:
        load()
    check_refusal(error.value, path)
    return str(error.value)


def test_a_run_as_it_was_written_is_read(shared_run: Path) -> None:
    for read in {name for names in FILES.values() for name in names} - {"resume", "rerank"}:
        READERS[read](shared_run)


# ---- the form


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda d: d.update(command=False), "command: expected 'search' or 'train-subnet'"),
        ("config.json", lambda d: d.update(search=1), "search: expected a mapping"),
        ("config.json", lambda d: d["search"].update(threads=-1), "search.threads: expected at least 0"),
        ("config.json", lambda d: d["limits"][0].pop("budget"), "limits[0].budget: missing"),
        ("config.json", lambda d: d["limits"].append([]), "limits[1]: expected a mapping"),
        ("config.json", lambda d: d["versions"].update(torch=float("nan")), "versions.torch: expected text"),
        ("arch.json", lambda d: d.update(limits=[10**18]), "limits[0]: expected a mapping"),
        ("arch.json", lambda d: d["limits"][0].update(unit=["ms"]), "limits[0].unit: expected 'ms'"),
        ("arch.json", lambda d: d["limits"][0].update(limit="a"), "limits[0].limit: expected a number"),
        ("arch.json", lambda d: d["limits"][0].update(name="../../x"), "limits[0].name: expected the form"),
        ("arch.json", lambda d: d.pop("certificate"), "certificate: missing beside"),
        ("search.json", lambda d: d.pop("largest"), "largest: missing"),
        ("search.json", lambda d: d.update(random=None), "random: expected a list"),
        ("search.json", lambda d: d["derived"].update(accuracy=1.5), "derived.accuracy: expected at most 1"),
        ("search.json", lambda d: d["ranking"][0].pop("choices"), "ranking[0].choices: missing"),
        ("search.json", lambda d: d["effects"]["nats"][0].pop(), "no effects.nats for each candidate"),
        ("search.json", lambda d: d["log_probabilities"][0].reverse(), "recomputed"),
        ("subnet/result.json", lambda d: d.pop("classes"), "classes: missing"),
        ("subnet/result.json", lambda d: d.update(classes=d["classes"][1:]), "per_class: its classes"),
        ("subnet/result.json", lambda d: d["std"].__setitem__(0, 0), "std[0]: expected at least"),
        ("subnet/result.json", lambda d: d.update(data=3), "data: expected text"),
        ("subnet/config.json", lambda d: d.update(train=""), "train: expected a mapping"),
        ("subnet/config.json", lambda d: d.pop("from_supernet"), "from_supernet: missing"),
        ("pareto/pareto.json", lambda d: d["devices"][0].pop("points"), "devices[0].points: missing"),
        ("pareto/pareto.json", lambda d: d.update(ranked=True), "has no heldout_accuracy"),
    ],
)
def test_a_key_of_another_form_is_named(
    file: str, change: Callable[[Any], Any], said: str, run: Path
) -> None:
    edit(run / file, change)
    for name in {"report", *FILES[file]} - {"rerank"}:
        with_name = refusal(lambda name=name: READERS[name](run), run / file)  # type: ignore[misc]
        assert with_name.startswith(f"{run / file}: ")
        assert said in with_name


@pytest.mark.parametrize(
    ("number", "line", "said"),
    [
        (2, "", "not JSON"),
        (2, "[1]", "expected a JSON object, got list"),
        (3, "\xff", "not JSON"),
        (3, "9" * 5000, "not JSON: a number of 5000 digits"),
        (4, '{"step": 4}', "loss: missing"),
        (4, '{"step": 4, "loss": true}', "loss: expected a number, got True"),
        (4, '{"step": 3, "loss": 1}', "step 3 after 3, expected a later one"),
        (
            4,
            '{"step": 4, "loss": 1, "epoch": 1}',
            "train_loss, learning_rate, test_accuracy, test_loss: mis",
        ),
        (4, '{"step": 4, "loss": 1, "multiplier": 1}', "arch_loss, expected_ms"),
        (5, '{"step": 5, "loss": 1, "of_limit_x": "a"}', "of_limit_x: expected a number, got 'a'"),
        (5, '{"step": 5, "loss": NaN}', "loss: expected a finite number"),
        (5, '{"step": 5, "loss": 1, "warnings": "a"}', "warnings: expected a list"),
    ],
)
@pytest.mark.parametrize("file", ["metrics.jsonl", "subnet/metrics.jsonl"])
def test_a_damaged_line_of_metrics_is_named(file: str, number: int, line: str, said: str, run: Path) -> None:
    path = run / file
    lines = path.read_text().split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines))
    for name in ("report", "events", "read"):
        text = refusal(lambda name=name: READERS[name](run), path)  # type: ignore[misc]
        assert text.startswith(f"{path}: line {number}: ")
        assert said in text


def test_lines_of_architecture_steps_have_the_same_limits(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"of_limit_myriad-vpu": 1.0', '"of_limit_x": 1.0', 1))
    assert "line 4: of_limit_myriad-vpu, of_limit_x: not in all lines" in refusal(
        lambda: read_metrics(path), path
    )


def test_probabilities_of_another_space_are_refused(run: Path) -> None:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["probabilities"][0].pop()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert "step 4: probabilities: not one for each candidate" in refusal(
        lambda: READERS["report"](run), path
    )


def test_the_line_that_is_being_written_is_left_out(run: Path) -> None:
    path = run / "metrics.jsonl"
    rows = read_metrics(path)
    path.write_text(path.read_text() + '{"step": 7, "lo')
    assert read_metrics(path) == rows


def test_a_loss_that_diverged_is_read_and_not_drawn(run: Path) -> None:
    edit(run / "subnet" / "result.json", lambda d: d.update(test_loss=float("inf")))
    path = run / "subnet" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"test_loss": 0.5', '"test_loss": NaN'))
    READERS["report"](run)
    READERS["events"](run)


# ---- the facts


def numbers(content: Any, key: str = "") -> Iterator[tuple[str, Any, Any, float]]:
    """Yield each number of a document: its key, the container, the key in it, and the number."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for name, value in items:
        inner = f"{key}.{name}".removeprefix(".")
        if isinstance(value, float | int) and not isinstance(value, bool):
            yield inner, content, name, value
        else:
            yield from numbers(value, inner)


# what images measured, and counts of them: nothing in the folder says more about it
MEASURED = {
    # an interval's level and errors are the device's, and its ends follow from them
    "arch.json": ("seed", "certificate.solved", "limits.0.interval.level"),
    "search.json": (
        *("images", "broken_images", "screened", "effects", "log_probabilities"),
        *("largest.accuracy", "ranking.0.heldout_loss", "derived.accuracy"),
    ),
    "subnet/result.json": (
        *("test_loss", "broken_images", "interval_level", "best_by_test_images", "mean", "std"),
        *("resolution_px", "deployed.resolution_px", "deployed.latency", "top5", "per_class"),
    ),
}


@pytest.mark.parametrize("file", MEASURED)
def test_every_number_that_follows_from_others_is_recomputed(file: str, run: Path) -> None:
    path = run / file
    good = path.read_text()
    document = json.loads(good)
    tried = 0
    for key, container, name, value in numbers(document):
        if key.startswith(MEASURED[file]):
            continue
        container[name] = value + 1 if isinstance(value, int) else value * 1.001 + 1e-5
        path.write_text(json.dumps(document))
        text = (
            refusal(lambda: explain(read_finished_run(run)), path)
            if "/" not in file
            else refusal(lambda: read_result(path.parent, find_arch(run)), path)
        )
        assert path.name in text, key
        container[name] = value
        tried += 1
    path.write_text(good)
    assert tried > 5


def test_a_faster_network_than_the_tables_give_is_refused_everywhere(run: Path) -> None:
    def forge(document: dict[str, Any]) -> None:  # as consistently as the document alone allows
        entry, certificate = document["limits"][0], document["certificate"]
        at = entry["positions"].index(max(entry["positions"]))
        entry["positions"][at] = certificate["position_ms"][at] = 0.0
        entry["amount"] = document["latency_ms"] = sum([entry["fixed"], *entry["positions"]])

    for place in (run, run / "subnet"):
        edit(place / "arch.json", forge)
        for path in (place, place / "arch.json"):
            said = refusal(lambda path=path: find_arch(path), place / "arch.json")  # type: ignore[misc]
            assert "limits[0].positions" in said
    for name in ("report", "explain", "compare", "derive", "pareto", "export"):
        assert "when recomputed" in refusal(lambda name=name: READERS[name](run), run)  # type: ignore[misc]


def test_other_choices_than_the_limits_are_of_are_refused(run: Path) -> None:
    edit(run / "arch.json", lambda d: d.update(choices=["identity", *d["choices"][1:-1], "identity"]))
    with pytest.raises(ArchError, match="when recomputed"):
        find_arch(run)


def test_a_table_that_was_edited_is_refused(run: Path) -> None:
    path = run / "table-myriad-vpu.csv"
    lines = path.read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if "quadra_k5_e4" in line)
    cells = lines[at].split(",")
    column = lines[0].split(",").index("latency_ms")
    cells[column] = f"{float(cells[column]) + 0.01:.6f}"
    path.write_text("\n".join([*lines[:at], ",".join(cells), *lines[at + 1 :]]))
    for load in (lambda: find_arch(run), lambda: read_finished_run(run), lambda: find_arch(run / "subnet")):
        with pytest.raises(TableError, match="one of the two was edited"):
            load()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(rank=2), "certificate.rank is 2, but 0 networks"),
        (lambda c: c.update(rank=1000, solved=1000), "certificate.rank is 1000, but the run solved for 20"),
        (lambda c: c.update(score_bound=c["score_bound"] + 0.01), "certificate.score_bound is"),
        (lambda c: c.update(score=c["score"] - 0.01), "score"),
        (lambda c: c.update(rank=3, solved=2), "number 3 of 2 networks"),
    ],
)
def test_a_certificate_that_does_not_come_out_is_refused(
    change: Callable[[Any], Any], said: str, run: Path
) -> None:
    edit(run / "arch.json", lambda d: change(d["certificate"]))
    edit(run / "search.json", lambda d: d["ranking"][0].update(rank=json_at(run, "rank")))
    assert said in refusal(lambda: explain(read_finished_run(run)), run)


def json_at(run: Path, key: str) -> Any:
    return json.loads((run / "arch.json").read_text())["certificate"][key]


def test_scores_for_which_the_network_is_not_the_best_are_refused(run: Path) -> None:
    def improve(document: dict[str, Any]) -> None:  # a cheap candidate that was not chosen
        chosen = document["derived"]["choices"]
        at = next(at for at, name in enumerate(chosen) if name != "identity")
        document["effects"]["nats"][at][-1] = -9.0

    edit(run / "search.json", improve)
    assert "certificate." in refusal(lambda: explain(read_finished_run(run)), run / "arch.json")


def test_a_request_for_another_budget_is_refused(run: Path) -> None:
    edit(run / "config.json", lambda d: d["limits"][0].update(budget="9ms"))
    assert "limits[0].budget in numbers is 9.0" in refusal(
        lambda: read_finished_run(run), run / "config.json"
    )


def test_a_lone_arch_is_checked_by_the_shipped_device(tmp_path: Path) -> None:
    make_record(tmp_path / "run", load_space("quadranet-small"), devices=("cpu",))
    path = Path(shutil.copy(tmp_path / "run" / "arch.json", tmp_path))
    assert find_arch(path).unchecked == ()
    edit(path, lambda d: d["limits"][0].update(amount=1.0))
    assert "limits[0].amount is 1.0" in refusal(lambda: find_arch(path), path)


def test_a_lone_arch_of_another_device_is_said_to_be_unchecked(tmp_path: Path) -> None:
    board = load_device("cpu").model_copy(update={"name": "my-board"})
    run = make_record(tmp_path / "run", load_space("quadranet-small"), devices=(board,))
    path = Path(shutil.copy(tmp_path / "run" / "arch.json", tmp_path))
    with pytest.warns(QnasWarning, match="the latency on my-board is not recomputed"):
        found = find_arch(path)
    (reason,) = found.unchecked
    assert found.document == run.document
    assert "no table-my-board.csv beside" in reason
    edit(path, lambda d: d["limits"][0].update(amount=1.0))  # it contradicts itself
    assert "limits[0].amount is 1.0" in refusal(lambda: find_arch(path), path)


def test_tables_of_more_decimals_than_their_files_are_compared_by_the_copy(tmp_path: Path) -> None:
    """As calibrated ones are."""
    run = make_run(tmp_path / "run", scale=1.0371)
    (entry,) = json.loads((run / "arch.json").read_text())["limits"]
    assert entry["copy_digest"] != entry["table_digest"]
    for name in ("report", "explain", "compare", "derive"):
        READERS[name](run)
    edit(run / "arch.json", lambda d: d["limits"][0].update(copy_digest="0" * 16))
    with pytest.raises(TableError, match="one of the two was edited"):
        find_arch(run)


def test_a_result_that_contradicts_itself_is_refused(run: Path) -> None:
    path = run / "subnet" / "result.json"
    good = path.read_text()
    for change, said in (
        (lambda d: d.update(test_accuracy=0.99), "test_accuracy is 0.99"),
        (lambda d: d["top1"].update(low=0.5), "top1.low is 0.5"),
        (lambda d: d["per_class"][0].update(images=3), "per_class, images in all is"),
        (lambda d: d["deployed"].update(macs=1), "deployed.macs is 1"),
        (lambda d: d.update(mean=[0.5], std=[0.5]), "mean: 1 values, expected 3"),
    ):
        edit(path, change)
        assert said in refusal(lambda: read_result(path.parent, find_arch(run)), path)
        path.write_text(good)


# ---- mutants


def put(run: Path, file: str, name: str) -> Callable[[Path], object]:
    return lambda path: READERS[name](run)


def mutants(path: Path, count: int) -> Iterator[bytes]:
    if path.suffix == ".json":
        yield from json_mutants(json.loads(path.read_text()), count)
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for changed in document_mutants(rows, count - count // 2):
        with suppress(RecursionError):  # two changes nested lists in each other
            yield "".join(f"{json.dumps(row)}\n" for row in changed).encode(errors="surrogatepass")
    yield from byte_mutants(path.read_bytes(), count // 2)


@pytest.mark.parametrize("file", FILES)
def test_a_mutant_of_a_document_is_read_or_refused_in_one_line(file: str, scratch: Path) -> None:
    path = scratch / file
    good = path.read_bytes()
    drawn: st.SearchStrategy[bytes] = mutated_bytes(good)
    if path.suffix == ".json":
        content = json.loads(good)
        drawn |= st.integers(0, 2**32).map(lambda seed: next(json_mutants(content, 2, seed=seed)))

    pages = FILES[file][0] == "report"  # which take a tenth of a second

    @settings(bounded, max_examples=15 if pages else 60)
    @given(drawn)
    def check(content: bytes) -> None:
        read_or_refuse(put(scratch, file, FILES[file][0]), path, content)

    check()
    path.write_bytes(good)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in FILES.items() for name in names])
def test_no_mutant_of_a_document_ends_a_command_with_a_traceback(file: str, name: str, scratch: Path) -> None:
    count = MUTANTS if name in ("read", "events", "resume", "rerank", "export") else MUTANTS // 10
    path = scratch / file
    good = path.read_bytes()
    assert attack(put(scratch, file, name), path, mutants(path, count)) == []
    path.write_bytes(good)


@pytest.mark.skipif(not FAULTS.is_dir(), reason="shared/faults is not there")
def test_files_that_ended_in_a_traceback_are_refused(tmp_path: Path) -> None:
    space = load_space("quadranet-small")
    run = tmp_path / "run"
    made = make_record(run, space, devices=("cpu",), data="digits", data_digest="0" * 16)
    (run / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in search_metrics(space, ("cortex-a76",)))
    )
    make_training(made)
    files = sorted(FAULTS.glob("run-*__*"))
    assert len(files) > 20
    for fault in files:
        name = fault.name.partition("__")[0].removeprefix("run-")
        file, _, content = fault.read_bytes().partition(b"\x01")
        path = run / file.decode()
        good = path.read_bytes()
        path.write_bytes(content)
        with warnings.catch_warnings(), suppress(QnasError):
            READERS[name](run)
            raise AssertionError(fault.name)
        path.write_bytes(good)
    for fault in FAULTS.glob("arch__*"):
        with pytest.raises(ArchError):
            find_arch(fault, "quadranet-small")


# ---- the models and the documentation


def keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("arch.json", documents.ArchDocument),
        ("search.json", documents.SearchDocument),
        ("metrics.jsonl", documents.MetricsRow),
        ("result.json", documents.ResultDocument),
    ],
)
def test_the_keys_are_those_of_the_documentation(heading: str, model: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "reference" / "files.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    missing = {key for key in keys(model) if f"`{key}`" not in section and f'`{key}"' not in section}
    assert missing <= {"schema"}
