"""A whole search with finalists: its files, what reads them, and what goes on from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import TWO_KINDS

import qnas
from qnas.commands import look
from qnas.common.errors import CheckpointError, QnasError, UsageError
from qnas.runs.checkpoint import NEWEST
from qnas.runs.names import ARCH_FILE, CONFIG_FILE, FINALISTS_FOLDER, REPORT_FILE, SEARCH_FILE, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors
from qnas.search import finalists as finals_module
from qnas.spaces.space import parse_space

SHORT: dict[str, Any] = {
    "resolution_px": 8,
    "warmup_epochs": 1,
    "search_epochs": 2,
    "batch_size": 128,
    "learning_rate": 5e-3,
    "effect_networks": 60,
    "random_networks": 2,
    "k_best": 6,
    "screened": 30,
    "threads": 1,
}
SPACE = parse_space(TWO_KINDS, "two-kinds.yaml")
RECIPE = "schema: qnas.recipe/1\nepochs: 3\nbatch_size: 288\nresolution_px: 8\nlearning_rate: 5e-3\n"
FINALS: dict[str, Any] = {"finalists": 4, "finalist_epochs": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def result(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> qnas.SearchResult:
    """A search whose finalists say that quadratic blocks are worth more than the supernet says."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finals_module, "fit_biases", lambda counts, *_: (0.125 * torch.eye(2).numpy()[1], 0.25))
        return qnas.run_search(
            SPACE, {"vpu": "2.5ms"}, out=out, finalist_recipe=str(recipe), **SHORT, **FINALS
        )


@pytest.fixture
def copied(result: qnas.SearchResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result.folder, tmp_path / "run"))


def test_the_best_finalist_is_the_result_and_every_one_is_recorded(result: qnas.SearchResult) -> None:
    found, document = result.run.found["finalists"], result.document
    winner = found["networks"][found["winner"] - 1]
    assert winner["choices"] == list(result.arch.choices) == document["choices"]
    assert result.finalists == found["networks"]
    assert len(result.finalists) == 4
    ends = {
        e["number"]: e["heldout_accuracies"][-1]
        for e in result.finalists
        if len(e["heldout_accuracies"]) == 2
    }
    assert ends[found["winner"]] == max(ends.values())
    for entry in result.finalists:
        assert entry["latency_ms"] <= 2.5
        assert sum(entry["blocks"].values()) == sum(name != "identity" for name in entry["choices"])
    chosen, certificate = document["finalist"], document["certificate"]
    assert (chosen["number"], chosen["of"], chosen["epochs"]) == (found["winner"], 4, 2)
    assert chosen["heldout_accuracy"] == winner["heldout_accuracies"][-1]
    for key in ("score", "score_bound", "rank", "solved"):
        assert certificate[key] == winner[key]
    assert certificate.get("kinds", []) == winner["kinds"]
    assert document["seed"] == chosen["seed"] == found["seed"] == 0
    config = json.loads((result.folder / CONFIG_FILE).read_text())
    assert config["search"]["finalists"] == 4
    assert config["finalists"]["recipe"]["epochs"] == 2
    seconds = json.loads((result.folder / FINALISTS_FOLDER / "seconds.json").read_text())["seconds"]
    assert list(seconds) == ["01", "02", "03", "04"]
    assert not list(result.folder.rglob(NEWEST))


