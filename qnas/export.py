"""A trained network as an ONNX file that runs without qnas and without torch.

The file is one self-contained graph of standard operators with a free batch size, written only if
onnxruntime computes from it what torch computes. Batch normalisation after a quadratic sum is folded
into the convolutions here, which is what the latency tables count; the exporter folds those that
follow a single convolution. What else a user needs (classes, normalisation, predicted latency) lies
in the file's metadata, as strings.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qnas.blocks import QuadraBlock
from qnas.errors import ExportError
from qnas.files import atomic_path

INPUT, OUTPUT = "images", "logits"
OPSET = 20  # the first with Gelu; pinned, so that a newer torch writes the same operators
TOLERANCE = 1e-4  # of the largest logit of a batch: float32 sums in another order
CHECKED_BATCHES = (1, 2, 5)
_EXPORTED_BATCH = 3  # none of those checked, so that a batch size that got frozen is noticed


@dataclass(frozen=True)
class ExportReport:
    """A written file, and how closely it computes what the network computes."""

    path: Path
    opset: int
    max_difference: float  # of the logits, in the batch that came closest to the tolerance
    scale: float  # the largest |logit| of that batch
    inputs: int  # images that were put through both
    size_bytes: int


def export_onnx(
    network: nn.Module,
    path: Path,
    *,
    channels: int,
    resolution_px: int,
    images: Tensor,
    metadata: Mapping[str, str],
) -> ExportReport:
    """Write a network as ONNX: `images` (batch, channels, H, W) -> `logits` (batch, classes), float32.

    images: (n, channels, H, W), normalised as in training, n >= 1; they are put through the network
    and through the file, as they are and under noise. The network is left as it is. Raises
    ExportError, and leaves what stood at `path` before, where torch cannot export the network or the
    file computes something else.
    """
    shape = (channels, resolution_px, resolution_px)
    assert len(images) > 0, "no images to check the file with"
    assert tuple(images.shape[1:]) == shape, f"images are {tuple(images.shape[1:])}, expected {shape}"
    reference = copy.deepcopy(network).cpu().eval()
    model = trace_onnx(reference, shape, str(path))
    onnx.helper.set_model_props(model, dict(metadata))
    _check_form(model, path)
    with atomic_path(path) as partial:
        partial.write_bytes(model.SerializeToString())
        difference, scale, count = _compare(reference, partial, path, images)
        size_bytes = partial.stat().st_size
    return ExportReport(path, OPSET, difference, scale, count, size_bytes)


def fold_quadratic_norms(network: nn.Module) -> None:
    """Fold each batch norm behind a quadratic sum into W_a, W_c and a bias, in place.

    BN(A . B + C) = (sA) . B + sC + t with s = weight / sqrt(var + eps) and t = bias - s mean.
    The clip behind it stays.
    """
    for block in network.modules():
        if not isinstance(block, QuadraBlock) or not isinstance(block.norm1, nn.BatchNorm2d):
            continue
        norm, conv_a, conv_c = block.norm1, block.conv_a, block.conv_c
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            conv_a.weight *= scale[:, None, None, None]
            conv_c.weight *= scale[:, None, None, None]
            conv_c.bias = nn.Parameter(norm.bias - scale * norm.running_mean)
        block.norm1 = nn.Identity()


def trace_onnx(reference: nn.Module, shape: tuple[int, ...], where: str) -> onnx.ModelProto:
    """Return a module's graph, `images` (batch, *shape) -> `logits`, as it is deployed; not checked.

    The module is left as it is; `where` names it in messages. Raises ExportError where torch cannot
    export it.
    """
    # contiguous weights: the exporter would write a transposition for each channels_last one
    network = copy.deepcopy(reference).to(memory_format=torch.contiguous_format)
    fold_quadratic_norms(network)
    try:
        with _silence():
            program = torch.onnx.export(
                network,
                (torch.zeros(_EXPORTED_BATCH, *shape),),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"{where}: torch cannot export this network: {_root_cause(error)}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    return model


def _root_cause(error: BaseException) -> str:
    """Return the first line of what was raised first: the outer messages are advice on debugging."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: stack traces that name folders of this machine."""
    graph = model.graph
    for annotated in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del annotated.metadata_props[:]
        annotated.doc_string = ""


def _check_form(model: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: not a valid ONNX graph: {_root_cause(error)}") from error
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign or model.functions:
        names = foreign or sorted(function.name for function in model.functions)
        raise ExportError(f"{path}: expected standard ONNX operators only, found {', '.join(names)}")


def _compare(reference: nn.Module, written: Path, path: Path, images: Tensor) -> tuple[float, float, int]:
    """Return the worst batch's difference and scale, and the number of images checked."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(written), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds derive from Exception alone
        raise ExportError(f"{path}: onnxruntime cannot load the file: {_root_cause(error)}") from error
    generator = torch.Generator().manual_seed(0)
    worst = (0.0, 0.0)
    count = 0
    for size in CHECKED_BATCHES:
        real = images[torch.arange(size) % len(images)].detach().float().cpu().contiguous()
        for batch in (real, _noise(reference, real, generator)):
            difference, scale = _compare_batch(reference, session, batch, path)
            worst = max(worst, (difference, scale), key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
            count += size
    return *worst, count


@torch.no_grad()
def _noise(reference: nn.Module, real: Tensor, generator: torch.Generator) -> Tensor:
    """Return real images under noise, as much of it as leaves the logits of about their size.

    Far from its training images a quadratic network's logits may grow, and rounding errors more than
    they do, since products multiply them: a right file would be refused.
    """
    noise = torch.randn(real.shape, generator=generator)
    limit = 10 * reference(real).abs().max()
    for _ in range(20):
        if reference(real + noise).abs().max() <= limit:
            break
        noise *= 0.5
    return real + noise


def _compare_batch(
    reference: nn.Module, session: onnxruntime.InferenceSession, batch: Tensor, path: Path
) -> tuple[float, float]:
    """Return the largest difference of a batch's logits, and the largest logit."""
    with torch.no_grad():
        expected: Tensor = reference(batch)
    if not bool(expected.isfinite().all()):
        raise ExportError(f"{path}: not written: the network's own logits are not finite numbers")
    got = _run(session, batch, path)
    if got.shape != expected.shape:
        raise ExportError(
            f"{path}: not written: the file's logits have the shape {tuple(got.shape)}, "
            f"expected {tuple(expected.shape)}"
        )
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:  # so that NaN is refused too
        raise ExportError(
            f"{path}: not written: for {len(batch)} images the file's logits differ from torch's by "
            f"{difference:.3g}, expected at most {TOLERANCE:g} of the largest, {scale:.3g}"
        )
    return difference, scale


def _run(session: onnxruntime.InferenceSession, batch: Tensor, path: Path) -> Tensor:
    try:
        (logits,) = session.run([OUTPUT], {INPUT: batch.numpy()})
    except Exception as error:  # onnxruntime's own kinds derive from Exception alone
        raise ExportError(
            f"{path}: onnxruntime cannot run {len(batch)} images: {_root_cause(error)}"
        ) from error
    return torch.from_numpy(logits)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what the exporter prints, logs and warns; what it raises passes."""
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
