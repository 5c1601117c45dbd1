"""`qnas rivals` prints the same networks as text, JSON and CSV, and `qnas predict` takes public models."""

import csv
import io
import json

import pytest
from helpers.command_line import joined, qnas

import qnas as package
from qnas.latency.rivals import SCHEMA
from qnas.runs.rivals_text import NOT_YOUR_DATA

WITHIN = ("rivals", "--device", "vpu", "--budget", "25ms")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert qnas(*words) == 0, words
    return capsys.readouterr().out


def test_text_json_and_csv_have_the_same_networks(capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(printed(capsys, *WITHIN, "--json"))
    found = package.rivals({"vpu": "25ms"})
    assert content["schema"] == SCHEMA
    assert content["within"] == len(content["networks"]) == len(found.networks) > 20
    names = [(entry["name"], str(entry["resolution_px"])) for entry in content["networks"]]
    rows = list(csv.DictReader(io.StringIO(printed(capsys, *WITHIN, "--csv"))))
    assert [(row["name"], row["resolution_px"]) for row in rows] == names
    text = printed(capsys, *WITHIN)
    table = [line.split() for line in text.splitlines()[2:22]]
    shown = [tuple(cells[1:3] if cells[0] == "*" else cells[:2]) for cells in table]
    assert shown == names[:20]  # the default
    assert [cells[0] == "*" for cells in table] == [entry["on_front"] for entry in content["networks"][:20]]
    assert f"and {len(names) - 20} more: --top {len(names)}" in text
    assert NOT_YOUR_DATA in joined(text)
    assert "timm" in content["source"]
    assert joined(text).count(content["source"]) == 1


def test_top_shortens_all_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(json.loads(printed(capsys, *WITHIN, "--json", "--top", "3"))["networks"]) == 3
    assert len(printed(capsys, *WITHIN, "--csv", "--top", "3").splitlines()) == 1 + 3
    assert "more: --top" in printed(capsys, *WITHIN, "--top", "3")


def test_further_limits_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--device", "cpu", "--budget", "60ms", "--max-params", "4M", "--max-macs", "250M")
    text = joined(printed(capsys, *WITHIN, *more, "--top", "2"))
    assert (
        "within 25.00 ms on myriad-vpu and 60.00 ms on cortex-a76 and 4.00M parameters and 250M MACs" in text
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WITHIN, "--json", "--csv"), "--csv and --json: give one of them"),
        (
            ("rivals", "--device", "vpu", "--budget", "1ms"),
            "no public network is within 1.000 ms on myriad-vpu",
        ),
        (("rivals", "--device", "vpu", "--budget", "30"), "budget '30' has no unit"),
        ((*WITHIN, "--max-params", "few"), "--max-params 'few': expected a number"),
        (("predict", "torchvision:resnet19"), "torchvision has no classifier 'resnet19': did you mean"),
        (("predict", "quadranet25-xxs", "--resolution", "64"), "for files of networks only"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas(*words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_predict_takes_a_public_model(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("predict", "torchvision:squeezenet1_1", "--device", "cpu", "--resolution", "64")
    text = printed(capsys, *asked)
    assert text.startswith("torchvision:squeezenet1_1 at 64 x 64 px, one image\n")
    (facts,) = json.loads(printed(capsys, *asked, "--json"))
    prediction = package.predict("torchvision:squeezenet1_1", "cpu", resolution_px=64)
    assert facts["latency_ms"] == prediction.latency_ms > 0
