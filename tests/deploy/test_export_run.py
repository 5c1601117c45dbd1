"""From a trained run to files: the request, the checks, and the files left after a failure."""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.tiny import TINY_SPACE
from torch import Tensor

import qnas.deploy.measurement
from qnas.common.errors import CheckpointError, DataError, ExportError, QnasWarning, UsageError
from qnas.common.files import write_json, write_text
from qnas.common.reading import read_json
from qnas.common.units import format_ms
from qnas.data.loading import load_data
from qnas.data.normalisation import normalise
from qnas.data.sources import parse_data_spec
from qnas.deploy.export import quantisation
from qnas.deploy.export.formats import FORMATS
from qnas.deploy.export.parity import TOLERANCES
from qnas.deploy.export.product import RealImages, Variant
from qnas.deploy.export.quantisation import Quantised
from qnas.deploy.export_run import (
    CALIBRATION_IMAGES,
    ExportedFiles,
    ExportRequest,
    export_trained,
    needs_symmetric,
)
from qnas.deploy.file_latency import describe_latency
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import compute_table
from qnas.latency.onnx.networks import read_onnx
from qnas.latency.prediction import predict_arch, predict_file
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch, find_arch
from qnas.runs.names import ARCH_FILE, EXPORT_FOLDER, RESULT_FILE, SAMPLE_FILE, SUBNET_FOLDER, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors, save_tensors
from qnas.solver.limits import latency_limit
from qnas.solver.solve import Solution, solution_document
from qnas.spaces.arch import Arch, arch_document
from qnas.spaces.space import parse_space
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import train_subnet

