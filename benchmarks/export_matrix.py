"""Every format and precision of an export, for networks of the mobile spaces and of every neuron.

    python benchmarks/export_matrix.py [--networks NAME ...] [--formats NAME ...] [--write]

Each network is drawn at random from its space and trained on the embedded digits, then exported as users do
it. A row has the number of operators in the file, its size, the largest difference of its outputs from the
network's, the share of images with the same class, the accuracy, what else was checked, and the seconds of
the export with all its checks. What is refused has its message instead. Formats whose runtime is not
installed are left out. With --networks or --formats, --write replaces their rows and keeps the others.
"""

import argparse
import json
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from experiments import OUT, RESULTS, markdown_table, write_section

import qnas
from qnas.common.errors import QnasError
from qnas.deploy.export.formats import FORMATS
from qnas.spaces.arch import sample_arch
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import SearchSpace, load_space, make_space
from qnas.training.loop import set_up_process

MOBILE = (
    "union-mobile",
    "quadranet-mobile",
    "quadranet-mobile-bn",
    "proxyless-mobile",
    "efficientnet-lite0-quadratic",
)
MOBILE_PX = 64  # of images in training and in the files: the operators are those of 224 px
NEURON_PX = 32
SEED = 0
JSON = "export_matrix.json"
# of the networks, not of this comparison: enough for most images to be right
TRAINING: dict[str, Any] = {"epochs": 10, "learning_rate": 2e-3, "threads": 1}


def main() -> None:
    networks = {name: (name, MOBILE_PX) for name in MOBILE}
    networks |= {f"{n}, {norm}": (n, NEURON_PX) for norm in ("layernorm", "batchnorm") for n in NEURONS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(networks), choices=networks)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    rows = []
    for name in options.networks:
        space = load_space(name) if name in MOBILE else neuron_space(*name.split(", "))
        with tempfile.TemporaryDirectory() as folder:
            trained = qnas.train_subnet(
                (space.with_classes(10), sample_arch(space, np.random.default_rng(SEED))),
                data="digits",
                resolution_px=networks[name][1],
                out=Path(folder) / "subnet",
                **TRAINING,
            )
            for row in exports(trained, options.formats):
                rows.append({"network": name, **row})
                print(json.dumps(rows[-1]), flush=True)
    if options.write:
        kept = json.loads((options.out / JSON).read_text(encoding="utf-8"))
        kept = [
            row
            for row in kept
            if not (row["network"] in options.networks and row["format"] in options.formats)
        ]
        rows = sorted(
            [*kept, *rows],
            key=lambda row: (list(networks).index(row["network"]), list(FORMATS).index(row["format"])),
        )
    text = section(rows)
    print(text)
    if options.write:
        (options.out / JSON).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        write_section(RESULTS, "export_matrix", text)


def neuron_space(neuron: str, norm: str) -> SearchSpace:
    """Return a space whose blocks all have this neuron."""
    return make_space(
        f"{neuron}-{norm}",
        input={"channels": 3, "resolution_px": NEURON_PX},
        norm=norm,
        activation="gelu",
        stem={"channels": 24, "kernel": 2, "stride": 2},
        candidates=[{"block": "quadra", "neuron": neuron, "kernel": [3, 5, 7], "expansion": 2}],
        stages=[{"channels": c, "positions": 2, "stride": s} for c, s in ((24, 1), (48, 2))],
        head={"classes": 10},
    )


def exports(trained: Any, formats: list[str]) -> Iterator[dict[str, Any]]:
    """Export a trained network in each format and precision."""
    for name in filter(_is_here, formats):
        for precision in FORMATS[name].precisions:
            row: dict[str, Any] = {"format": name, "precision": precision}
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    (done,) = qnas.export(trained, name, precision=precision, out=Path(folder) / "out").files
                except QnasError as error:
                    yield row | {"refused": str(error).replace(str(Path(folder)), "")}
                    continue
                seconds = time.perf_counter() - start
                count = OPERATORS.get(name, lambda _: Counter())
                operators = count(Path(folder) / "out" / done.files[0])
            yield row | {
                "operators": sum(operators.values()),
                "most": dict(operators.most_common(6)),
                "mb": done.size_bytes / 1e6,
                "difference": done.parity.max_difference / done.parity.scale,
                "agreement": done.parity.agreement,
                "accuracy": done.parity.accuracy,
                "network_accuracy": done.parity.network_accuracy,
                "images": done.parity.images,
                "checks": list(done.checks),
                "seconds": seconds,
            }


def _is_here(name: str) -> bool:
    try:
        FORMATS[name].runtime()
    except QnasError:
        return False
    return True


def _of_onnx(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _of_ir(path: Path) -> Counter[str]:
    kinds = Counter(layer.attrib["type"] for layer in ElementTree.parse(path).iter("layer"))
    return Counter({kind: n for kind, n in kinds.items() if kind not in ("Const", "Parameter", "Result")})


def _of_program(path: Path) -> Counter[str]:
    nodes = torch.export.load(path).graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


def _of_tflite(path: Path) -> Counter[str]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # without delegates, which would replace the operators
    plain = Interpreter(
        str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    return Counter(operator["op_name"] for operator in plain._get_ops_details())


def _of_source(path: Path) -> Counter[str]:
    text = path.read_text(encoding="utf-8")
    built = text[text.index("def build") :]
    return Counter({"modules": built.count("nn.") + built.count("Mixer(")})


OPERATORS: dict[str, Callable[[Path], Counter[str]]] = {
    "onnx": _of_onnx,
    "vpu": _of_onnx,
    "openvino": _of_ir,
    "tflite": _of_tflite,
    "torch": _of_program,
    "standalone": _of_source,
}  # aot and executorch: machine code, and programs that nothing here reads


def section(rows: list[dict[str, Any]]) -> str:
    """Return the section of RESULTS.md."""
    header = ("network", "file", "operators", "MB", "difference", "same class", "accuracy", "s", "checks")
    table = [
        [
            row["network"],
            f"{row['format']}, {row['precision']}",
            *(
                [*[""] * 6, f"refused: {row['refused']}"]
                if "refused" in row
                else [
                    str(row["operators"] or "-"),
                    f"{row['mb']:.2f}",
                    f"{row['difference']:.1e}",
                    f"{row['agreement']:.1%}",
                    f"{row['accuracy']:.1%} of {row['network_accuracy']:.1%}",
                    f"{row['seconds']:.0f}",
                    "; ".join(row["checks"]),
                ]
            ),
        ]
        for row in rows
    ]
    how = (
        "Each network is drawn at random and trained on the embedded digits for "
        f"{TRAINING['epochs']} epochs, those of the mobile spaces at {MOBILE_PX} px, those of one neuron at "
        f"{NEURON_PX} px. The difference is the largest of any output, as a share of the largest output; "
        "same class and accuracy are over the test images. Seconds are those of the export with its checks."
    )
    return "\n\n".join(["## What is exported, and how it was checked", how, markdown_table(header, table)])


if __name__ == "__main__":
    main()
