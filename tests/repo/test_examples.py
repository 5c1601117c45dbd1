"""The worked example on a folder of images, run whole."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.odd_images import write_all_kinds
from helpers.places import ROOT
from helpers.tiny import TINY_SPACE
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from qnas.common.files import write_json
from qnas.data.image_files import OriginalFile
from qnas.data.lazy_images import LazyImages
from qnas.data.loading import load_data
from qnas.deploy.export_run import ExportRequest, export_trained
from qnas.nn.supernet import Supernet
from qnas.runs.found_arch import FoundArch
from qnas.spaces.arch import arch_document, make_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import parse_space
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import train_subnet

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
    space = example["star_space"]()
    assert space.positions[0].names == ("star_k3_e2", "star_k3_e4", "star_k5_e2", "star_k5_e4", "identity")
    supernet = Supernet(space, 10, torch.Generator().manual_seed(0), "shared").eval()
    arch = make_arch(space, ("star_k3_e4", "identity", "star_k5_e2", "star_k3_e2", "star_k5_e4"))
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
    assert any(choice.startswith("star_") for choice in found["choices"])
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
    prepare = runpy.run_path(str(EXAMPLES / "classify.py"))["prepare"]
    for path in write_all_kinds(tmp_path, bits):
        original = OriginalFile(path.name, str(path), path)
        expected = LazyImages([original], np.arange(1), px, channels, pads, bits)[0]
        with Image.open(path) as image:
            found = prepare(image, px, channels, bits, pads)
        np.testing.assert_array_equal(found, expected.permute(1, 2, 0).numpy(), err_msg=path.name)


@pytest.mark.parametrize(("bits", "px"), [(12, 13), (16, 8)])
def test_the_example_gives_the_class_of_the_training_for_every_test_image(
    bits: int, px: int, tmp_path: Path
) -> None:
    """Of images of every kind, through training, export, the metadata of the file, and the example."""
    for part in ("train", "test"):
        write_all_kinds(tmp_path / "photos" / part, bits)
    space = parse_space(TINY_SPACE, "tiny.yaml")
    arch = make_arch(space, ("quadra_k3_e2", "quadra_k5_e4", "quadra_k3_e2", "identity"))
    run, given = tmp_path / "run", f"imagefolder:{tmp_path / 'photos'}"
    document = arch_document(space, arch, {})
    write_json(run / "arch.json", document)
    data = load_data(given, resolution_px=px, quiet=True)
    assert data.bits == bits
    recipe = Recipe(epochs=3, resolution_px=px, batch_size=32, learning_rate=1e-2, warmup_epochs=1)
    train_subnet(
        FoundArch(space, arch, document, run),
        data,
        TrainConfig(recipe=recipe),
        run / "subnet",
        {"data": given, "data_digest": data.digest, "versions": {}},
        from_supernet=False,
    )
    assert json.loads((run / "subnet" / "result.json").read_text())["significant_bits"] == bits
    (file,) = export_trained(run, None, ExportRequest(("onnx",)))
    session = onnxruntime.InferenceSession(file)
    classify = runpy.run_path(str(EXAMPLES / "classify.py"))["classify"]
    predicted = load_file(run / "subnet" / "predictions.safetensors")
    assert set(predicted["predicted"].tolist()) == {0, 1}
    # the test images in their order: class by class, by name
    paths = [
        path for name in data.classes for path in sorted((tmp_path / "photos" / "test" / name).iterdir())
    ]
    for path, number, confidence in zip(paths, predicted["predicted"], predicted["confidence"], strict=True):
        share, name = classify(session, path)[0]
        assert name == data.classes[number], path.name
        assert share == pytest.approx(float(confidence), abs=1e-4), path.name


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_network_that_runs(tmp_path: Path) -> None:
    """The script as it stands, on 400 digits; the environment is this one unless it is asked to install."""
    digits_folder(tmp_path / "photos", 40)
    environment = os.environ | {"PACKAGE": str(EXAMPLES.parent), "VENV": str(tmp_path / "venv")}
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
    run = tmp_path / "runs" / "own-photos"
    assert (run / "report.html").is_file()
    # the last three lines are the classes of one image, the first of the first class
    lines = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert all(share.endswith("%") for share, _ in lines)
    assert lines[0][1] == "0"
    assert sum(float(share[:-1]) for share, _ in lines) <= 100.1
    # the script reads images as qnas does: as many are right as in the export's own comparison
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    classify, right = runpy.run_path(str(EXAMPLES / "classify.py"))["classify"], 0
    for image in sorted((tmp_path / "photos" / "test").rglob("*.png")):
        right += classify(session, image)[0][1] == image.parent.name
    accuracy = json.loads((run / "subnet" / "result.json").read_text())["test_accuracy"]
    assert abs(right - round(80 * accuracy)) <= 1
