import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.nn.subnet import build_subnet
from qnas.nn.supernet import Supernet
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import METRICS_FILE, RESULT_FILE, SUPERNET_FILE, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors, save_supernet
from qnas.spaces.arch import arch_document, make_arch
from qnas.spaces.lower import smallest_and_largest
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training import teacher as teacher_module
from qnas.training.acceleration import PLAIN
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import train_subnet
from qnas.training.teacher import Renormalised, load_teacher

CHOICES = ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2")
OPTIONS: dict[str, Any] = {"weight": 0.5, "temperature": 2.0}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture
def source(tiny_space: SearchSpace, tmp_path: Path) -> FoundArch:
    arch = make_arch(tiny_space, CHOICES)
    return FoundArch(tiny_space, arch, arch_document(tiny_space, arch, {}), tmp_path)


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_supernets_largest_network_answers_as_it_does_in_it(
    source: FoundArch, digits: ImageData, tmp_path: Path
) -> None:
    supernet = Supernet(source.space, 10, torch.Generator().manual_seed(0)).eval()
    save_supernet(tmp_path / SUPERNET_FILE, supernet.state_dict())
    teacher, _ = load_teacher("supernet-largest", source, digits, **OPTIONS)
    largest = smallest_and_largest(source.space)[1]
    assert set(largest.choices) == {"quadra_k5_e4", "quadra_k3_e2"}
    with torch.no_grad():
        expected = supernet(images(), largest.indices(source.space))
        torch.testing.assert_close(teacher.forward(images()), expected, rtol=1e-4, atol=1e-5)


def test_the_supernets_batch_statistics_are_measured_for_its_largest(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    space = parse_space(tiny_space.to_yaml().replace("layernorm", "batchnorm"), "tiny.yaml")
    source = FoundArch(space, smallest_and_largest(space)[0], {}, tmp_path)
    save_supernet(
        tmp_path / SUPERNET_FILE, Supernet(space, 10, torch.Generator().manual_seed(0)).state_dict()
    )
    teacher, _ = load_teacher("supernet-largest", source, digits, **OPTIONS)
    assert isinstance(teacher.forward, nn.Module)
    norms = [m for m in teacher.forward.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.running_mean is not None and bool(norm.running_mean.any()) for norm in norms)


def test_a_trained_network_teaches_with_its_own_normalisation(
    source: FoundArch, digits: ImageData, tmp_path: Path
) -> None:
    how = TrainConfig(recipe=Recipe(resolution_px=8, epochs=1, batch_size=128, learning_rate=5e-3))
    folder = tmp_path / "trained"
    train_subnet(source, digits, how, folder, {"data": "digits"}, from_supernet=False)
    network = build_subnet(source.space, source.arch, 10).eval()
    network.load_state_dict(load_tensors(folder / WEIGHTS_FILE))
    teacher, digest = load_teacher(str(folder), source, digits, **OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(teacher.forward(images()), network(images()), rtol=1e-4, atol=1e-4)
    assert load_teacher(str(folder), source, digits, **OPTIONS)[1] == digest
    # and a student of it learns with it
    again = tmp_path / "student"
    train_subnet(source, digits, how, again, {"data": "digits"}, from_supernet=False, teacher=teacher)
    plain, taught = (
        [json.loads(line)["loss"] for line in (f / METRICS_FILE).read_text().splitlines()]
        for f in (folder, again)
    )
    assert plain[0] != taught[0]
    result = json.loads((folder / RESULT_FILE).read_text())
    renamed = [f"number {name}" for name in result["classes"]]
    rows = [{**row, "class": name} for row, name in zip(result["per_class"], renamed, strict=True)]
    (folder / RESULT_FILE).write_text(json.dumps({**result, "classes": renamed, "per_class": rows}))
    with pytest.raises(UsageError, match="its classes are not those of the data"):
        load_teacher(str(folder), source, digits, **OPTIONS)


def test_images_are_normalised_anew() -> None:
    """(x s + m - m') / s' of an identity."""
    renormalised = Renormalised(nn.Identity(), ([0.5], [0.2]), ([0.4, 0.5, 0.6], [0.1, 0.2, 0.4]))
    x = torch.tensor([[[[1.0]]]])
    expected = torch.tensor([(0.7 - 0.4) / 0.1, (0.7 - 0.5) / 0.2, (0.7 - 0.6) / 0.4])
    torch.testing.assert_close(renormalised(x)[0, :, 0, 0], expected)


def test_timms_models_teach_where_their_classes_fit(
    source: FoundArch, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    create, classes = timm.create_model, 10
    asked: list[bool] = []

    def create_here(name: str, *, pretrained: bool) -> nn.Module:
        asked.append(pretrained)
        network: nn.Module = create(name, pretrained=False, num_classes=classes)
        return network

    monkeypatch.setattr(timm, "create_model", create_here)
    monkeypatch.setattr(teacher_module, "hub_problem", str)
    for name in ("test_resnet", "test_vit"):  # one takes any size, the other one only
        teacher, _ = load_teacher(f"timm:{name}", source, digits, **OPTIONS)
        assert teacher.loss(images(), torch.zeros(4, 10)).isfinite()
    assert asked == [True, True], "its own weights"
    classes = 7
    with pytest.raises(UsageError, match="knows 7 classes, the data have 10"):
        load_teacher("timm:test_resnet", source, digits, **OPTIONS)
    with pytest.raises(UsageError, match="`teacher='timm:no_such'`: Unknown model"):
        load_teacher("timm:no_such", source, digits, **OPTIONS)


def test_weights_of_timm_that_are_not_here_are_refused_without_the_hub(
    source: FoundArch, digits: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(UsageError) as refused:
        load_teacher("timm:test_resnet.r160_in1k", source, digits, **OPTIONS)
    assert time.monotonic() - started < 10, "no retries"
    message = str(refused.value)
    assert message.startswith(
        "`teacher='timm:test_resnet.r160_in1k'`: http://127.0.0.1:9 cannot be reached ("
    )
    assert "and the weights are not in its cache: run it once with a connection" in message
    assert len(message) <= 300
    assert message.isprintable()


def test_without_timm_it_is_said_what_to_install(
    source: FoundArch, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match=r"pip install 'quadranet-nas\[timm\]'"):
        load_teacher("timm:resnet18", source, digits, **OPTIONS)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [("supernet-largest", "no supernet.safetensors in"), ("nowhere", "expected supernet-largest, timm:NAME")],
)
def test_a_teacher_that_is_not_there_is_refused(
    spec: str, problem: str, source: FoundArch, digits: ImageData
) -> None:
    with pytest.raises(UsageError, match=problem):
        load_teacher(spec, source, digits, **OPTIONS)


def test_a_teacher_does_not_learn(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    supernet = Supernet(source.space, 10, torch.Generator().manual_seed(0))
    save_supernet(tmp_path / SUPERNET_FILE, supernet.state_dict())
    teacher, _ = load_teacher("supernet-largest", source, digits, device=PLAIN.device, **OPTIONS)
    assert isinstance(teacher.forward, nn.Module)
    assert not any(weight.requires_grad for weight in teacher.forward.parameters())
    assert not teacher.forward.training
