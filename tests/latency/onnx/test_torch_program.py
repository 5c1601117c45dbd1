"""Programs of torch.export are read as the operators that they run, without a pickle, or refused."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, document_mutants, read_or_refuse
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small

from qnas.common.errors import ArchError
from qnas.deploy.module_latency import trace_module
from qnas.latency.device import load_device
from qnas.latency.onnx.networks import read_onnx
from qnas.latency.prediction import DEVICE, predict_file

GRAPH = "models/model.json"


class Mixed(nn.Module):
    """Most operators of networks of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.clip = nn.Hardtanh(-6, 6)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        d = x - x.mean(1, keepdim=True)
        x = x + d * ((d * d).mean(1, keepdim=True) + 1e-6).pow(-0.5)
        x = self.clip(self.depthwise(x)) * nn.functional.silu(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = torch.cat([nn.functional.gelu(x), nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        y: Tensor = self.head(x)
        return y


class Parts(nn.Module):
    """Operators that take tensors apart and put them together, attention, and what resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding="same"), nn.GroupNorm(3, 12), nn.LeakyReLU())
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.stem(x), (1, 2, 0, 1))[:, :, :16, 1:17]
        a, b, c = x.chunk(3, 1)
        x = torch.cat([torch.roll(a, (2, 1), (2, 3)), b * c, torch.split(x, [4, 8], 1)[0]], 1)
        x = nn.functional.adaptive_avg_pool2d(nn.functional.interpolate(x, scale_factor=2.0), 8)
        q, k, v = (
            self.qkv(x.flatten(2).transpose(1, 2)).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        x = nn.functional.scaled_dot_product_attention(q, k, v).swapaxes(1, 2).flatten(2)
        x = torch.stack([x, x.square()], 1).select(1, 0) + torch.einsum("bnc,bnc->bnc", x, x)
        y: Tensor = self.head(x.mul_(2).mean(1))
        return y


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.linalg.det(x.relu()[..., :8])
        return y


@cache
def program(make: Callable[[], nn.Module], px: int, *, decomposed: bool) -> bytes:
    free = {0: torch.export.Dim("batch")}
    image = torch.zeros(3, 3, px, px)
    exported = torch.export.export(make().eval(), (image,), dynamic_shapes=(free,))
    file = io.BytesIO()
    torch.export.save(exported.run_decompositions() if decomposed else exported, file)
    return file.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.pt2"


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("make", "px"), [(Mixed, 16), pytest.param(mobilenet_v3_small, 64, marks=pytest.mark.slow)]
)
def test_a_program_takes_what_its_module_takes(
    make: Callable[[], nn.Module], px: int, decomposed: bool, file: Path
) -> None:
    file.write_bytes(program(make, px, decomposed=decomposed))
    found, module = read_onnx(file), trace_module(make().eval(), torch.zeros(1, 3, px, px))
    assert not found.uncovered
    assert found.macs == module.macs
    device = load_device("cpu")
    ours, theirs = (predict_file(DEVICE, device, each).latency_ms for each in (module, found))
    assert theirs == pytest.approx(ours, rel=0.01)


def test_a_program_of_many_parts_is_read_whole(file: Path) -> None:
    """All multiply-adds are counted, and nothing that moves data is free."""
    file.write_bytes(program(Parts, 16, decomposed=False))
    found = read_onnx(file)
    assert found.macs == 256 * 27 * 12 + 64 * 12 * 36 + 2 * 2 * 64 * 64 * 6 + 12 * 5
    assert dict.fromkeys(found.uncovered) == dict.fromkeys(
        ["GroupNormalization", "LeakyRelu", "Pad", "Resize", "Softmax", "Einsum"]
    )
    kinds = [operator.kernel.kind for operator in found.operators]
    assert kinds.count("split") == 5  # chunk, split, unbind, and the slices of a roll along each dimension
    assert kinds.count("concat") == 4  # two of the roll, cat, stack
    assert kinds.count("matmul") == 2
    assert {"avgpool", "transpose", "slice", "square", "mul", "add", "mul_scalar"} < set(kinds)


def test_an_operator_without_a_name_of_ours_is_named(file: Path) -> None:
    file.write_bytes(program(Odd, 8, decomposed=False))
    with pytest.raises(ArchError, match=r"not known.*: torch.linalg_det.default \(1\)|torch._linalg_det"):
        read_onnx(file)


def repacked(content: bytes, change: Callable[[bytes], bytes], member: str = GRAPH) -> bytes:
    """Return an archive with another content of one member."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(packed, "w") as other:
        for info in archive.infolist():
            inside = archive.read(info)
            other.writestr(info.filename, change(inside) if info.filename.endswith(member) else inside)
    return packed.getvalue()


def test_no_pickle_is_read(file: Path) -> None:
    """Else an opcode of a pickle that runs a function would run here."""
    content = program(Mixed, 16, decomposed=True)
    evil = b"cos\nabort\n(tR."
    file.write_bytes(repacked(content, lambda _: evil, "sample_inputs/model.pt"))
    assert read_onnx(file).macs > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a program of torch.export, or a damaged one"),
        (b"PK\x03\x04", "not a program of torch.export, or a damaged one"),
        (b"no graph", "expected one graph of torch.export in it, found 0; a compiled package has none"),
        (b"deep", "not JSON: lists nested too deeply"),
        (b"list", "expected a JSON object"),
        (b"text", "not a valid torch.export file"),
    ],
)
def test_a_file_that_is_no_program_is_refused(content: bytes, message: str, file: Path) -> None:
    graphs = {b"deep": b"[" * 100_000, b"list": b"[]", b"text": b"\xff\xff"}
    if content in graphs:
        content = repacked(program(Odd, 8, decomposed=False), lambda _: graphs[content])
    elif content == b"no graph":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("model/data/aotinductor/model/model.so", "x")
        content = packed.getvalue()
    file.write_bytes(content)
    with pytest.raises(ArchError, match=message):
        read_onnx(file)


def mutants(count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of a program, most of its graph."""
    content, rng = program(Mixed, 16, decomposed=True), Random(seed)
    yield from byte_mutants(content, count // 4, seed=seed)
    for _ in range(count - count // 4):
        number = rng.randrange(2**31)

        def change(graph: bytes, number: int = number) -> bytes:
            if number % 2:
                return next(byte_mutants(graph, 1, seed=number))
            try:
                (changed,) = document_mutants(json.loads(graph), 1, seed=number)
                return json.dumps(changed).encode(errors="surrogatepass")
            except (RecursionError, ValueError):  # of what is nested twice
                return b"["

        yield repacked(content, change)


def predict(path: Path) -> Any:
    return predict_file(DEVICE, load_device("cpu"), read_onnx(path))


@bounded
@given(seed=st.integers(0, 2**32))
def test_a_mutant_is_read_or_refused(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    for content in mutants(1, seed):
        read_or_refuse(predict, tmp_path_factory.getbasetemp() / "mutant.pt2", content)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(file: Path) -> None:
    assert attack(predict, file, mutants(MUTANTS)) == []
