"""The latency that is predicted from an exported file is that of its architecture, in every format."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.exported import CHOICES, neural_product, normed_product, product_of, trained, wired_product
from helpers.tiny import TINY_SPACE

from qnas.common.errors import UsageError
from qnas.deploy.export.formats import FORMATS, file_names
from qnas.deploy.export.lowering import ARITHMETIC, Forms
from qnas.deploy.export.product import FilePrecision, Product, Variant
from qnas.deploy.export.tracing import trace_onnx
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import predict_blocks
from qnas.latency.onnx.graph_file import READERS
from qnas.latency.onnx.networks import read_onnx
from qnas.latency.prediction import DEVICE, predict_arch, predict_file, predict_onnx
from qnas.latency.table import DECIMALS
from qnas.spaces.arch import Arch, sample_arch
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space, parse_space

# an AOTInductor package is of the suffix of a program, without its graph
READ = [
    name
    for name, form in FORMATS.items()
    if name != "aot" and Path(f"model{form.endings[0]}").suffix in READERS
]
SLOW = pytest.mark.slow


def written(product: Product, name: str, folder: Path, precision: FilePrecision = "fp32") -> list[Path]:
    """Write the files of a format that have a graph, or skip where its runtime is not here."""
    try:
        FORMATS[name].runtime()
    except UsageError as error:
        pytest.skip(str(error))
    variant = Variant(precision)
    first = folder / file_names(name, variant)[0]
    FORMATS[name].write(product, variant, first, "file")
    found = [path for path in folder.iterdir() if path.suffix in READERS]
    assert first in found
    return found


def tiny(norm: str) -> tuple[Product, SearchSpace, Arch]:
    space = parse_space(TINY_SPACE.replace("norm: layernorm", f"norm: {norm}"), "tiny.yaml")
    return trained(norm), space, Arch(CHOICES)


def check_file(path: Path, product: Product, space: SearchSpace, arch: Arch) -> None:
    """Check a file's latency on every device, and that nothing of it was counted twice or left out."""
    found, px = read_onnx(path), product.resolution_px
    asked = space.with_resolution(px).with_classes(len(product.classes))
    assert (found.channels, found.height_px, found.width_px) == (3, px, px)
    assert not found.uncovered
    assert not found.stand_ins
    for name in device_names():
        device = load_device(name)
        ours, theirs = predict_blocks(device, lower(asked, arch)), predict_onnx(device, found)
        assert Counter(row.kernel for row in theirs) == Counter(row.kernel for row in ours)
        expected = predict_arch(DEVICE, device, asked, arch).latency_ms
        # the cells of a table are rounded, which is 1% of a tiny network on a GPU
        rounding = 0.5 * 10**-DECIMALS * len(lower(asked, arch))
        assert predict_file(DEVICE, device, found).latency_ms == pytest.approx(
            expected, rel=0.01, abs=rounding
        )


@pytest.mark.parametrize("name", READ)
def test_a_file_of_any_format_takes_what_its_network_takes(name: str, tmp_path: Path) -> None:
    product, space, arch = tiny("layernorm")
    for path in written(product, name, tmp_path):
        check_file(path, product, space, arch)


OTHERS = [
    (name, precision, norm)
    for name in READ
    for precision in FORMATS[name].precisions
    for norm in ("layernorm", "batchnorm")
    if (precision, norm) != ("fp32", "layernorm")
]


@SLOW
@pytest.mark.parametrize(("name", "precision", "norm"), OTHERS)
def test_a_file_of_any_precision_takes_what_its_network_takes(
    name: str, precision: FilePrecision, norm: str, tmp_path: Path
) -> None:
    product, space, arch = tiny(norm)
    for path in written(product, name, tmp_path, precision):
        check_file(path, product, space, arch)


@SLOW
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@pytest.mark.parametrize("name", READ)
def test_a_file_of_every_neuron_takes_what_its_network_takes(name: str, norm: str, tmp_path: Path) -> None:
    product, space, arch = neural_product(norm)
    for path in written(product, name, tmp_path):
        check_file(path, product, space, arch)


@pytest.mark.parametrize(
    ("name", "precision", "activation"),
    [
        ("onnx", "fp32", "relu6"),
        *(
            pytest.param(name, precision, activation, marks=SLOW)
            for name in READ
            for precision in FORMATS[name].precisions
            for activation in ("relu6", "hswish")
            # in int8, rounding to whole numbers from 0 takes the place of a ReLU
            if not precision.startswith("int8") and (name, precision, activation) != ("onnx", "fp32", "relu6")
        ),
    ],
)
def test_a_file_of_blocks_that_are_no_chains_takes_what_its_network_takes(
    name: str, precision: FilePrecision, activation: str, tmp_path: Path
) -> None:
    product, space, arch = wired_product(activation)
    for path in written(product, name, tmp_path, precision):
        check_file(path, product, space, arch)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("onnx", "layernorm"),
        *(
            pytest.param(name, norm, marks=SLOW)
            for name in READ
            for norm in ("layernorm", "batchnorm")
            if (name, norm) != ("onnx", "layernorm")
        ),
    ],
)
def test_a_file_of_norms_that_candidates_chose_takes_what_its_network_takes(
    name: str, norm: str, tmp_path: Path
) -> None:
    product, space, arch = normed_product(norm)
    for path in written(product, name, tmp_path):
        check_file(path, product, space, arch)


@SLOW
@pytest.mark.parametrize(
    "name", ["quadranet-mobile", "quadranet-mobile-bn", "proxyless-mobile", "union-mobile"]
)
@pytest.mark.parametrize("form", READ)
def test_a_file_of_a_shipped_space_takes_what_its_network_takes(name: str, form: str, tmp_path: Path) -> None:
    space = load_space(name)
    arch = sample_arch(space, np.random.default_rng(0))
    product = product_of(space, arch, space.input.resolution_px)
    for path in written(product, form, tmp_path):
        check_file(path, product, space, arch)


@pytest.mark.parametrize(
    ("forms", "opset"),
    [(ARITHMETIC, 13), pytest.param(Forms(gelu="arithmetic"), 17, marks=SLOW)],
)
@pytest.mark.parametrize("space", ["neurons", pytest.param("proxyless-mobile", marks=SLOW)])
def test_the_forms_of_a_target_change_no_latency(
    forms: Forms, opset: int, space: str, tmp_path: Path
) -> None:
    if space == "neurons":
        product, known, arch = neural_product("layernorm")
    else:
        known = load_space(space)
        arch = sample_arch(known, np.random.default_rng(0))
        product = product_of(known, arch, 64)
    path = tmp_path / "forms.onnx"
    onnx.save(trace_onnx(product.network, product.shape, "file", batch=1, forms=forms, opset=opset), path)
    check_file(path, product, known, arch)


def test_an_ir_for_cpus_has_no_transpositions_and_one_in_halves_no_squares(tmp_path: Path) -> None:
    product, _, _ = tiny("layernorm")
    precisions: tuple[FilePrecision, ...] = ("fp32", "fp16")
    for precision in precisions:
        (tmp_path / precision).mkdir()
    in_floats, in_halves = (
        written(product, "openvino", tmp_path / precision, precision)[0].read_text()
        for precision in precisions
    )
    assert 'type="Transpose"' not in in_floats
    assert 'type="MVN"' in in_halves
