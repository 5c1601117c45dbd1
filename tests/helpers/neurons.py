"""Laws that every registered neuron must meet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.exported import PX, digits, trained
from helpers.tiny import TINY_SPACE
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.deploy.export import standalone
from qnas.deploy.export.folding import fold_norms
from qnas.deploy.export.product import Variant
from qnas.nn.blocks import QuadraBlock, build_block, quadratic_weights, start_linear
from qnas.nn.subnet import build_network
from qnas.spaces.arch import make_arch
from qnas.spaces.blocks import Place
from qnas.spaces.lower import lower, make_block
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import parse_space


def check_neuron(name: str, folder: Path) -> None:
    """Check a neuron in blocks of each norm and of none, its linear start, and a network of it as a file."""
    for norm in ("layernorm", "batchnorm", "scale"):
        _check_block(name, norm)
        _check_file(name, norm, folder / f"{norm}.py")
    _check_start(name)


def _randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if key.endswith("running_var") else (-0.5, 0.5)
            nn.init.uniform_(tensor, low, high, generator=generator)
    return module.eval()


def _block(name: str, norm: str) -> QuadraBlock:
    place = Place(6, 6, 1, 9, "layernorm", "gelu")
    spec = make_block("1.1", "quadra", place, kernel=5, expansion=2, neuron=name, norm=norm)
    block = build_block(spec)  # compares the parameters with the layers'
    assert isinstance(block, QuadraBlock)
    for layer in spec.layers:
        if layer.role in NEURONS[name].roles:
            assert (block.convolution(layer.role).bias is not None) == layer.bias, layer.role
    return block


def _image() -> Tensor:
    return torch.randn(2, 6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _check_block(name: str, norm: str) -> None:
    block, x = _randomised(_block(name, norm).double()), _image()
    assert isinstance(block, QuadraBlock)

    def plain(conv: nn.Conv2d) -> nn.Module:
        copy = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=conv.bias is not None).double()
        copy.load_state_dict(conv.state_dict())
        return copy

    with torch.no_grad():
        expected = NEURONS[name].formula(x, *map(plain, block.convolutions))
        torch.testing.assert_close(block.mix(x), expected, rtol=1e-9, atol=1e-9)
        before = block(3 * x)
        fold_norms(block)
        torch.testing.assert_close(block(3 * x), before, rtol=1e-9, atol=1e-9)
    if norm == "batchnorm":
        assert isinstance(block.norm1, nn.Identity) == bool(NEURONS[name].folds)
        assert hasattr(block, "clip") == NEURONS[name].multiplies
    if norm == "scale":
        assert isinstance(block.scale1, nn.Identity) == bool(NEURONS[name].scaled)
        assert isinstance(block.scale2, nn.Identity)
        assert hasattr(block, "clip") == NEURONS[name].multiplies


def _bend(block: QuadraBlock) -> float:
    """Return how far a mixer is from a linear function."""
    x = _image()
    with torch.no_grad():
        return float((block.mix(2 * x) - 2 * block.mix(x) + block.mix(0 * x)).abs().max())


def _check_start(name: str) -> None:
    torch.manual_seed(0)
    fresh = QuadraBlock(256, 5, 1, neuron=name)
    x = torch.randn(4, 256, 12, 12)
    with torch.no_grad():
        y = fresh.mix(x)[:, :, 2:-2, 2:-2]  # without borders
    # a third of the second moment of x is what torch's own convolution has
    assert 0.25 < float((y**2).mean()) < 1.0
    block = _block(name, "layernorm").double()
    if NEURONS[name].zeros is None:
        for use in (start_linear, quadratic_weights):
            with pytest.raises(
                UsageError, match=rf"neurons with a linear part .*, but the network has {name}"
            ):
                use(block)
        return
    start_linear(block)
    assert _bend(block) < 1e-12
    weights = quadratic_weights(block)
    F.mse_loss(block(_image()), torch.zeros(1, dtype=torch.float64).expand(2, 6, 9, 8)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    zero = [weight for weight in weights if not weight.any()]
    assert bool(zero) == bool(weights)
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in zero)


def _check_file(name: str, norm: str, path: Path) -> None:
    candidate = "{block: quadra, kernel: [3, 5], expansion: [2, 4]}"
    own = "norm: scale, " if norm == "scale" else ""
    text = TINY_SPACE if own else TINY_SPACE.replace("norm: layernorm", f"norm: {norm}")
    words = f"{{neuron: {name}, {own}"
    space = parse_space(text.replace(candidate, candidate.replace("{", words, 1)), "tiny")
    chosen = space.positions[0].names[2]
    assert chosen.startswith("quadra_k5_e2")
    arch = make_arch(space, (chosen, "identity", "quadra_k3_e2", "identity"))
    blocks = lower(space, arch, resolution_px=PX, classes=10)
    network = _randomised(build_network(blocks))
    assert isinstance(network, nn.Sequential)
    standalone.write(replace(trained(), network=network, blocks=blocks), Variant(), path, "file")
    images = digits(16).take(range(16))
    with torch.no_grad():
        expected = network(images)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(standalone.load(path)(images), expected, rtol=1e-4, atol=1e-4)
    written = path.read_text()
    assert "import qnas" not in written
    assert "from qnas" not in written
    assert f"mixer=Mixer({NEURONS[name].formula.__name__}, " in written
    assert max(map(len, written.splitlines())) <= 110
