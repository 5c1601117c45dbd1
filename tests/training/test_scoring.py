import pytest
import torch
from helpers.pretrained import built, tiny_network
from torch import nn

from qnas.data.image_data import Split
from qnas.training.scoring import images_at_once, recalibrate


@pytest.mark.parametrize(
    ("px", "on_cpu"), [(28, 256), (64, 128), (96, 64), (128, 32), (160, 32), (224, 16), (512, 16)]
)
def test_large_images_are_classified_fewer_at_once_on_a_cpu(px: int, on_cpu: int) -> None:
    images = torch.zeros(1, 3, px, px, dtype=torch.uint8)
    split = Split("test", images, torch.zeros(1, dtype=torch.int64), (0.5,) * 3, (0.5,) * 3, flip=False)
    assert images_at_once(split, torch.device("cpu")) == on_cpu
    assert images_at_once(split, torch.device("cuda")) == 256


@torch.no_grad()
@pytest.mark.parametrize("momentum", [0.1, 0.01])
@pytest.mark.parametrize("images", [2, 9])
def test_statistics_are_measured_anew_whatever_the_momentum_and_however_few_the_images(
    momentum: float, images: int
) -> None:
    network = built(tiny_network())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
    torch.manual_seed(0)
    x = torch.randn(images, 3, 32, 32)
    recalibrate(network, [(x, torch.zeros(images))])
    stem = network.get_submodule("stem.conv")(x)
    first = network.get_submodule("stem.norm")
    torch.testing.assert_close(first.running_mean, stem.mean((0, 2, 3)))
    torch.testing.assert_close(first.running_var, stem.var((0, 2, 3)))
    # the epsilon and the momentum are as they were, and nothing else is trained
    assert {(norm.eps, norm.momentum, norm.training) for norm in norms} == {(1e-2, momentum, False)}
    before = built(tiny_network()).state_dict()
    for name, tensor in network.state_dict().items():
        if not name.rpartition(".")[2].startswith(("running", "num_batches")):
            assert torch.equal(tensor, before[name]), name
