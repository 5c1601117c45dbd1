"""From a budget to files of every format, each read by its own runtime alone: the same top-1."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import joined
from helpers.command_line import succeed as qnas
from helpers.pictures import write_tar
from helpers.tiny import TINY_SPACE
from numpy.typing import NDArray
from PIL import Image

from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.deploy.export.formats import FORMATS, file_names
from qnas.deploy.export.product import Variant
from qnas.runs.names import EXPORT_FOLDER, PREDICTIONS_FILE, RESULT_FILE, SUBNET_FOLDER
from qnas.runs.report.training import read_predictions
from qnas.spaces.space import load_space

pytest.importorskip("openvino")
pytest.importorskip("timm")

CLASSES = ("chien, loup", "größe", "犬")
IMAGES = 60  # of a class

# What a user writes who has nothing but the file: classes, mean and std are those that stand in it.
READERS = {
    "onnx": """
import json, onnxruntime
session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes, mean, std = (json.loads(about[key]) for key in ("classes", "mean", "std"))
predict = lambda x: session.run(None, {"images": x})[0]
""",
    "openvino": """
import json, openvino
model = openvino.Core().read_model(FILE)
about = {key: model.get_rt_info(["model_info", key]).value for key in ("classes", "mean", "std")}
classes, mean, std = (json.loads(about[key]) for key in ("classes", "mean", "std"))
compiled = openvino.Core().compile_model(model, "CPU")
predict = lambda x: compiled(x)[0]
""",
    "torch": """
import json, torch
extra = {"metadata.json": ""}
program = torch.export.load(FILE, extra_files=extra).module()
about = json.loads(extra["metadata.json"])
classes, mean, std = (json.loads(about[key]) for key in ("classes", "mean", "std"))
predict = lambda x: program(torch.from_numpy(x)).detach().numpy()
""",
    "aot": """
import json, torch
program = torch._inductor.aoti_load_package(FILE)
about = program.get_metadata()
classes, mean, std = (json.loads(about[key]) for key in ("classes", "mean", "std"))
predict = lambda x: program(torch.from_numpy(x)).detach().numpy()
""",
    "executorch": """
import json, torch
from executorch.runtime import Runtime
program = Runtime.get().load_program(FILE)
classes, mean, std = (json.loads(program.load_method(k).execute([])[0]) for k in ("classes", "mean", "std"))
method = program.load_method("forward")
predict = lambda x: np.concatenate([method.execute([torch.from_numpy(i[None])])[0].clone() for i in x])
""",
    "standalone": """
import os, torch
sys.path.insert(0, os.path.dirname(FILE))
import model
classes, mean, std, network = list(model.CLASSES), model.MEAN, model.STD, model.load()
predict = lambda x: network(torch.from_numpy(x)).detach().numpy()
""",
    "vpu": """
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes, mean, std = (json.loads(about[key]) for key in ("classes", "mean", "std"))
predict = lambda x: numpy.concatenate([session.run(None, {"images": one[None]})[0] for one in x])
""",
    # the same file after the documented line
    "timm": """
