"""What a folder says of former exports, whole and damaged in any way."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from helpers.mutants import (
    MUTANTS,
    attack,
    bounded,
    json_mutants,
    mutated_bytes,
    read_or_refuse,
)
from hypothesis import given

from qnas.common.files import write_json
from qnas.deploy.card import JSON, MARKDOWN, SCHEMA, markdown
from qnas.deploy.former_export import read_former

PARITY = {
    **{"images": 99, "source": "digits", "max_difference": 0.1, "mean_difference": 0.01, "scale": 2.0},
    **{"agreement": 0.98, "network_accuracy": 0.88, "accuracy": 0.87},
}


def entry(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "format": "onnx",
        "precision": "fp32",
        "runtime": "onnxruntime 1.0",
        "files": list(files),
        "digests": [sha256(content).hexdigest() for content in files.values()],
        "size_bytes": 3,
        "resolution_px": 8,
        "batch": None,
        "parity": PARITY,
    }


FILES = {"model.onnx": {"model.onnx": b"one"}, "model.xml": {"model.xml": b"two", "model.bin": b"three"}}
ENTRIES = {name: {**entry(files), "measured": None, "predicted": []} for name, files in FILES.items()}
CARD: dict[str, Any] = {"schema": SCHEMA, "weights_sha256": "w", "files": ENTRIES}
EXPORTED = ("model.bin", "model.onnx", "model.xml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, files in FILES.items():
        for file, content in files.items():
            (tmp_path / file).write_bytes(content)
        write_json(tmp_path / f"{name}.parity.json", {"schema": "qnas.parity/1", **entry(files)})
    write_json(tmp_path / JSON, CARD)
    (tmp_path / MARKDOWN).write_text("page")
    return tmp_path


@pytest.mark.parametrize("interval", [[-0.01, 0.02], None])
def test_the_interval_of_a_drop_stays_with_its_entry(folder: Path, interval: list[float] | None) -> None:
    kept = {**ENTRIES["model.onnx"], "parity": {**PARITY, "drop_interval95": interval}}
    write_json(folder / JSON, {**CARD, "files": {**ENTRIES, "model.onnx": kept}})
    assert read_former(folder, "w").entries["model.onnx"] == kept
    broken = {**kept, "parity": {**PARITY, "drop_interval95": [0.1, "high"]}}
    write_json(folder / JSON, {**CARD, "files": {**ENTRIES, "model.onnx": broken}})
    assert "model.onnx" not in read_former(folder, "w").entries


def test_files_of_the_same_weights_stay_with_their_entries(folder: Path) -> None:
    former = read_former(folder, "w")
    assert former.entries == ENTRIES
    assert former.stale == ()
    assert former.reports == (JSON, MARKDOWN)


def test_files_of_other_weights_and_what_was_said_of_them_go(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    former = read_former(folder, "of other weights")
    assert former.entries == {}
    assert former.stale == EXPORTED
    assert set(former.replaced) == {path.name for path in folder.iterdir()} - {"notes.txt"}


@pytest.mark.parametrize("damage", ["broken", "missing", "{}", '{"schema": "qnas.card/1"}', "[]"])
def test_without_a_whole_card_the_weights_are_not_known(damage: str, folder: Path) -> None:
    (folder / JSON).write_text(damage)
    if damage == "missing":
        (folder / JSON).unlink()
    assert read_former(folder, "w").entries == {}
    assert read_former(folder, "w").stale == EXPORTED


def test_a_file_that_was_changed_or_is_gone_has_no_entry_and_stays(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"mine")
    (folder / "model.onnx").unlink()
    former = read_former(folder, "w")
    assert (former.entries, former.stale) == ({}, ())
    assert read_former(folder, "of other weights").stale == ("model.xml",)


def test_names_outside_the_folder_are_not_taken_for_exported_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "victim", folder / "sub" / "victim"):
        path.write_bytes(b"one")
    (folder / "link").symlink_to(tmp_path / "victim")
    names = ("../victim", str(tmp_path / "victim"), "sub/victim", "..", ".", "", "link", "a\0b", "sub")
    listed = {name: entry({name: b"one"}) for name in names}
    write_json(folder / JSON, {**CARD, "files": listed})
    for weights in ("w", "of other weights"):
        former = read_former(folder, weights)
        assert (former.entries, former.stale) == ({}, ())


def test_an_entry_that_the_page_could_not_show_is_left_out(folder: Path) -> None:
    whole = json.dumps(ENTRIES["model.onnx"]).encode()
    kept = 0
    for content in json_mutants(ENTRIES["model.onnx"], 300):
        (folder / JSON).write_bytes(json.dumps(CARD).encode().replace(whole, content))
        former = read_former(folder, "w")
        markdown({**page_of(former.entries)})
        kept += "model.onnx" in former.entries
    assert 0 < kept < 300


def page_of(files: Any) -> dict[str, Any]:
    return {
        **{"name": "x", "task": {"classes": [], "input": "", "mean": [], "std": []}, "recipe": {}},
        **{"data": {"kind": "", "digest": ""}, "from_supernet": False, "limits": [], "certificate": None},
        "accuracy": {"top1": 0.5, "images": 1, "interval95": [0, 1]},
        "network": {"space": "", "macs": 1, "params": 1, "resolution_px": 8, "choices": []},
        **{"versions": {}, "files": files},
    }


def read(path: Path) -> None:
    former = read_former(path.parent, "w")
    markdown(page_of(former.entries))
    assert set(former.stale) <= set(EXPORTED)


@bounded
@given(content=mutated_bytes(json.dumps(CARD).encode()))
def test_any_card_is_read_or_passed_over(folder: Path, content: bytes) -> None:
    read_or_refuse(read, folder / JSON, content)


@pytest.mark.slow
def test_thousands_of_mutated_cards_are_read_or_passed_over(folder: Path) -> None:
    assert attack(read, folder / JSON, json_mutants(CARD, MUTANTS)) == []
    report = {"schema": "qnas.parity/1", **entry(FILES["model.onnx"])}
    assert attack(read, folder / "model.onnx.parity.json", json_mutants(report, MUTANTS)) == []
