"""`qnas report`, `explain`, `compare`, `tensorboard`: a run looked at, and several side by side."""

from pathlib import Path
from typing import Annotated

import typer

from qnas.commands import completion
from qnas.commands.options import Json, print_json, strong

Run = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]",
        help="A finished search. Default: the latest run.",
        autocompletion=completion.runs,
        show_default=False,
    ),
]


def explain(source: Run = None, as_json: Json = False) -> None:
    """Say what each block costs, what a little more latency would buy, and why positions are identities.

    Needs nothing but the run's folder.

    Example: qnas explain runs/quadranet-mobile-vpu-30ms
    """
    from qnas.runs.explain import explain as explain_run
    from qnas.runs.finished_run import read_finished_run
    from qnas.runs.run_text import describe_explanation

    if source is None:
        from qnas.runs.folders import latest_run

        source = latest_run()
    explanation = explain_run(read_finished_run(source))
    if as_json:
        print_json({"run": str(source), **explanation.facts()})
    else:
        typer.echo(describe_explanation(explanation))


def report(source: Run = None, as_json: Json = False) -> None:
    """Write a run's page, report.html, again: what search and train-subnet write at their end.

    Example: qnas report runs/quadranet-mobile-vpu-30ms
    """
    from qnas.runs.folders import latest_run
    from qnas.runs.report.page import write_report
    from qnas.runs.text import field

    path = write_report(source or latest_run())
    if as_json:
        print_json({"file": str(path)})
    else:
        typer.echo(field("file", str(path)))


def tensorboard(source: Run = None, as_json: Json = False) -> None:
    """Write a run's metrics as event files for TensorBoard, also while it is at work.

    Example: qnas tensorboard runs/quadranet-mobile-vpu-30ms
    """
    from qnas.runs.folders import latest_run
    from qnas.runs.tensorboard import write_events
    from qnas.runs.text import field, next_command

    folder = write_events(source or latest_run())
    logs = sorted(log.name for log in folder.iterdir())
    if as_json:
        print_json({"folder": str(folder), "logs": logs})
        return
    typer.echo(field("files", f"{folder}/: {', '.join(logs)}"))
    typer.echo(next_command(f"tensorboard --logdir {folder}"))


def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN...",
            help="Runs' folders or arch.json files, 2 to 26.",
            autocompletion=completion.runs,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show runs side by side: choices, latency on every known device, accuracy with intervals.

    Example: qnas compare runs/quadranet-mobile-vpu-30ms runs/quadranet-mobile-vpu-30ms-2
    """
    from qnas.runs.compare import compare as compare_runs
    from qnas.runs.run_text import describe_comparison

    comparison = compare_runs(sources)
    if as_json:
        print_json(comparison.facts())
    else:
        typer.echo(describe_comparison(comparison, strong))
