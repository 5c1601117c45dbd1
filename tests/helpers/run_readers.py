"""What reads the files of a finished run, as functions of its folder, and the files that each one reads."""

import json
from collections.abc import Callable
from pathlib import Path

from qnas.api.deriving import derive, pareto
from qnas.api.limits import AskedLimits
from qnas.api.results import SearchResult, TrainedNetwork
from qnas.common.files import json_text
from qnas.deploy.card import file_metadata
from qnas.runs.compare import compare
from qnas.runs.documents import SpeedDocument, read_document
from qnas.runs.explain import explain
from qnas.runs.finished_run import check_rankable, read_finished_run
from qnas.runs.folders import read_config
from qnas.runs.found_arch import find_arch
from qnas.runs.metrics import Metrics, read_metrics
from qnas.runs.names import ARCH_FILE, METRICS_FILE, SPACE_FILE, SPEED_FILE, SUBNET_FOLDER
from qnas.runs.report.page import build_page
from qnas.runs.run_folder import opened
from qnas.runs.run_text import describe_comparison, describe_explanation, describe_fronts
from qnas.runs.tensorboard import write_events
from qnas.training.loop import set_up_process

REQUEST = {"search": {"seed": 0}, "data": "digits", "versions": {}}  # of a run that is to be resumed


def read_all(folder: Path) -> None:
    found = SearchResult.load(folder)
    _ = repr(found), found.accuracy, found.random_accuracies, found.latencies_ms, found.warning, found.ranking
    for place in (folder, folder / SUBNET_FOLDER):
        read_metrics(place / METRICS_FILE)
        read_config(place)
        _ = find_arch(place).document
    read_document(folder / SUBNET_FOLDER / SPEED_FILE, SpeedDocument)
    trained = TrainedNetwork.load(folder)
    _ = repr(trained), trained.classes, trained.accuracy


def report(folder: Path) -> None:
    build_page(folder).encode()


def explained(folder: Path) -> None:
    describe_explanation(explain(read_finished_run(folder)))


def derived(folder: Path) -> None:
    out = folder / "derived" / "x"
    json_text(dict(derive(folder, {"vpu": "2.4ms"}, rerank=False, out=out, force=True).document)).encode()


def fronts(folder: Path) -> None:
    out = folder / "fronts"
    describe_fronts(pareto(folder, points=3, k_best=1, rerank=False, out=out, force=True).document)


def compared(folder: Path) -> None:
    comparison = compare([folder, folder])
    describe_comparison(comparison).encode()
    json.dumps(comparison.facts()).encode()


def ranked(folder: Path) -> None:
    config = read_config(folder)
    check_rankable(folder, config)
    set_up_process(min(1, config["search"]["threads"]))


def resumed(folder: Path) -> None:
    config = read_config(folder)
    AskedLimits.of(None, None, None, config)
    Metrics(folder / METRICS_FILE, keep_bytes=(folder / METRICS_FILE).stat().st_size)
    space = (folder / SPACE_FILE).read_text(encoding="utf-8")
    with opened(folder, REQUEST, {SPACE_FILE: space}, result="none", resume=True, force=False):
        pass


def exported(folder: Path) -> None:
    trained = TrainedNetwork.load(folder)
    read_config(trained.folder)
    file_metadata(trained, trained.result, 8, ())


READERS: dict[str, Callable[[Path], object]] = {
    "read": read_all,
    "report": report,
    "explain": explained,
    "derive": derived,
    "pareto": fronts,
    "compare": compared,
    "rerank": ranked,
    "resume": resumed,
    "export": exported,
    "events": write_events,
}

# the files of a run, and which of the readers read each
FILES = {
    "config.json": ("read", "report", "events", "resume", "rerank", "pareto"),
    ARCH_FILE: ("read", "report", "explain", "derive", "compare", "pareto"),
    "search.json": ("read", "report", "explain", "derive", "compare"),
    METRICS_FILE: ("read", "report", "events", "resume"),
    "pareto/pareto.json": ("report",),
    "subnet/config.json": ("read", "report", "export"),
    "subnet/arch.json": ("read", "export"),
    "subnet/result.json": ("read", "report", "compare", "export"),
    "subnet/metrics.jsonl": ("read", "report", "events"),
    "subnet/speed.json": ("read",),
}
