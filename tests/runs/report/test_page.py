"""The page of a run, read as HTML. test_browser.py checks its look."""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import succeed as qnas
from helpers.finished_runs import make_record
from helpers.places import ROOT
from helpers.run_documents import documents_of, value_at

from qnas.common.errors import ArchError, CheckpointError, QnasWarning
from qnas.runs.explain import explain
from qnas.runs.finished_run import read_finished_run
from qnas.runs.folders import read_config
from qnas.runs.found_arch import find_arch
from qnas.runs.names import (
    METRICS_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SEARCH_FILE,
    SUBNET_FOLDER,
)
from qnas.runs.report.commands import search_command, training_command
from qnas.runs.report.page import FORMS, build_page, close_with_report, write_report
from qnas.runs.report.training import read_predictions
from qnas.runs.text import short_name
from qnas.spaces.space import SearchSpace, load_space


@dataclass
class Found(HTMLParser):
    """The contents of a page."""

    text: str
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    facts: list[tuple[dict[str, str], str]] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.elements.append((tag, found))
        if tag == "data":
            self.facts.append((found, ""))
        if tag not in ("meta", "link", "img"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] == "data":
            attributes, text = self.facts[-1]
            self.facts[-1] = (attributes, text + data)


def test_every_number_is_that_of_the_runs_files(whole: Path) -> None:
    page, documents = Found((whole / REPORT_FILE).read_text()), documents_of(whole)
    keyed = [(attributes, text) for attributes, text in page.facts if "data-key" in attributes]
    for attributes, text in keyed:
        value = value_at(documents, attributes["data-key"])
        assert json.loads(attributes["value"]) == value
        assert text == FORMS[attributes["data-form"]](value)
    shown = {attributes["data-key"] for attributes, _ in keyed}
    assert {
        *(f"arch.limits.{i}.amount" for i in range(3)),
        "arch.macs",
        "arch.params",
        "search.derived.accuracy",
        "search.largest.accuracy",
        "result.test_accuracy",
        "config.data_digest",
        "arch.space_digest",
        *(f"config.limits.{i}.table_digest" for i in range(2)),
        "result.top1.low",
        "result.top1.high",
        "config.versions.torch",
        *(f"search.ranking.{i}.heldout_accuracy" for i in range(len(documents["search"]["ranking"]))),
    } <= shown


def test_the_blocks_are_those_of_the_certificate(whole: Path) -> None:
    page, arch = Found((whole / REPORT_FILE).read_text()), documents_of(whole)["arch"]
    blocks = [attributes["data-block"] for _, attributes in page.elements if "data-block" in attributes]
    assert blocks == ["stem", "1.1", "1.2", "2.transition", "2.1", "2.2", "head"]
    took = {a["data-block-ms"]: float(a["value"]) for a, _ in page.facts if "data-block-ms" in a}
    assert sum(took.values()) == pytest.approx(arch["limits"][0]["amount"])
    positions = ["1.1", "1.2", "2.1", "2.2"]
    expected = dict(zip(positions, arch["certificate"]["position_ms"], strict=True))
    for name, choice in zip(positions, arch["choices"], strict=True):
        assert took.get(name) == (None if choice == "identity" else expected[name])
    bars = [a["style"] for _, a in page.elements if a.get("class", "").startswith("bar ")]
    widths = [float(re.findall(r"width: ([\d.]+)%", style)[0]) for style in bars]
    drawn = [latency_ms for name, latency_ms in took.items() if name in blocks]
    assert widths == pytest.approx([100 * ms / max(drawn) for ms in drawn], abs=1e-3)


def test_it_asks_nobody_for_anything_and_runs_no_script(whole: Path) -> None:
    text = (whole / REPORT_FILE).read_text()
    page = Found(text)
    tags = Counter(tag for tag, _ in page.elements)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(tags)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name, "#").startswith(("data:", "#")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not page.open_tags
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for t, a in page.elements if t == "a"} <= set(ids)


