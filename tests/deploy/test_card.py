import json
from pathlib import Path
from typing import Any

from qnas.deploy.card import JSON, MARKDOWN, SCHEMA, markdown, write_card
from qnas.deploy.file_latency import FileLatency

CARD: dict[str, Any] = {
    "schema": SCHEMA,
    "name": "qnas_tiny",
    "task": {
        "kind": "image classification",
        "classes": ["cat", "dog"],
        "input": "RGB",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    },
    "data": {"kind": "cifar10", "digest": "abc"},
    "recipe": {"epochs": 7, "learning_rate": 0.002},
    "from_supernet": True,
    "accuracy": {"top1": 0.9, "images": 100, "interval95": [0.826, 0.945]},
    "network": {
        "space": "tiny",
        "space_digest": "d",
        "choices": ["quadra_k3_e2"],
        "resolution_px": 8,
        "macs": 1_500_000,
        "params": 20_000,
    },
    "limits": [
        {"name": "myriad-vpu", "unit": "ms", "amount": 28.6, "budget": 30.0},
        {"name": "params", "unit": "", "amount": 20_000, "budget": 25_000},
    ],
    "predicted_px": 224,
    "certificate": {"solver": "knapsack", "rank": 2, "solved": 20, "score": -1.5, "score_bound": -1.25},
    "weights_sha256": "w",
    "versions": {"qnas": "9.9"},
    "files": {
        "model.onnx": {
            "format": "onnx",
            "precision": "int8",
            "runtime": "onnxruntime 1.0",
            "files": ["model.onnx"],
            "size_bytes": 1_230_000,
            "resolution_px": 8,
            "batch": None,
            "parity": {
                "images": 99,
                "max_difference": 0.1,
                "scale": 2.0,
                "agreement": 0.98,
                "accuracy": 0.87,
                "network_accuracy": 0.88,
                "drop_interval95": [-0.012, 0.034],
            },
            "measured": {
                "p50_ms": 1.25,
                "p95_ms": 1.5,
                "runtime": "onnxruntime 1.0",
                "threads": 2,
                "machine": "a processor",
            },
        }
    },
}


def test_the_page_says_all_that_a_user_needs() -> None:
    page = markdown(CARD)
    for fact in (
        *("# qnas_tiny", "cat, dog", "cifar10", "supernet", "epochs 7", "90.00% on 100 test images"),
        *("82.6% to 94.5%", "1.50M MACs", "20.0K parameters", "9.9"),
        *("myriad-vpu: 28.60 ms", "224 px", "30.00 ms; interval unknown", "params: 20.0K of at most 25.0K"),
        *("number 2 of the 20", "-1.5000", "-1.2500"),
        *(
            "model.onnx",
            "int8",
            "1.23 MB",
            "(batch, C, 8, 8)",
            "99 images",
            "87.00% (88.00%) (95% interval of the drop -1.2% to 3.4%)",
            "5.0e-02",
            "98.00%",
            "87.00% (88.00%)",
        ),
        *("1.250 ms, 1.500 ms", "onnxruntime 1.0, 2 threads, a processor"),
    ):
        assert fact in page, fact


def test_a_latency_has_its_interval_and_is_the_prediction_also_where_the_budget_bounds_its_end() -> None:
    interval = {"level": 0.9, "low_ms": 25.0, "high_ms": 29.5, "low": -0.06, "high": 0.11, "weight": 3.0}
    searched = {"name": "myriad-vpu", "unit": "ms", "amount": 26.5, "budget": 30.0, "interval": interval}
    said = "26.50 ms predicted for 224 px, as searched, of a budget of 30.00 ms; interval 25.0-29.5 ms 90%"
    assert f"- myriad-vpu: {said}\n" in markdown({**CARD, "limits": [searched]})
    sure = {**searched, "amount": 29.5, "latency_ms": 26.5, "confidence": 0.9}
    assert f"- myriad-vpu: {said}, whose upper end stays" in markdown({**CARD, "limits": [sure]})


def test_names_of_classes_are_shown_as_they_are() -> None:
    names = ["a\x1b[1m", "b\u2028c", "d|`*<e>"]
    page = markdown({**CARD, "task": {**CARD["task"], "classes": names}})
    assert r"- Classes: a\\x1b\[1m, b\\u2028c, d\|\`\*\<e\>" in page
    assert len(page.splitlines()) == len(page.split("\n")) - 1


def test_a_card_without_a_search_or_a_measurement_says_so() -> None:
    entry = {**CARD["files"]["model.onnx"], "measured": None}
    page = markdown({**CARD, "limits": [], "certificate": None, "files": {"model.onnx": entry}})
    assert "does not come from a search" in page
    assert "not measured" in page


def test_a_card_written_is_the_card_read(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    assert json.loads((tmp_path / JSON).read_text()) == CARD
    assert (tmp_path / MARKDOWN).read_text() == markdown(CARD)


def test_the_page_says_in_words_what_a_file_takes_and_that_it_is_too_much() -> None:
    entry = CARD["files"]["model.onnx"]
    over = FileLatency("myriad-vpu", 256, 30.0, 33.0).facts()
    unknown = FileLatency("mine", 256, 30.0, None, "unknown device 'mine'").facts()
    page = markdown({**CARD, "files": {"model.onnx": {**entry, "predicted": [over, unknown]}}})
    assert (
        "33.00 ms on myriad-vpu at 256 px, predicted for the file: over the budget of 30.00 ms by 10.0%"
        in page
    )
    assert "not predicted on mine at 256 px: unknown device 'mine'" in page
    assert "| not predicted |" in markdown(CARD)


def test_a_card_says_what_an_accuracy_hides() -> None:
    hidden = {"top1": 0.95, "balanced": 0.5, "never_predicted": [CARD["task"]["classes"][0]]}
    text = markdown(CARD | {"accuracy": CARD["accuracy"] | hidden})
    assert "; balanced accuracy 50.00%, the mean recall of the classes" in text
    assert "- Warning: the network never predicts 1 of " in text
    assert "balanced" not in markdown(CARD), "a card of an older version"
