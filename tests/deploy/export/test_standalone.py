import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exported import PX, digits, trained, wired_product
from helpers.odd_images import COLOURS, drawn, png16, write_all_kinds
from helpers.own_blocks import register_gate
from helpers.tiny import TINY_SPACE
from PIL import Image
from torch import nn

from qnas.common.resources import stems
from qnas.data.image_files import OriginalFile
from qnas.data.lazy_images import LazyImages
from qnas.data.normalisation import normalise
from qnas.deploy.export import standalone
from qnas.deploy.export.product import Product, Variant
from qnas.nn.subnet import build_network
from qnas.spaces.arch import make_arch, sample_arch
from qnas.spaces.layer import OPS
from qnas.spaces.lower import lower
from qnas.spaces.space import load_space, parse_space


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file, imported as its user does."""
    standalone.write(trained(), Variant(), tmp_path / "model.py", "file")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("model", None)
    import model  # type: ignore[import-not-found]  # written above

    yield model
    sys.modules.pop("model", None)


def product_of(space_name: str) -> Product:
    space = load_space(space_name)
    blocks = lower(space, sample_arch(space, np.random.default_rng(0)), classes=7)
    with torch.device("meta"):
        network = build_network(blocks).eval()
    return replace(trained(), network=network, blocks=blocks, classes=tuple("abcdefg"))


def test_every_layer_has_a_plain_form() -> None:
    assert set(standalone.LAYERS) | {"mul", "add", "scale", "square"} == set(OPS)


@pytest.mark.parametrize("name", stems("search_spaces", ".yaml"))
def test_every_space_is_written_with_the_weights_that_its_networks_have(name: str) -> None:
    product = product_of(name)
    text = standalone.source(product, "fp32")
    module: dict[str, object] = {"__file__": "model.py", "__name__": "model"}
    exec(compile(text, "model.py", "exec"), module)
    build = module["build"]
    assert callable(build)
    with torch.device("meta"):
        built: nn.Module = build()
    expected = Counter(tuple(tensor.shape) for tensor in product.network.state_dict().values())
    assert Counter(tuple(tensor.shape) for tensor in built.state_dict().values()) == expected
    assert max(map(len, text.splitlines())) <= 110
    # only what is used is defined
    defined = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert all(text.count(f"{name}(") > 1 for name in defined), defined


@pytest.mark.usefixtures("_registries")
def test_a_registered_block_is_copied_into_the_file_with_what_it_uses(tmp_path: Path) -> None:
    register_gate()
    space = parse_space(TINY_SPACE.replace("block: identity", "block: gate, width: 3, act: relu6"), "tiny")
    arch = make_arch(space, ("quadra_k3_e2", "gate_w3_relu6", "quadra_k3_e2", "gate_w3_relu6"))
    blocks = lower(space, arch, resolution_px=PX, classes=10)
    torch.manual_seed(0)
    network = build_network(blocks).eval()
    path = tmp_path / "model.py"
    standalone.write(replace(trained(), network=network, blocks=blocks), Variant(), path, "file")
    text = path.read_text()
    assert 'stage1_2=Gate(c_in=8, width=3, act="relu6"),' in text.replace("'", '"')
    assert "\nSLOPE = 0.5\n" in text
    assert "qnas." not in text
    assert "def layers" not in text
    images = digits(16).take(range(16))
    with torch.no_grad():
        torch.testing.assert_close(standalone.load(path)(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu6", "hswish"])
def test_blocks_that_are_no_chains_are_written_with_their_own_forward(
    activation: str, tmp_path: Path
) -> None:
    product, _, _ = wired_product(activation)
    path = tmp_path / "model.py"
    standalone.write(product, Variant(), path, "file")
    text = path.read_text()
    assert "qnas." not in text
    assert {"class StarBlock(nn.Sequential):", "class MBConvBlock(nn.Sequential):"} <= set(text.splitlines())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = product.network(images)
        torch.testing.assert_close(standalone.load(path)(images), expected, rtol=1e-5, atol=1e-5)


def test_a_network_of_other_classes_can_be_built_and_trained(model: ModuleType) -> None:
    network = model.build(classes=7)
    assert network.training
    logits = network(torch.zeros(2, 3, PX, PX))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_photograph_is_prepared_as_the_training_images_were(model: ModuleType) -> None:
    pixels = digits(1).pixels[0]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    expected = normalise(pixels[None], trained().mean, trained().std)
    torch.testing.assert_close(model.preprocess(image), expected, rtol=1e-5, atol=1e-5)
    # the central square of a wide one
    square = image.resize((3 * PX, 3 * PX))
    wide = Image.new("RGB", (7 * PX, 3 * PX), "red")
    wide.paste(square, (2 * PX, 0))
    torch.testing.assert_close(model.preprocess(wide), model.preprocess(square), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bits", "px", "pads", "channels"),
    [(16, 8, False, 3), (12, 24, False, 3), (16, 33, True, 1), (16, 96, False, 3)],
)
def test_every_image_becomes_the_pixels_of_the_training(
    bits: int, px: int, pads: bool, channels: int, tmp_path: Path
) -> None:
    product = replace(
        trained(),
        mean=(0.0,) * channels,
        std=(1 / 255,) * channels,
        channels=channels,
        resolution_px=px,
        bits=bits,
        pads=pads,
    )
    module: dict[str, Any] = {"__file__": "model.py", "__name__": "model"}
    exec(compile(standalone.source(product, "fp32"), "model.py", "exec"), module)
    for path in write_all_kinds(tmp_path, bits):
        original = OriginalFile(path.name, str(path), path)
        expected = LazyImages([original], np.arange(1), px, channels, pads, bits)[0]
        with Image.open(path) as image:
            found = module["preprocess"](image)[0]
        assert torch.equal(found.round().to(torch.uint8), expected), path.name


def test_colours_that_would_lose_their_levels_are_not_classified(tmp_path: Path) -> None:
    module: dict[str, Any] = {"__file__": "model.py", "__name__": "model"}
    exec(compile(standalone.source(replace(trained(), bits=12), "fp32"), "model.py", "exec"), module)
    (tmp_path / "x.png").write_bytes(png16(drawn(9, 9).astype(np.uint16), COLOURS))
    with pytest.raises(ValueError, match="Pillow reads 8 of its 16 bits, of which 12 are significant"):
        module["preprocess"](Image.open(tmp_path / "x.png"))


def test_the_file_is_a_command_that_names_the_class_of_a_photograph(
    model: ModuleType, tmp_path: Path
) -> None:
    images = digits(50)
    with torch.no_grad():
        told = trained().network(images.take(range(50))).argmax(1)
    for place in (0, 20):
        Image.fromarray(images.pixels[place].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
        done = subprocess.run(
            [sys.executable, "model.py", "photo.png"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[0].split()[1] == str(int(told[place]))
        assert len(done.stdout.splitlines()) == 5


def test_timm_creates_it_after_one_line(model: ModuleType) -> None:
    timm = pytest.importorskip("timm")
    timm.models.register_model(model.qnas_tiny)
    network = timm.create_model("qnas_tiny", pretrained=True).eval()
    images = digits(20).take(range(20))
    with torch.no_grad():
        torch.testing.assert_close(network(images), trained().network(images), rtol=1e-4, atol=1e-4)
    config = timm.data.resolve_model_data_config(network)
    assert config["input_size"] == (3, PX, PX)
    assert config["mean"] == trained().mean
    assert config["std"] == trained().std
    other = timm.create_model("qnas_tiny", pretrained=True, num_classes=3)
    assert other(images).shape == (20, 3)
    for key, tensor in network.state_dict().items():
        if not key.startswith("head.classifier."):
            assert torch.equal(tensor, other.state_dict()[key]), key
    with pytest.raises(TypeError, match="drop_rat"):
        timm.create_model("qnas_tiny", drop_rat=0.1)


def test_class_names_of_any_kind_are_written_as_they_are(tmp_path: Path) -> None:
    names = ('"', "\\", "größe", "'''", "{0}", '"""', "two words", "", "a" * 120, "\n")
    odd = (
        "a\u2028b",
        "\u2029",
        "\x85\x7f\x0b\x0c",
        "\u202e",
        "\U000e0001",
        "\x1b[31m",
        "\ufeff",
        "\\u2028",
    )
    text = standalone.source(replace(trained(), classes=(*names, *odd)), "fp32")
    assert all(character.isprintable() or character == "\n" for character in text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CLASSES":
            assert ast.literal_eval(node.value) == (*names, *odd)
            break
    else:
        raise AssertionError(text)