import os, timm, torch
sys.path.insert(0, os.path.dirname(FILE))
import model; timm.models.register_model(model.qnas_tiny)
network = timm.create_model("qnas_tiny", pretrained=True).eval()
classes, mean, std = list(model.CLASSES), network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
predict = lambda x: network(torch.from_numpy(x)).detach().numpy()
""",
}
FRAME = """
import sys
sys.modules["qnas"] = None  # so that to import it fails
FILE, IMAGES, OUT = sys.argv[1:]
{reader}
import numpy as np
pixels = np.load(IMAGES).astype(np.float32) / 255  # (N, C, H, W)
x = (pixels - np.array(mean, np.float32)[:, None, None]) / np.array(std, np.float32)[:, None, None]
np.savez(OUT, classes=np.array(classes), predicted=predict(np.ascontiguousarray(x)).argmax(1))
"""


def photo(label: int, rng: np.random.Generator) -> bytes:
    """Return a noisy JPEG of any size whose class is its colour."""
    pixels = rng.integers(0, 140, (*rng.integers(20, 50, 2), 3))
    pixels[..., label] += 100
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def write_data(kind: str, root: Path) -> str:
    """Write the same photographs in the form of a kind of data; return what names them."""
    rng = np.random.default_rng(0)
    photos = [(label, photo(label, rng)) for _ in range(IMAGES) for label in range(len(CLASSES))]
    match kind:
        case "digits":
            return kind
        case "folders":
            for i, (label, content) in enumerate(photos):
                path = root / ("val" if i % 4 == 0 else "train") / CLASSES[label] / f"{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return f"imagefolder:{root}"
        case "csv":
            root.mkdir()
            rows = ["file,label,split"]
            for i, (label, content) in enumerate(photos):
                (root / f"{i}.jpg").write_bytes(content)
                rows.append(f'{i}.jpg,"{CLASSES[label]}",{("test", "val", "train", "train")[i % 4]}')
            (root / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
            return f"imagefolder:{root}"
        case _:
            for part in range(4):
                members = [
                    member
                    for i, (label, content) in enumerate(photos)
                    if i % 4 == part
                    for member in ((f"{i}.jpg", content), (f"{i}.cls", b"%d" % label))
                ]
                write_tar(root / f"{'val' if part == 0 else 'train'}-{part:06}.tar", members)
            (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
            return f"shards:{root}"


def read_alone(name: str, file: Path, images: Path, out: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Return the classes that a file names and the numbers of those that it predicts."""
    code = FRAME.format(reader=READERS[name])
    subprocess.run([sys.executable, "-c", code, file, images, out], check=True, cwd=out.parent)
    with np.load(out) as found:
        return found["classes"].tolist(), found["predicted"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits", "folders", "csv", "shards"])
def test_a_network_is_the_same_from_its_search_to_every_format(kind: str, tmp_path: Path) -> None:
    spec, px, folder = write_data(kind, tmp_path / "data"), 16, tmp_path / "run"
    space = tmp_path / "tiny.yaml"
    space.write_text(TINY_SPACE)
    limits = ["--device", "vpu", "--budget", "3ms", "--space", space, "--resolution", px]
    few = ["--warmup-epochs", 1, "--epochs", 1, "--random-networks", 0, "-q"]
    qnas("search", *map(str, limits), "--data", spec, *map(str, few), "--out", folder)
    rate = ["--learning-rate", "1e-2", "--batch-size", "16"]
    qnas("train-subnet", folder, "--resolution", str(px), "--epochs", "8", *rate, "-q")
    here = [name for name in FORMATS if name != "executorch" or find_spec(name)]
    every = [word for name in here for word in ("--format", name)]
    qnas("export", folder, *every, "--measure")
    qnas("export", folder, "--format", "onnx", "--precision", "int8", "--max-drop", "0.1")

    result = json.loads((folder / SUBNET_FOLDER / RESULT_FILE).read_text(encoding="utf-8"))
    trained = read_predictions(folder / SUBNET_FOLDER / PREDICTIONS_FILE)
    data = load_data(parse_data_spec(spec), resolution_px=px, quiet=True)
    assert result["test_accuracy"] > 0.7, "too little to compare"
    assert data.classes == (tuple(str(i) for i in range(10)) if kind == "digits" else CLASSES)
    np.save(tmp_path / "images.npy", data.test.read(torch.arange(len(data.test))).contiguous().numpy())
    assert set(READERS) == {*FORMATS, "timm"}
    for name in (*here, "timm"):
        file = folder / EXPORT_FOLDER / file_names("standalone" if name == "timm" else name, Variant())[0]
        classes, predicted = read_alone(name, file, tmp_path / "images.npy", tmp_path / f"{name}.npz")
        assert tuple(classes) == data.classes
        np.testing.assert_array_equal(predicted, trained.predicted)
        accuracy = np.mean(predicted == data.test.labels.numpy())
        assert accuracy == pytest.approx(result["test_accuracy"], abs=1e-9)
    card = json.loads((folder / EXPORT_FOLDER / "model-card.json").read_text(encoding="utf-8"))
    assert card["task"]["classes"] == list(data.classes)
    assert len(card["files"]) == len(here) + 1
    for entry in card["files"].values():
        assert (entry["measured"] is None) == (entry["precision"] == "int8")


@pytest.mark.slow
def test_a_search_over_norms_and_activations_ends_in_files_that_compute_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "{block: quadra, norm: [space, batchnorm, scale], act: [space, relu6]"
    own = f"{words}, kernel: [3, 5], expansion: 2}}"
    space, folder, px = tmp_path / "tiny.yaml", tmp_path / "run", 16
    text = TINY_SPACE.replace("{block: quadra, kernel: [3, 5], expansion: [2, 4]}", own)
    text = text.replace("{block: quadra, kernel: 3, expansion: 2}", own)
    assert text.count(own) == 2
    space.write_text(text)
    limits = ["--device", "vpu", "--budget", "2.4ms", "--space", str(space), "--resolution", str(px)]
    few = ["--warmup-epochs", "1", "--epochs", "1", "--random-networks", "1", "-q"]
    qnas("search", *limits, *few, "--out", folder)
    printed = joined(capsys.readouterr().out)
    arch = json.loads((folder / "arch.json").read_text(encoding="utf-8"))
    found = load_space(folder / "space.yaml")
    assert all(name in p.names for p, name in zip(found.positions, arch["choices"], strict=True))
    assert ("less than 80%" in printed) == (arch["limits"][0]["coverage"] < 0.8)
    qnas("explain", folder)
    qnas("train-subnet", folder, "--resolution", str(px), "--epochs", "6", "--learning-rate", "1e-2", "-q")
    qnas("export", folder, "--format", "onnx", "--format", "standalone")
    trained = read_predictions(folder / SUBNET_FOLDER / PREDICTIONS_FILE)
    data = load_data(parse_data_spec("digits"), resolution_px=px, quiet=True)
    np.save(tmp_path / "images.npy", data.test.read(torch.arange(len(data.test))).contiguous().numpy())
    for name in ("onnx", "standalone"):
        file = folder / EXPORT_FOLDER / file_names(name, Variant())[0]
        _, predicted = read_alone(name, file, tmp_path / "images.npy", tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(predicted, trained.predicted)
