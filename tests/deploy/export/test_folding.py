import copy

import pytest
import torch
from helpers.exported import digits, normed_product, trained, wired_product
from torch import nn

from qnas.deploy.export.folding import fold_norms
from qnas.nn.blocks import LayerScale, QuadraBlock
from qnas.spaces.neurons import NEURONS


@pytest.mark.parametrize("neuron", NEURONS)
def test_folding_a_norm_changes_no_output(neuron: str) -> None:
    torch.manual_seed(0)
    block = QuadraBlock(6, 5, 2, norm="batchnorm", neuron=neuron).double().eval()
    assert isinstance(block.norm1, nn.BatchNorm2d)
    for tensor in (*block.parameters(), block.norm1.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]  # running_mean is None only without statistics
    nn.init.uniform_(block.norm1.running_var, 0.5, 2.0)  # type: ignore[arg-type]  # as above
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        mixed = block.norm1(block.mix(x))
        assert 0.1 < float((mixed.abs() > 6).float().mean()) < 0.9  # on both sides of the clip
        expected = block(x)
        fold_norms(block)
        torch.testing.assert_close(block.norm1(block.mix(x)), mixed, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    # a square or a product that comes last takes up no shift
    stays = not NEURONS[neuron].folds
    assert isinstance(block.norm1, nn.BatchNorm2d if stays else nn.Identity)
    assert isinstance(block.norm2, nn.Identity)
    assert neuron == "linear" or isinstance(block.clip, nn.Hardtanh)


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_learned_scales_of_either_sign_fold_into_convolutions_and_their_biases(norm: str) -> None:
    product, _, _ = normed_product(norm)
    network = copy.deepcopy(product.network).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
        scales = [module for module in network.modules() if isinstance(module, LayerScale)]
        assert len(scales) == 8
        assert all(bool((scale.weight < 0).any()) for scale in scales)
        fold_norms(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)
    left = [n for n, module in network.named_modules() if isinstance(module, LayerScale | nn.BatchNorm2d)]
    assert left == ["1_6.scale1", "1_7.norm1"]  # behind a square, and a shift behind a product


def test_all_norms_of_a_network_fold_away_and_change_no_output() -> None:
    network = copy.deepcopy(trained("batchnorm").network).double()
    images = digits(16).take(range(16)).double()
    with torch.no_grad():
        expected = network(images)
        assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        fold_norms(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("activation", ["relu6", "hswish"])
def test_norms_fold_into_the_convolutions_of_blocks_that_are_no_chains(activation: str) -> None:
    product, _, _ = wired_product(activation)
    network = copy.deepcopy(product.network).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
        fold_norms(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)
    left = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ["1_7.norm1"]  # behind the product of a factored QuadraBlock
    factored = network.get_submodule("1_3")
    assert all(factored.get_submodule(name).bias is not None for name in ("conv_a", "conv_b"))


def test_a_norm_in_a_users_module_folds_only_where_it_follows_a_convolution_in_a_sequential() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)  # declared behind the convolution, but runs before it
            self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.tail(self.conv(self.norm(x)))
            return y

    module = Own().double()
    for _ in range(3):  # statistics
        module(torch.randn(8, 4, 3, 3, dtype=torch.float64) + 1)
    module.eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        fold_norms(module)
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
    left = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert left == ["norm", "tail.3"]
