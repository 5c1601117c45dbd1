"""`qnas report`, `explain`, `compare`, `tensorboard`: views of one run or several."""

from pathlib import Path
from typing import Annotated

from qnas.commands import completion
from qnas.commands.options import Json, Run, argument, show, strong
from qnas.runs.folders import latest_run
from qnas.runs.text import field, next_command


def explain(source: Run = None, as_json: Json = False) -> None:
    """Explain what each block costs, what a little more latency would buy, and why positions are identities.

    Needs only the run's folder.

    Example: qnas explain runs/union-mobile-vpu-30ms
    """
    from qnas.runs.explain import explain as explain_run
    from qnas.runs.family_text import family_lines
    from qnas.runs.finalists_text import finalist_lines
    from qnas.runs.finished_run import read_finished_run
    from qnas.runs.pretrained_text import changes_of, pretrained_lines
    from qnas.runs.run_text import describe_explanation

    run = source or latest_run()
    finished = read_finished_run(run)
    explanation = explain_run(finished)
    lines, facts = [describe_explanation(explanation)], {"run": str(run), **explanation.facts()}
    if finished.family is not None:
        lines += ["", *family_lines(finished.family)]
        facts["family"] = finished.family.document
    if "pretrained" in finished.document:
        lines += ["", *pretrained_lines(finished.space, finished.arch, finished.document)]
        changes = changes_of(finished.space, finished.arch, finished.document["pretrained"])
        facts["pretrained"] = finished.document["pretrained"] | {"changes": changes}
    if (finalists := finished.found.get("finalists")) is not None:
        lines += ["", *finalist_lines(finalists, finished.limits, finished.space, finished.family)]
        facts["finalists"] = finalists
    show(facts, lines, as_json=as_json)


def report(source: Run = None, as_json: Json = False) -> None:
    """Write a run's page, report.html, again, as search and train-subnet do at their end.

    Example: qnas report runs/union-mobile-vpu-30ms
    """
    from qnas.runs.report.page import write_report

    path = write_report(source or latest_run())
    show({"file": str(path)}, [field("file", str(path))], as_json=as_json)


def tensorboard(source: Run = None, as_json: Json = False) -> None:
    """Write a run's metrics as event files for TensorBoard, also while it runs.

    Example: qnas tensorboard runs/union-mobile-vpu-30ms
    """
    from qnas.runs.tensorboard import write_events

    folder = write_events(source or latest_run())
    logs = sorted(log.name for log in folder.iterdir())
    lines = [field("files", f"{folder}/: {', '.join(logs)}"), next_command(f"tensorboard --logdir {folder}")]
    show({"folder": str(folder), "logs": logs}, lines, as_json=as_json)


def compare(
    sources: Annotated[
        list[Path], argument("Runs' folders or arch.json files, 2 to 26.", "RUN RUN...", completion.runs)
    ],
    as_json: Json = False,
) -> None:
    """Show runs side by side: choices, latency on every known device, accuracy with intervals.

    Example: qnas compare runs/union-mobile-vpu-30ms runs/union-mobile-vpu-30ms-2
    """
    from qnas.runs.compare import compare as compare_runs
    from qnas.runs.run_text import describe_comparison

    comparison = compare_runs(sources)
    show(comparison.facts(), [describe_comparison(comparison, strong)], as_json=as_json)