def test_the_page_has_a_row_for_each_finalist(result: qnas.SearchResult) -> None:
    page = (result.folder / REPORT_FILE).read_text()
    table = page[page.index('<table id="finalists">') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr") == 5
    assert table.count("<small>chosen</small>") == 1
    assert "explains 25% of what the effects leave" in page


def test_explain_has_a_line_for_each_finalist(
    result: qnas.SearchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    look.explain(result.folder)
    lines = capsys.readouterr().out.splitlines()
    winner = result.document["finalist"]["number"]
    assert [line.split()[1] for line in lines if line.startswith("finalist ")] == ["1", "2", "3", "4"]
    (chosen,) = (line for line in lines if line.startswith("chosen      finalist"))
    assert f"finalist {winner} of 4, each trained by itself" in chosen
    (first,) = (at for at, line in enumerate(lines) if line.startswith("finalist 1"))
    found = result.finalists[0]
    said = " ".join(line.strip() for line in lines[first : first + 3])
    assert f"{found['heldout_accuracies'][0]:.1%} (1)" in said
    assert f"{found['latency_ms']:.3f}"[:4] in said
    look.explain(result.folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["finalists"] == result.run.found["finalists"]


def test_the_same_search_without_finalists_is_as_before(result: qnas.SearchResult, tmp_path: Path) -> None:
    plain = qnas.run_search(SPACE, {"vpu": "2.5ms"}, out=tmp_path / "run", **SHORT)
    assert not (plain.folder / FINALISTS_FOLDER).exists()
    assert "finalist" not in plain.document
    assert "finalists" not in plain.run.found
    config = json.loads((plain.folder / CONFIG_FILE).read_text())
    assert not [key for part in (config, config["search"]) for key in part if "finalist" in key]
    assert plain.finalists == []
    assert plain.run.found["ranking"] == result.run.found["ranking"]
    assert plain.run.found["effects"] == result.run.found["effects"]
    assert plain.document["supernet_sha256"] == result.document["supernet_sha256"]
    first = result.finalists[0]
    assert first["choices"] == list(plain.arch.choices)


def test_training_goes_on_from_the_finalist(result: qnas.SearchResult, recipe: Path, copied: Path) -> None:
    settings: dict[str, Any] = {"recipe": str(recipe), "epochs": 1, "threads": 1, "learning_rate": 0.0}
    started: list[Any] = []
    trained = qnas.train_subnet(copied, on_start=started.append, **settings)
    assert started[0].from_finalist
    assert (trained.config["from_finalist"], trained.config["from_supernet"]) == (True, True)
    kept = load_tensors(copied / FINALISTS_FOLDER / WEIGHTS_FILE)
    ours = load_tensors(trained.folder / WEIGHTS_FILE)
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())  # at a rate of zero
    other = qnas.train_subnet(copied, weights="supernet", out=copied.parent / "other", **settings)
    assert "from_finalist" not in other.config
    others = load_tensors(other.folder / WEIGHTS_FILE)
    assert not all(torch.equal(others[name], tensor) for name, tensor in kept.items())
    with pytest.raises(UsageError, match="that the finals trained"):
        qnas.train_subnet(copied, out=copied.parent / "third", linear_start=True, **settings)
    derived = qnas.derive(copied, {"vpu": "2.2ms"}, rerank=False)
    with pytest.raises(UsageError, match=r"`weights='finalist'`: no .*weights\.safetensors, name the folder"):
        qnas.train_subnet(derived, weights="finalist", **settings)
    (copied / FINALISTS_FOLDER / WEIGHTS_FILE).write_bytes(b"{")
    with pytest.raises(CheckpointError, match="`weights='supernet'` or `weights='scratch'` do without them"):
        qnas.train_subnet(copied, weights="finalist", out=copied.parent / "fourth", **settings)


def test_other_budgets_are_solved_for_with_the_corrected_effects(copied: Path) -> None:
    run = qnas.load_run(copied).run
    biases = run.found["finalists"]["biases"]
    assert biases == {"quadra_linear": 0.0, "quadra": 0.125}
    derived = qnas.derive(copied, {"vpu": "2ms"}, rerank=False)
    indices = derived.arch.indices(SPACE)
    plain = sum(row[i] for row, i in zip(run.searched.measured, indices, strict=True))
    quadratic = sum(c.startswith("quadra") and not c.endswith("linear") for c in derived.arch.choices)
    assert derived.certificate["score"] == pytest.approx(plain + 0.125 * quadratic)
    assert run.searched.correction(indices) == pytest.approx(0.125 * quadratic)
    assert derived.latency_ms <= 2
    ranked = qnas.derive(copied, {"vpu": "2.1ms"}, rerank=True)
    assert ranked.document["ranking"]
    fronts = qnas.pareto(copied, points=3, rerank=False)
    assert fronts.points


def test_a_finalist_that_was_edited_is_refused(copied: Path) -> None:
    text = (copied / SEARCH_FILE).read_text()
    found = json.loads(text)

    def edited(path: tuple[Any, ...], value: Any) -> str:
        document = json.loads(text)
        part = document["finalists"]
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        return json.dumps(document)

    other = found["finalists"]["winner"] % 4 + 1
    for path, value, said in (
        (("networks", 0, "amounts"), [1.0], "amounts"),
        (("networks", 0, "latency_ms"), 1.0, "latency_ms is 1.0, but"),
        (("networks", 1, "score"), 3.0, r"networks\[1\].score is 3.0, but"),
        (("networks", 1, "blocks"), {"quadra": 9}, "blocks"),
        (("networks", 0, "choices"), ["identity"], "1 choices"),
        (("winner",), other, "of the chosen finalist is"),
        (("winner",), 9, "winner: 9 of 4 networks"),
        (("rounds", 0, "biases"), {"quadra": 1.0}, "the first one has biases"),
        (("weights_sha256",), "0" * 64, "weights_sha256 of the chosen finalist"),
    ):
        (copied / SEARCH_FILE).write_text(edited(path, value))
        with pytest.raises(QnasError, match=said):
            qnas.load_run(copied)
    del found["finalists"]
    (copied / SEARCH_FILE).write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"finalists are in one of it and arch\.json only"):
        qnas.load_run(copied)


def test_a_certificate_of_another_rank_is_refused(copied: Path) -> None:
    from qnas.runs.explain import explain

    explain(qnas.load_run(copied).run)
    document = json.loads((copied / ARCH_FILE).read_text())
    found = json.loads((copied / SEARCH_FILE).read_text())
    winner = found["finalists"]["networks"][found["finalists"]["winner"] - 1]
    for part in (document["certificate"], winner):
        part["rank"] = part["rank"] % part["solved"] + 1
    (copied / ARCH_FILE).write_text(json.dumps(document))
    (copied / SEARCH_FILE).write_text(json.dumps(found))
    with pytest.raises(QnasError, match=r"certificate\.rank"):
        explain(qnas.load_run(copied).run)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"finalist_epochs": 3}, "`finalist_epochs=3`: there are no finalists: expected `finalists`"),
        ({"finalists_from": "scratch"}, "`finalists_from='scratch'`: there are no finalists"),
        ({"finalists": 8, "finalist_epochs": 2}, "`finalist_epochs=2`: expected at least 3, as 8 finalists"),
        ({"finalists": -1}, "`finalists`: expected at least 0"),
        ({"finalists": 4, "finalist_factor": 1}, "`finalist_factor`: expected at least 2"),
        ({"finalists": 4, "finalists_from": "nowhere"}, "`finalists_from`: expected"),
        ({"finalists": 4, "finalist_recipe": "cifer"}, "did you mean cifar"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(
    asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as raised:
        qnas.run_search(SPACE, {"vpu": "2.5ms"}, out=tmp_path / "run", **{**SHORT, **asked})
    assert said in str(raised.value)
    assert not (tmp_path / "run").exists()