FORMATS_HERE = tuple(
    name
    for name in FORMATS
    if name != "aot"  # compiles for a minute: test_aot_format.py
    and (name not in ("openvino", "executorch") or importlib.util.find_spec(name) is not None)
)
SPACE = parse_space(TINY_SPACE, "tiny.yaml")
ARCH = Arch(("quadra_k3_e2", "quadra_k5_e4", "quadra_k3_e2", "identity"))
LIMIT = latency_limit(compute_table(load_device("vpu"), SPACE), 30.0)
SEARCHED = solution_document(SPACE, Solution(ARCH.indices(SPACE), -1.5, (LIMIT,), -1.5, 1, 20), {})
CERTIFICATE = SEARCHED["certificate"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network was trained on digits: not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    write_json(folder / ARCH_FILE, SEARCHED)
    data = load_data(parse_data_spec("digits"), resolution_px=8)
    config = TrainConfig(
        recipe=Recipe(epochs=4, resolution_px=8, batch_size=64, learning_rate=1e-2, warmup_epochs=2)
    )
    train_subnet(
        FoundArch(SPACE, ARCH, SEARCHED, folder),
        data,
        config,
        folder / SUBNET_FOLDER,
        {"data": "digits", "data_digest": data.digest, "versions": {"qnas": "9.9"}},
        from_supernet=False,
    )
    return folder


@pytest.fixture
def changed(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def set_result(folder: Path, **entries: Any) -> None:
    path = folder / SUBNET_FOLDER / RESULT_FILE
    write_json(path, {**read_json(path, CheckpointError), **entries})


def export(source: Path, out: Path | None = None, **options: Any) -> ExportedFiles:
    return export_trained(source, out, ExportRequest(**{"formats": ("onnx",), **options}))


def search_on(folder: Path, *devices: Device, budget_ms: float = 20.0) -> None:
    """Write the arch.json that a search on these devices would have written."""
    limits = tuple(latency_limit(compute_table(device, SPACE), budget_ms) for device in devices)
    solution = Solution(ARCH.indices(SPACE), -1.5, limits, -1.5, 1, 20)
    write_json(folder / SUBNET_FOLDER / ARCH_FILE, solution_document(SPACE, solution, {}))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# TFLite, which is converted for seconds, is read back on all test images in test_formats.py
@pytest.mark.parametrize(
    "formats",
    [
        tuple(name for name in FORMATS_HERE if name != "tflite"),
        pytest.param(FORMATS_HERE, marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_every_format_read_back_has_the_accuracy_of_the_training_on_all_test_images(
    formats: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    done = export(trained, tmp_path / "out", formats=formats)
    data = load_data(parse_data_spec("digits"), resolution_px=8)
    result = read_json(trained / SUBNET_FOLDER / RESULT_FILE, CheckpointError)
    places = torch.arange(len(data.test))
    images = normalise(data.test.read(places), result["mean"], result["std"]).contiguous()
    assert result["test_accuracy"] > 0.7
    for file in done.files:
        load = FORMATS[file.format].load(tmp_path / "out" / file.files[0])
        logits = torch.cat([load(some) for some in torch.split(images, file.batch or len(images))])
        right = int((logits.argmax(1) == data.test.labels).sum())
        assert right == round(result["test_accuracy"] * result["test_images"]), file.format
        assert file.parity.images == len(data.test)
        assert file.parity.accuracy == file.parity.network_accuracy == result["test_accuracy"]
        assert file.parity.source == "all 359 test images of digits"


def test_int8_is_calibrated_with_training_images_and_its_accuracy_is_told_before_and_after(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    right = quantisation.quantise

    def quantise(model: onnx.ModelProto, images: RealImages, variant: Variant, where: str) -> Quantised:
        seen.append(images)
        return right(model, images, variant, where)

    monkeypatch.setattr("qnas.deploy.export.onnx_format.quantise", quantise)
    (file,) = export(trained, tmp_path / "out", precision="int8").files
    assert file.files == ("model_int8.onnx",)
    (calibration,) = seen
    data = load_data(parse_data_spec("digits"), resolution_px=8)
    of_training = {bytes(image) for image in data.train_and_heldout.read(torch.arange(1438)).numpy()}
    assert len(calibration) == CALIBRATION_IMAGES
    assert all(bytes(image) in of_training for image in calibration.pixels.numpy())
    load = FORMATS["onnx"].load(tmp_path / "out" / "model_int8.onnx")
    logits = load(
        normalise(data.test.read(torch.arange(359)), calibration.mean, calibration.std).contiguous()
    )
    assert file.parity.accuracy == np.mean((logits.argmax(1) == data.test.labels).numpy())
    result = read_json(trained / SUBNET_FOLDER / RESULT_FILE, CheckpointError)
    assert file.parity.network_accuracy == result["test_accuracy"]


def test_where_the_data_are_gone_the_kept_images_check_a_file_and_int8_is_refused(
    changed: Path, tmp_path: Path
) -> None:
    set_result(changed, data="cifar10:/gone")
    (file,) = export(changed).files
    assert file.parity.source == "the 16 test images that the training kept"
    assert file.parity.images == 16
    with pytest.raises(DataError, match=r"/gone.*`data` says where its calibration images are"):
        export(changed, precision="int8")
    set_result(changed, data="dataset:mine")
    with pytest.raises(DataError, match=r"the run had Datasets \(dataset:mine\): give them again as `data`$"):
        export(changed, precision="int8")
    assert export(changed, precision="int8", data="digits").files[0].parity.images == 359


def test_data_of_other_classes_are_refused(changed: Path) -> None:
    rows = read_json(changed / SUBNET_FOLDER / RESULT_FILE, CheckpointError)["per_class"]
    renamed = [{**row, "class": name} for row, name in zip(rows, "abcdefghij", strict=True)]
    set_result(changed, classes=[*"abcdefghij"], per_class=renamed)
    with pytest.raises(DataError, match=r"classes are 0, 1, 2, 3, 4, and 5 more \(10\), the network's a"):
        export(changed, data="digits")
    assert left(changed / EXPORT_FOLDER) == []


def test_data_given_must_be_there(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/gone"):
        export(trained, tmp_path / "out", data="cifar10:/gone")


@pytest.mark.parametrize("px", [8, 16])
def test_kept_images_follow_the_resolution(px: int, changed: Path) -> None:
    set_result(changed, data="cifar10:/gone")
    (file,) = export(changed, resolution_px=px, allow_drop=True).files
    assert file.resolution_px == px


def test_the_number_of_images_can_be_chosen(trained: Path, tmp_path: Path) -> None:
    (file,) = export(trained, tmp_path / "out", images=30).files
    assert (file.parity.images, file.parity.source) == (30, "30 of the 359 test images of digits")


@pytest.mark.parametrize("stood_before", [False, True])
def test_a_failing_format_leaves_nothing_of_any(
    stood_before: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "out"
    if stood_before:
        out.mkdir(parents=True)
        (out / "model.onnx").write_bytes(b"an older file")
    right = FORMATS["torch"].load

    def wrong(path: Path) -> Any:
        load = right(path)
        return lambda images: -load(images)

    monkeypatch.setitem(FORMATS, "torch", replace(FORMATS["torch"], load=wrong))
    with pytest.raises(ExportError, match=rf"^{out}/model\.pt2: not written: "):
        export(trained, out, formats=("onnx", "torch"), force=True)
    if stood_before:
        assert left(out) == ["model.onnx"]
        assert (out / "model.onnx").read_bytes() == b"an older file"
    else:
        assert not (tmp_path / "new").exists()


def test_a_loss_of_accuracy_beyond_what_is_allowed_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FORMATS["onnx"].load

    def lossy(path: Path) -> Any:  # one image in eight gets another class
        load, generator = right(path), torch.Generator().manual_seed(0)

        def run(images: Tensor) -> Tensor:
            logits: Tensor = load(images)
            is_hit = torch.rand(len(logits), 1, generator=generator) < 1 / 8
            return torch.where(is_hit, logits.roll(1, 1), logits)

        return run

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], load=lossy))
    loose = replace(TOLERANCES["int8"], difference=10.0, agreement=0.5)
    monkeypatch.setitem(TOLERANCES, "int8", loose)
    with pytest.raises(ExportError, match=r"a drop of .* \(95% interval .*\), expected at most 2\.0%$"):
        export(trained, tmp_path / "out", precision="int8")
    assert not (tmp_path / "out").exists()
    (file,) = export(trained, tmp_path / "out", precision="int8", max_drop=0.3).files
    assert file.parity.accuracy < file.parity.network_accuracy - 0.02


def test_int8_is_symmetric_where_a_device_of_the_search_is_a_gpu(changed: Path, tmp_path: Path) -> None:
    assert not needs_symmetric(find_arch(changed / SUBNET_FOLDER))
    search_on(changed, load_device("cortex-a76"), load_device("a100"))
    assert needs_symmetric(find_arch(changed / SUBNET_FOLDER))
    said = {
        symmetric: export(
            changed, tmp_path / str(symmetric), precision="int8", images=20, symmetric=symmetric
        )
        .files[0]
        .checks[1:]
        for symmetric in (None, False)
    }
    assert said == {None: ("all zero points are 0, and biases are in float",), False: ()}


def test_ranges_that_are_unknown_are_refused(trained: Path) -> None:
    with pytest.raises(UsageError, match=r"`ranges='percent'`: did you mean percentile\?"):
        export(trained, precision="int8", ranges="percent")


def test_what_stands_is_not_replaced_without_being_asked_to(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(trained, out)
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.onnx: exists already: `force=True`"):
        export(trained, out, formats=("standalone", "onnx"))
    assert (out / "model.onnx").read_bytes() == before
    assert not (out / "model.py").exists()
    export(trained, out, resolution_px=16, allow_drop=True, force=True)
    assert (out / "model.onnx").read_bytes() != before


def test_a_blob_does_not_stay_beside_another_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    compiler, out = tmp_path / "compiler", tmp_path / "out"
    compiler.write_text('#!/bin/sh\n[ "$1" = -h ] || echo blob > "$4"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("QNAS_MYRIAD_COMPILE", str(compiler))
    export(trained, out, formats=("vpu",), images=4)
    assert (out / "model_vpu.blob").read_text() == "blob\n"
    monkeypatch.delenv("QNAS_MYRIAD_COMPILE")
    monkeypatch.setenv("PATH", "")
    export(trained, out, formats=("vpu",), images=4, resolution_px=16, force=True)
    assert (out / "model_vpu.onnx").exists()
    assert not (out / "model_vpu.blob").exists()


def test_the_latency_is_that_of_the_file_at_its_resolution_and_over_the_budget_it_is_said(
    changed: Path, tmp_path: Path
) -> None:
    found = find_arch(changed / SUBNET_FOLDER)
    device = load_device("myriad-vpu")
    budget_ms = predict_arch("device", device, found.space, found.arch).latency_ms
    assert found.space.input.resolution_px == 32
    search_on(changed, device, budget_ms=budget_ms)
    said = {}
    for px in (8, 32, 64):
        out = tmp_path / str(px)
        done = export(changed, out, resolution_px=px, allow_drop=True)
        (latency,) = done.predicted
        of_file = predict_file("device", device, read_onnx(out / "model.onnx")).latency_ms
        assert latency.latency_ms == done.latency_ms == pytest.approx(of_file, rel=1e-4)
        assert done.facts()["latency_resolution_px"] == px
        said[px] = describe_latency(latency.facts())
        certified = f"; certified is {format_ms(budget_ms, round_up=True)} at 32 px with 10 classes"
        assert said[px].endswith(certified) == (px != 32), "the certified network is that of the space's size"
        card = read_json(out / "model-card.json", ExportError)
        assert card["files"]["model.onnx"]["predicted"] == [latency.facts()]
        assert said[px] in (out / "model-card.md").read_text()
        about = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
        assert float(about["latency_predicted_ms"]) == latency.latency_ms
        assert int(about["latency_resolution_px"]) == px
    assert done.facts()["predicted"][0]["over_budget"]
    assert "at 64 px, predicted for the file: over the budget of" in said[64]
    assert "over" not in said[8] + said[32]
    assert find_arch(changed / SUBNET_FOLDER).space.head.classes == 10
    assert latency.latency_ms is not None
    assert latency.latency_ms > budget_ms


def test_another_size_is_refused_where_the_accuracy_surely_drops_unless_that_is_allowed(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = read_json(trained / SUBNET_FOLDER / RESULT_FILE, CheckpointError)
    with pytest.raises(ExportError, match=r"^not written: at 64 px .* of 359 images are right") as refused:
        export(trained, out, resolution_px=64)
    assert len(str(refused.value)) <= 300
    assert not out.exists()
    done = export(trained, out, resolution_px=64, allow_drop=True)
    found = done.resizing
    assert found is not None
    assert (found.resolution_px, found.trained_px, found.images) == (64, 8, 359)
    assert found.trained_accuracy == result["test_accuracy"]
    (file,) = done.files
    assert found.accuracy == file.parity.network_accuracy < found.trained_accuracy
    drop = found.trained_accuracy - found.accuracy
    assert 0.01 < found.least_drop < drop < found.most_drop
    card = read_json(out / "model-card.json", ExportError)
    assert card["files"]["model.onnx"]["resizing"] == done.facts()["resizing"] == found.facts()
    page = (out / "model-card.md").read_text()
    assert found.describe() in page
    assert ", trained at 8 px" in page
    # files of former exports keep what was said about them
    export(trained, out, formats=("standalone",))
    assert found.describe() in (out / "model-card.md").read_text()
    export(trained, tmp_path / "tolerant", resolution_px=64, max_drop=1.0)


def test_the_size_of_the_training_is_not_compared_with_itself(trained: Path, tmp_path: Path) -> None:
    assert export(trained, tmp_path / "out", resolution_px=8).resizing is None


def test_of_a_device_that_is_gone_it_is_said_that_nothing_is_predicted(changed: Path, tmp_path: Path) -> None:
    search_on(changed, load_device("vpu").model_copy(update={"name": "mine"}))
    with pytest.warns(QnasWarning, match="the latency on mine is not recomputed"):
        (latency,) = export(changed, tmp_path / "out").predicted
    assert latency.latency_ms is None
    assert not latency.over_budget
    assert "not predicted on mine at 8 px: unknown device 'mine'" in describe_latency(latency.facts())


def test_an_own_device_is_found_where_the_search_was_given_it(changed: Path, tmp_path: Path) -> None:
    own = load_device("vpu").model_copy(update={"name": "mine", "aliases": ()})
    write_text(tmp_path / "mine.json", own.to_json())
    asked = {"name": "mine", "budget": "20ms", "device": str(tmp_path / "mine.json")}
    write_json(changed / "config.json", {"command": "search", "search": {}, "limits": [asked]})
    search_on(changed, own, load_device("vpu"))
    with pytest.warns(QnasWarning, match="the latency on mine is not recomputed"):
        mine, vpu = export(changed, tmp_path / "out").predicted
    assert mine.latency_ms == pytest.approx(vpu.latency_ms)


def other_weights(folder: Path) -> None:
    """Give a trained network other weights, as another training would."""
    file = folder / SUBNET_FOLDER / WEIGHTS_FILE
    state = load_tensors(file)
    state["head.classifier.bias"] = state["head.classifier.bias"] + 1e-3
    set_result(folder, weights_sha256=save_tensors(file, state))


def test_files_of_older_weights_do_not_stay_beside_new_ones(changed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(changed, out, formats=("onnx", "standalone"))
    (out / "notes.txt").write_text("mine")
    (out / "__pycache__").mkdir()
    other_weights(changed)
    before = left(out)
    with pytest.raises(CheckpointError, match=r"out/model\.onnx: of other weights .*`force=True` removes it"):
        export(changed, out, formats=("torch",))
    assert left(out) == before
    export(changed, out, formats=("torch",), force=True)
    card = ["model-card.json", "model-card.md"]
    assert left(out) == ["__pycache__", *card, "model.pt2", "model.pt2.parity.json", "notes.txt"]
    assert set(read_json(out / "model-card.json", ExportError)["files"]) == {"model.pt2"}
    # those of the same weights stay
    export(changed, out, formats=("onnx",))
    assert set(read_json(out / "model-card.json", ExportError)["files"]) == {"model.onnx", "model.pt2"}
    assert {"model.onnx", "model.pt2", "model.pt2.parity.json"} < set(left(out))


def test_a_file_changed_since_its_export_is_somebodys_own(changed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(changed, out, formats=("standalone", "torch"))
    (out / "model.py").write_text("# mine\n")
    export(changed, out, formats=("onnx",))
    assert (out / "model.py").read_text() == "# mine\n"
    assert set(read_json(out / "model-card.json", ExportError)["files"]) == {"model.onnx", "model.pt2"}
    assert not (out / "model.py.parity.json").exists()  # it speaks of another file


def test_two_exports_to_one_folder_at_once_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, load, told = tmp_path / "out", FORMATS["onnx"].load, []

    def meanwhile(path: Path) -> Any:
        with pytest.raises(CheckpointError) as error:
            export(trained, out, formats=("torch",))
        told.append(str(error.value))
        return load(path)

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], load=meanwhile))
    export(trained, out)
    assert told == [f"{out}: process {os.getpid()} is exporting to it"]
    assert "model.pt2" not in left(out)
    assert left(tmp_path) == ["out"]


def test_weights_that_are_not_those_of_the_result_are_refused(changed: Path, tmp_path: Path) -> None:
    file = changed / SUBNET_FOLDER / WEIGHTS_FILE
    state = load_tensors(file)
    save_tensors(file, {**state, "head.classifier.bias": -state["head.classifier.bias"]})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: SHA-256 .*, expected .*: not the file"):
        export(changed, tmp_path / "out")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged: its SHA-256"):
        export(changed, tmp_path / "out")
    assert left(tmp_path) == ["copy"]


@pytest.mark.parametrize("inner", ["", SUBNET_FOLDER, ARCH_FILE, f"{SUBNET_FOLDER}/{ARCH_FILE}"])
def test_a_run_its_subnet_or_their_arch_json_is_meant(inner: str, changed: Path) -> None:
    source = changed / inner
    done = export(source)
    folder = changed if SUBNET_FOLDER not in inner else changed / SUBNET_FOLDER
    assert done.folder == folder / EXPORT_FOLDER
    assert (folder / EXPORT_FOLDER / "model.onnx").is_file()


def test_the_card_has_the_search_the_training_and_every_file(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(trained, out, formats=("standalone",))
    export(trained, out, formats=("torch",), batch=1, threads=1, images=20)
    card = read_json(out / "model-card.json", ExportError)
    result = read_json(trained / SUBNET_FOLDER / RESULT_FILE, CheckpointError)
    config = read_config(trained / SUBNET_FOLDER)
    assert card["certificate"] == CERTIFICATE
    assert card["limits"] == SEARCHED["limits"]
    assert card["recipe"] == config["train"]["recipe"]
    assert card["data"] == {"kind": "digits", "digest": config["data_digest"]}
    assert card["accuracy"]["top1"] == result["test_accuracy"]
    assert card["task"]["classes"] == [str(i) for i in range(10)]
    assert card["network"]["params"] == result["params"]
    assert set(card["files"]) == {"model.py", "model.pt2"}
    for entry in card["files"].values():
        contents = [(out / file).read_bytes() for file in entry["files"]]
        assert entry["digests"] == [sha256(content).hexdigest() for content in contents]
    assert card["files"]["model.py"]["measured"] is None
    measured = card["files"]["model.pt2"]["measured"]
    assert 0 < measured["p50_ms"] <= measured["p95_ms"]
    assert measured["runtime"] == f"torch {torch.__version__}"
    assert measured["threads"] == 1
    page = (out / "model-card.md").read_text()
    assert "model.pt2" in page
    assert "model.py + model.safetensors" in page


def test_the_card_keeps_where_the_data_lay_to_itself(changed: Path) -> None:
    set_result(changed, data="cifar10:/home/somebody/data")
    export(changed)
    for path in (changed / EXPORT_FOLDER).iterdir():
        assert b"somebody" not in path.read_bytes(), path.name


@pytest.mark.slow
def test_every_format_can_be_timed_on_one_image(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qnas.deploy.measurement, "LOADS", 1)
    monkeypatch.setattr(qnas.deploy.measurement, "TOLERANCE", 1e3)
    done = export(trained, tmp_path / "out", formats=FORMATS_HERE, threads=1, images=10)
    assert set(done.measured) == {file.files[0] for file in done.files}
    for file in done.files:
        assert 0 < done.measured[file.files[0]]["p50_ms"] <= done.measured[file.files[0]]["p95_ms"]
        assert done.measured[file.files[0]]["runtime"] == file.runtime
    assert json.loads(json.dumps(done.facts()))["files"][0]["measured"]["threads"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ()}, "`formats`: expected at least one"),
        ({"threads": 1, "batch": 2}, "`measure=True` times one image: leave out `batch=2`"),
        ({"max_drop": 1.5}, r"`max_drop=1\.5`: expected a share"),
        ({"formats": ("onyx",)}, "`formats='onyx'`"),
        ({"precision": "int8", "formats": ("torch",)}, "format torch has no int8"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    options: dict[str, Any], message: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(trained, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_out_is_a_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.onnx`: expected a folder"):
        export(trained, tmp_path / "mine.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: expected a folder, found a file"):
        export(trained, tmp_path / "file")


def test_what_is_not_trained_or_damaged_is_refused(changed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained network here: run qnas train-subnet"):
        export(tmp_path)
    (changed / SUBNET_FOLDER / SAMPLE_FILE).unlink()
    set_result(changed, data="cifar10:/gone")
    with pytest.raises(CheckpointError, match=r"sample\.safetensors: no such file"):
        export(changed)
    path = changed / SUBNET_FOLDER / RESULT_FILE
    write_json(path, {"classes": []})
    with pytest.raises(CheckpointError, match=r"result\.json: schema: missing; test_accuracy"):
        export(changed)


@pytest.mark.parametrize("bits", [7, 17, "12", 12.5, True, [], "\x1b[31m" * 100])
def test_damaged_significant_bits_are_refused_in_one_line(bits: Any, changed: Path) -> None:
    path = changed / SUBNET_FOLDER / RESULT_FILE
    write_json(path, read_json(path, CheckpointError) | {"significant_bits": bits})
    with pytest.raises(CheckpointError, match=rf"^{path}: significant_bits: expected .*, got \S") as error:
        export(changed)
    assert str(error.value).isprintable()


def test_an_earlier_run_without_significant_bits_is_exported(changed: Path, tmp_path: Path) -> None:
    path = changed / SUBNET_FOLDER / RESULT_FILE
    result = read_json(path, CheckpointError)
    assert (result.pop("significant_bits"), result.pop("pads")) == (None, False)
    write_json(path, result)
    (file,) = export(changed, tmp_path / "out")
    known = {each.key for each in onnx.load(file).metadata_props}
    assert {"mean", "std", "classes"} <= known
    assert "significant_bits" not in known


@pytest.fixture
def other_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for two formats: one that can be written, in float32 for single images, and one not."""

    def missing() -> str:
        raise UsageError("format tflite: its converter is not installed: pip install it")

    onnx_here = FORMATS["onnx"]
    vpu = replace(onnx_here, endings=("_vpu.onnx",), precisions=("fp32",), batch=1, runs_on="a stick")
    monkeypatch.setitem(FORMATS, "vpu", vpu)
    monkeypatch.setitem(FORMATS, "tflite", replace(onnx_here, endings=(".tflite",), runtime=missing))


def runs_where(done: ExportedFiles) -> dict[str, tuple[str, ...]]:
    return {device.device: device.files for device in done.devices}


@pytest.mark.usefixtures("other_formats")
def test_without_a_format_the_devices_of_the_search_get_what_they_run(changed: Path) -> None:
    search_on(changed, load_device("cpu"), load_device("vpu"))
    done = export(changed, formats=None, images=4)
    # nothing converts to tflite here: onnx stands in, which does not run in the runtime of the latencies
    assert [path.name for path in done] == ["model.onnx", "model_vpu.onnx"]
    assert [file.batch for file in done.files] == [None, 1]
    assert runs_where(done) == {"cortex-a76": (), "myriad-vpu": ("model_vpu.onnx",)}
    phone, stick = done.devices
    assert phone.problem == "format tflite: its converter is not installed: pip install it"
    assert phone.command == f"qnas export {changed} --format tflite"
    assert stick.command == stick.problem == ""
    assert done.facts()["devices"] == [phone.facts(), stick.facts()]
    card = read_json(changed / EXPORT_FOLDER / "model-card.json", ExportError)
    assert card["devices"] == [
        {**phone.facts(), "problem": "", "command": "qnas export RUN --format tflite", "files": []},
        {**stick.facts(), "files": ["model_vpu.onnx"]},
    ]
    page = (changed / EXPORT_FOLDER / "model-card.md").read_text()
    assert (
        "- cortex-a76 (TFLite 2.1): no file that runs there; write one with qnas export RUN --format" in page
    )
    assert "- myriad-vpu (OpenVINO 2019R2): model_vpu.onnx\n" in page
    assert "- model_vpu.onnx: runs on a stick. Checked: run in onnxruntime " in page


@pytest.mark.usefixtures("other_formats")
def test_a_device_without_a_file_is_named_until_one_is_written(changed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    search_on(changed, load_device("vpu"))
    (device,) = export(changed, out, formats=("standalone",), images=4, resolution_px=12).devices
    assert (device.files, device.problem) == ((), "")
    assert device.command == f"qnas export {changed} --resolution 12 --out {out} --format vpu"
    assert runs_where(export(changed, out, formats=("vpu",), images=4)) == {"myriad-vpu": ("model_vpu.onnx",)}
    # it stays, beside a file of another format
    assert runs_where(export(changed, out, images=4)) == {"myriad-vpu": ("model_vpu.onnx",)}


@pytest.mark.usefixtures("other_formats")
@pytest.mark.parametrize(
    ("device", "options", "formats"),
    [
        ("vpu", {}, ["vpu"]),
        ("vpu", {"precision": "fp16"}, ["onnx"]),
        ("vpu", {"batch": 2}, ["onnx"]),
        ("vpu", {"opset": 17}, ["onnx"]),  # of ONNX alone
        ("gpu", {}, ["torch", "onnx"]),
        ("gpu", {"precision": "int8"}, ["onnx"]),
        ("gpu", {"aot": True}, ["torch", "onnx", "aot"]),
        (None, {}, ["onnx"]),
    ],
)
def test_what_is_written_without_a_format(
    device: str | None, options: dict[str, Any], formats: list[str], changed: Path
) -> None:
    if device is None:
        path = changed / SUBNET_FOLDER / ARCH_FILE
        write_json(path, arch_document(SPACE, ARCH, {}))
    else:
        search_on(changed, load_device(device))
    request, found = ExportRequest(**options), find_arch(changed / SUBNET_FOLDER)
    (precision,) = request.precisions(found)
    assert list(request.choice(found, precision).formats) == formats


def test_a_search_on_an_int8_device_exports_and_checks_int8(changed: Path, tmp_path: Path) -> None:
    fast = load_device("cpu").model_copy(
        update={"name": "fast", "aliases": (), "runtime": "onnxruntime", "file_precision": "int8"}
    )
    plain = load_device("cpu").model_copy(update={"name": "plain", "aliases": (), "runtime": "onnxruntime"})
    write_text(tmp_path / "fast.json", fast.to_json())
    write_text(tmp_path / "plain.json", plain.to_json())
    search_on(changed, fast, plain)
    limits = [
        {"name": d.name, "budget": "20ms", "device": str(tmp_path / f"{d.name}.json")} for d in (fast, plain)
    ]
    write_json(changed / "config.json", {"search": {}, "limits": limits})
    with pytest.warns(QnasWarning, match="is not recomputed"):
        done = export_trained(changed, tmp_path / "out", ExportRequest(images=40))
    assert [(file.format, file.precision) for file in done.files] == [("onnx", "int8"), ("onnx", "fp32")]
    assert done.files[0].parity.accuracy == pytest.approx(done.files[0].parity.network_accuracy, abs=0.1)
    assert [latency.precision for latency in done.predicted] == ["int8", "fp32"]
    assert "for files in int8" in describe_latency(done.predicted[0].facts())
    assert [device.files for device in done.devices] == [
        ("model_int8.onnx",),
        ("model_int8.onnx", "model.onnx"),
    ]
    with pytest.warns(QnasWarning, match="is not recomputed"):
        in_floats = export_trained(changed, tmp_path / "floats", ExportRequest(images=40, formats=("onnx",)))
    assert [file.precision for file in in_floats.files] == ["fp32"]
    assert in_floats.devices[0].command.endswith("--format onnx --precision int8")


def test_aot_is_one_more_format(trained: Path) -> None:
    with pytest.raises(UsageError, match="format aot has no int8: take fp32 or fp16, or the format "):
        export(trained, aot=True, precision="int8")