def test_the_confusion_matrix_is_that_of_the_predictions(whole: Path) -> None:
    text = (whole / REPORT_FILE).read_text()
    table = text[text.index('id="confusion"') :]
    rows = re.findall(r"<tr><th>\d</th>(.*?)</tr>", table[: table.index("</table>")])
    shown = [[int(n or 0) for n in re.findall(r"<td[^>]*>(\d*)</td>", row)] for row in rows]
    found = read_predictions(whole / "subnet" / PREDICTIONS_FILE)
    expected = np.zeros((10, 10), int)
    for true, predicted in zip(found.labels, found.predicted, strict=True):
        expected[true, predicted] += 1
    assert (np.array(shown) == expected).all()
    result = documents_of(whole)["result"]
    assert np.trace(expected) == round(result["test_accuracy"] * result["test_images"])
    assert text.count('alt="a test image of class') == len(found.mistakes) > 0


def test_probabilities_of_every_position_and_the_explanation_are_there(whole: Path) -> None:
    text = (whole / REPORT_FILE).read_text()
    assert re.findall(r"probabilities of position ([\d.]+)", text) == ["1.1", "1.2", "2.1", "2.2"]
    e = explain(read_finished_run(whole))
    for d in e.devices:
        assert f"The price of latency on {d.device}" in text
        assert f"{d.price:.3g} nats a millisecond" in text
    for title in ("Expected amount against its limit", "Multiplier", "Losses", "Accuracy", "Entropy"):
        assert f'aria-label="{title}' in text
    layers = documents_of(whole)["search"]["layers"]
    assert set(layers) == {"myriad-vpu", "cortex-a76"}
    for kernel in layers["myriad-vpu"]:
        assert f"runs {kernel['what']}".replace(">", "&gt;") in text
    for device in ("myriad-vpu", "cortex-a76"):  # of the front
        assert f"<figcaption>{device}</figcaption>" in text


def test_kernels_add_up_to_the_latency(whole: Path) -> None:
    documents = documents_of(whole)
    for entry in documents["arch"]["limits"][:2]:
        kernels = documents["search"]["layers"][entry["name"]]
        assert sum(kernel["latency_ms"] for kernel in kernels) == pytest.approx(entry["amount"], abs=1e-3)


def test_it_is_written_as_it_would_be_from_the_folder_alone(whole: Path, tmp_path: Path) -> None:
    """Before arch.json and result.json are there, and years later elsewhere: the same bytes."""
    elsewhere = shutil.copytree(whole, tmp_path / "elsewhere")
    (elsewhere / REPORT_FILE).unlink()
    assert write_report(elsewhere).read_bytes() == (whole / REPORT_FILE).read_bytes()
    documents = documents_of(whole)
    (elsewhere / "arch.json").unlink()
    (elsewhere / "subnet" / "result.json").unlink()
    pending = {"arch.json": documents["arch"], "subnet/result.json": documents["result"]}
    assert build_page(elsewhere, pending) == (whole / REPORT_FILE).read_text()
    without = Found(build_page(elsewhere, {"arch.json": documents["arch"]}))
    assert "training" not in [a.get("id") for _, a in without.elements]


def test_a_network_trained_by_itself_has_a_page_of_its_own(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "arch.json", tmp_path)
    shutil.copy(whole / "space.yaml", tmp_path)
    out = tmp_path / "alone"
    qnas("train-subnet", tmp_path / "arch.json", "--epochs", "1", "--resolution", "8", "-q", "--out", out)
    page = Found((out / REPORT_FILE).read_text())
    sections = [a["id"] for t, a in page.elements if t == "section"]
    assert sections == ["network", "training", "layers", "asked"]
    result = json.loads((out / "result.json").read_text())
    values = {a["data-key"]: json.loads(a["value"]) for a, _ in page.facts if "data-key" in a}
    assert values["result.test_accuracy"] == result["test_accuracy"]


def test_an_older_run_without_what_is_new_has_its_page(tiny_space: SearchSpace, tmp_path: Path) -> None:
    make_record(tmp_path, tiny_space)
    page = Found(write_report(tmp_path).read_text())
    assert "why" in [a.get("id") for _, a in page.elements]


