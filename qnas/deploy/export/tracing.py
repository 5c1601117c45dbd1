"""A module as a graph of standard ONNX operators with a free batch size, in the forms of a target.

Batch norms are folded into the convolutions (`lowering`), which is what the latency tables count; the
exporter evaluates constants.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import onnx
import torch
from torch import nn

from qnas.common.errors import ExportError, QnasError
from qnas.deploy.export.lean import cancel_transpositions
from qnas.deploy.export.lowering import OPERATORS, Forms, lowered
from qnas.deploy.export.opset import TRACED_OPSET, restate

INPUT, OUTPUT = "images", "logits"
BATCH = "batch"  # the name of the free dimension
_EXPORTED_BATCH = 3  # not among the checked batch sizes, so that a frozen one is noticed


def trace_onnx(
    reference: nn.Module,
    shape: tuple[int, ...],
    where: str,
    *,
    batch: int | None = None,
    forms: Forms = OPERATORS,
    opset: int = TRACED_OPSET,
) -> onnx.ModelProto:
    """Return a module's graph, `images` (batch, *shape) -> `logits`, as it is deployed; not checked.

    The batch is free unless `batch` is given. The module is not changed; `where` names it in messages.
    Raises ExportError if torch cannot export it, or it needs operators that the opset lacks.
    """
    network = lowered(reference, forms)
    with told_as(f"{where}: torch cannot export this network"), silence():
        program = torch.onnx.export(
            network,
            (torch.zeros(batch or _EXPORTED_BATCH, *shape),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim(BATCH)},) if batch is None else None,
            opset_version=TRACED_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    return restate(cancel_transpositions(model), opset, where)


def root_cause(error: BaseException) -> str:
    """Return the first line of the original error: the outer messages are advice on debugging."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def told_as(problem: str) -> Iterator[None]:
    """Raise any exception as an ExportError: exporters and runtimes have many kinds."""
    try:
        yield
    except QnasError:  # it says more
        raise
    except Exception as error:
        raise ExportError(f"{problem}: {root_cause(error)}") from error


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: stack traces that name folders of this machine."""
    graph = model.graph
    for annotated in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del annotated.metadata_props[:]
        annotated.doc_string = ""


def check_form(model: onnx.ModelProto, where: str) -> None:
    """Raise ExportError if a graph is invalid or has operators that are not standard."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{where}: not a valid ONNX graph: {root_cause(error)}") from error
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign or model.functions:
        names = foreign or sorted(function.name for function in model.functions)
        raise ExportError(f"{where}: expected standard ONNX operators only, found {', '.join(names)}")


@contextmanager
def silence() -> Iterator[None]:
    """Suppress the exporter's output, logs and warnings, but not its exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
