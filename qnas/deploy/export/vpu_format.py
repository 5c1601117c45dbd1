"""Files for the Myriad X (Neural Compute Stick 2), whose last OpenVINO is of 2022.

- ONNX: of opset 13, for one image, in single precision; the device's compiler makes halves of it.
- An IR of version 10, which OpenVINO 2021 reads, where openvino is installed.
- A blob, where `myriad_compile` is found: the network as the device runs it.

Norms and activations are sums, products and powers. The compiler refuses the operator of a layer norm
(MVN), which OpenVINO also makes of a square, a root and a division.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from qnas.common.errors import ExportError, UsageError
from qnas.deploy.export import onnx_runtime, openvino_format
from qnas.deploy.export.lowering import MYRIAD
from qnas.deploy.export.myriad_compiler import PROGRAM, compile_blob, compiler_version, find_compiler
from qnas.deploy.export.parity import TOLERANCES, compare
from qnas.deploy.export.product import Product, RealImages, Variant
from qnas.deploy.export.tracing import check_form, told_as, trace_onnx

OPSET, IR_VERSION = 13, 7  # of ONNX
BATCH = 1
FILES = ("_vpu.onnx",)
OPTIONAL = ("_vpu.xml", "_vpu.bin", "_vpu.blob")
# Operators that the Myriad X refuses, or OpenVINO 2021 does not know.
REFUSED = {
    *("LayerNormalization", "Gelu", "MeanVarianceNormalization", "InstanceNormalization", "HardSwish"),
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize"),
}
_OPENVINO_OPSETS = {f"opset{number}" for number in range(1, 8)}  # of OpenVINO 2021.3
_IMAGES = 64  # at most, to compare an IR with its network


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as `path`, .onnx. Raises ExportError, and UsageError for another opset than 13."""
    if variant.opset not in (None, OPSET):
        raise UsageError(f"`opset={variant.opset}`: the format vpu is ONNX of opset {OPSET}")
    network = product.deployed("fp32", MYRIAD)
    model = trace_onnx(network, product.shape, where, batch=BATCH, forms=MYRIAD, opset=OPSET)
    onnx.helper.set_model_props(model, dict(product.metadata))
    check_form(model, where)
    path.write_bytes(model.SerializeToString())


def runtime() -> str:
    """Return the runtime that checks the file. Raises UsageError for a compiler that is no program."""
    find_compiler()
    return onnx_runtime.runtime()


def check(product: Product, variant: Variant, path: Path, images: RealImages, where: str) -> tuple[str, ...]:
    """Check the graph of a written file; write its IR and its blob where their tools are at hand.

    Raises ExportError if the device cannot run the graph, or the IR computes something else.
    """
    compiler = find_compiler()
    return (
        check_graph(onnx.load(path), where),
        _write_ir(product, path, images, where, compiler),
        _write_blob(path, where, compiler),
    )


def check_graph(model: onnx.ModelProto, where: str) -> str:
    """Check that a graph is one that the Myriad X can run; return what was seen.

    Raises ExportError with all operators that it cannot run, for free sizes, and for another opset.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET} or model.ir_version > IR_VERSION:
        raise ExportError(
            f"{where}: not written: opset {opsets.get('')}, IR version {model.ir_version}: expected opset "
            f"{OPSET}, IR version {IR_VERSION}"
        )
    operators = {node.op_type for node in model.graph.node}
    refused = sorted([*(operators & REFUSED), *(["Pow by 2 (x * x is the same)"] if _squares(model) else [])])
    if refused:
        raise ExportError(f"{where}: not written: the Myriad X does not run {', '.join(refused)}")
    free = sorted(_free_sizes(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)))
    if free:
        raise ExportError(f"{where}: not written: {free[0]} has no fixed size, which the Myriad X needs")
    return (
        f"opset {OPSET}, of fixed sizes, in operators that the Myriad X runs: {', '.join(sorted(operators))}"
    )


def _squares(model: onnx.ModelProto) -> bool:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    powers = (constants.get(node.input[1]) for node in model.graph.node if node.op_type == "Pow")
    return any(power is not None and bool(np.all(power == 2)) for power in powers)


def _free_sizes(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the names of tensors without fixed sizes."""
    graph = model.graph
    known = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    for name in (*(value.name for value in graph.input), *(name for n in graph.node for name in n.output)):
        shape = known[name].type.tensor_type.shape if name in known else None
        if shape is None or not all(size.dim_value > 0 for size in shape.dim):
            yield name


def _write_ir(product: Product, source: Path, images: RealImages, where: str, compiler: Path | None) -> str:
    """Write the IR of a graph beside it, compare it with the network, and return what was seen."""
    try:
        openvino = openvino_format.import_openvino("format vpu")
    except UsageError:
        return "no IR beside it: openvino is not installed (pip install openvino)"
    path, shown = source.with_suffix(".xml"), str(Path(where).with_suffix(".xml"))
    with told_as(f"{shown}: OpenVINO cannot convert this network"):
        model = openvino.convert_model(str(source))
        openvino_format.describe(model, product.metadata)
        openvino.save_model(model, str(path), compress_to_fp16=False)
    text, relabelled = re.subn(
        r'(<net [^>]*version=)"\d+"', r'\1"10"', path.read_text(encoding="utf-8"), count=1
    )
    assert relabelled, path
    newer = sorted(
        f"{kind} of {opset}"
        for kind, opset in set(re.findall(r'<layer [^>]*type="(\w+)" version="(\w+)"', text))
        if opset not in _OPENVINO_OPSETS or kind == "MVN"
    )
    if newer:
        path.unlink()
        path.with_suffix(".bin").unlink()
        return f"no IR beside it: OpenVINO 2021 and the Myriad X do not have {', '.join(newer)}"
    path.write_text(text, encoding="utf-8")
    with told_as(f"{shown}: OpenVINO cannot load the file"):
        run = openvino_format.load(path)
    places = slice(min(_IMAGES, len(images)))
    some = RealImages(images.pixels[places], images.labels[places], images.mean, images.std, images.source)
    seen = compare(product.network, run, some, TOLERANCES["fp32"], where=shown, batch=BATCH)
    also = ""
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            compile_blob(compiler, path, Path(folder) / "ir.blob", shown)
        also = f"; {PROGRAM} takes it"
    return (
        f"IR of version 10 beside it: in {openvino_format.version()} the logits of {len(some)} images differ "
        f"by {seen.max_difference / (seen.scale or 1):.1e} of the largest{also}"
    )


def _write_blob(source: Path, where: str, compiler: Path | None) -> str:
    """Compile a graph into a blob beside it; return what was seen."""
    if compiler is None:
        return f"not compiled for the Myriad X: no {PROGRAM} here (qnas doctor says how to get it)"
    blob = source.with_suffix(".blob")
    compile_blob(compiler, source, blob, where)
    return (
        f"compiled for the Myriad X by {PROGRAM} {compiler_version(compiler)}, a blob of "
        f"{blob.stat().st_size / 1e6:.2f} MB; not run on one"
    )
