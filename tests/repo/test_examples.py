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
from helpers.places import ROOT
from PIL import Image
from sklearn.datasets import load_digits

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


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_network_that_runs(tmp_path: Path) -> None:
    """The script as it stands, on 400 digits; the environment is this one unless it is asked to install."""
    digits_folder(tmp_path / "photos", 40)
    environment = os.environ | {"PACKAGE": str(EXAMPLES.parent), "VENV": str(tmp_path / "venv")}
    if not os.environ.get(INSTALL):
        programs = tmp_path / "venv" / "bin"
        programs.mkdir(parents=True)
        for name, arguments in (("python", ""), ("qnas", "-m qnas")):
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