@pytest.mark.parametrize(
    "name",
    [
        *("quadranet-mobile-bn", "quadranet-gpu", "quadranet-small", "quadranet-small-mixed"),
        *("proxyless-mobile", "union-mobile"),
    ],
)
def test_every_searchable_space_has_its_page(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    make_record(tmp_path, space, share=0.3, rank=4)
    page = Found(write_report(tmp_path).read_text())
    blocks = [attributes["data-block"] for _, attributes in page.elements if "data-block" in attributes]
    assert set(blocks) >= {"stem", "head", *(position.name for position in space.positions)}
    chosen = {short_name(choice) for choice in find_arch(tmp_path).arch.choices} - {"-"}
    assert all(name in page.text for name in chosen)
    assert ("then the neuron" in page.text) == any("linear" in name for name in chosen)
    assert "held-out images chose another network" in page.text
    coverage = json.loads((tmp_path / "arch.json").read_text())["limits"][0]["coverage"]
    assert ("from measurements, less than 80%: see the sources" in page.text) == (coverage < 0.8)


def test_what_a_run_holds_is_escaped(tiny_space: SearchSpace, tmp_path: Path) -> None:
    make_record(tmp_path, tiny_space, data="imagefolder:<script>alert(1)</script>")
    assert "<script" not in write_report(tmp_path).read_text()


def test_what_is_no_run_is_refused(tiny_space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(ArchError, match=r"arch\.json: no such file"):
        write_report(tmp_path)
    make_record(tmp_path, tiny_space)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        write_report(tmp_path)


def test_the_command_asks_for_the_same_search(whole: Path, tmp_path: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    words = search_command(config).split(" ")
    qnas(*words[1:], "--out", tmp_path / "again", "-q")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == config
    assert (tmp_path / "again" / "arch.json").read_bytes() == (whole / "arch.json").read_bytes()


def test_the_commands_name_every_setting_of_the_run() -> None:
    settings = {"learning_rate": 0.5, "search_epochs": 3, "compile": True, "gradient": None, "loss": "focal"}
    config = {
        "space": "s",
        "data": "shards:a b",
        "max_broken": 0.2,
        "limits": [{"device": "vpu", "budget": "30ms"}, {"name": "params", "budget": "2M"}],
        "search": {"preset": "digits", **settings},
        "train": {"recipe": {"epochs": 3}, "seed": 7, "loss": "focal", "compile": False},
    }
    asked = "--learning-rate 0.5 --epochs 3 --compile --loss focal"
    assert search_command(config) == (
        "qnas search --space s --data 'shards:a b' --max-broken 0.2 --device vpu --budget 30ms "
        f"--max-params 2M {asked}"
    )
    assert training_command(config, of_run=False) == (
        "qnas train-subnet arch.json --recipe recipe.yaml --weights scratch --data 'shards:a b' "
        "--max-broken 0.2 --seed 7 --loss focal --out again"
    )


def test_the_command_asks_for_the_same_training(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    config = json.loads(Path("subnet/config.json").read_text())
    words = training_command(config, of_run=True).split(" ")
    qnas(*words[1:], "-q")
    assert json.loads(Path("again/config.json").read_text()) == config
    result = Path("subnet/result.json").read_bytes()
    assert Path("again/result.json").read_bytes() == result
    text = (tmp_path / "run" / REPORT_FILE).read_text()
    for command in (training_command(config, of_run=True), search_command(read_config(whole))):
        assert f"<pre>{command.replace(' --', chr(32) + chr(92) + chr(10) + '  --')}</pre>" in text


def test_every_field_of_the_metrics_is_documented(whole: Path) -> None:
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    for file in (whole / METRICS_FILE, whole / "subnet" / METRICS_FILE):
        keys = {key for line in file.read_text().splitlines() for key in json.loads(line)}
        for key in keys:
            assert f"`{'of_limit_NAME' if key.startswith('of_limit_') else key}`" in page, key


def test_a_page_that_cannot_be_made_stops_no_training(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / REPORT_FILE).read_bytes()
    result = json.loads((whole / "subnet" / RESULT_FILE).read_text())
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "run" / SEARCH_FILE).write_text(damaged)
        with pytest.warns(QnasWarning, match=f"no .*{REPORT_FILE}: "):
            close_with_report(tmp_path / "run" / SUBNET_FOLDER, {RESULT_FILE: result})
        assert (tmp_path / "run" / REPORT_FILE).read_bytes() == before
