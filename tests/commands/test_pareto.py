import csv
import json
from pathlib import Path

import pytest
from helpers.command_line import qnas
from helpers.finished_runs import make_record
from PIL import Image

from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

SEARCH = ("--resolution", "8", "--epochs", "1", "--warmup-epochs", "1", "--random-networks", "1", "-q")


def test_a_search_is_solved_over_the_range_of_several_devices(
    tiny_yaml: Path, tiny_space: SearchSpace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    asked = ("--space", tiny_yaml, "--device", "vpu", "--budget", "2.4ms", "--out", run)
    assert qnas("search", *asked, *SEARCH) == 0
    options = ("--points", "4", "--k-best", "2", "-q")
    assert qnas("pareto", run, "--device", "cpu, vpu,myriad-vpu", *options) == 0
    shown = capsys.readouterr().out
    document = json.loads((run / "pareto" / "pareto.json").read_text())
    assert [front["device"] for front in document["devices"]] == ["cortex-a76", "myriad-vpu"]
    assert document["ranked"]
    points = [point for front in document["devices"] for point in front["points"]]
    with (run / "pareto" / "pareto.csv").open() as file:
        assert [float(row["latency_ms"]) for row in csv.DictReader(file)] == [p["latency_ms"] for p in points]
    with Image.open(run / "pareto" / "pareto.png") as image:
        assert image.format == "PNG"
    for device in ("cortex-a76", "myriad-vpu"):
        assert f"<figcaption>{device}</figcaption>" in (run / "report.html").read_text()
    cpu, vpu = document["devices"]
    assert (cpu["own_budget_ms"], vpu["own_budget_ms"]) == (None, 2.4)
    assert not any(point["own_budget"] for point in cpu["points"])
    assert sum(point["own_budget"] for point in vpu["points"]) == 1
    # what was ranked before has the accuracy that the search itself measured
    found = json.loads((run / "search.json").read_text())
    known = {tuple(entry["choices"]): entry["heldout_accuracy"] for entry in found["ranking"]}
    shared = [point for point in points if tuple(point["choices"]) in known]
    assert shared
    for point in shared:
        assert point["heldout_accuracy"] == known[tuple(point["choices"])]
    for point in points:
        assert f"{point['heldout_accuracy']:.1%}" in shown
        Arch(tuple(point["choices"])).indices(tiny_space)
    assert qnas("pareto", run, *options) == 1
    assert "exists already: --force replaces it" in capsys.readouterr().err
    assert qnas("pareto", run, *options, "--force", "--json") == 0
    assert [front["device"] for front in json.loads(capsys.readouterr().out)["devices"]] == ["myriad-vpu"]


def test_without_its_supernet_it_is_solved_and_not_ranked(
    tiny_space: SearchSpace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"k_best": 20, "threads": 1, "resolution_px": 8}
    make_record(tmp_path / "run", tiny_space, data="digits", data_digest="0" * 16, search=search)
    assert qnas("pareto", tmp_path / "run", "--rerank", "-q") == 1
    assert "supernet.safetensors: no such file" in capsys.readouterr().err
    assert qnas("pareto", tmp_path / "run", "-q") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "without a ranking on images" in shown
    assert "supernet.safetensors: no such file" in shown
    assert qnas("pareto", tmp_path / "run", "-q", "--no-rerank", "--force") == 0
    assert "as asked" in capsys.readouterr().out
