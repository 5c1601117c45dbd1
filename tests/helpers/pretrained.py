"""A small network with weights that do something, as if it came from elsewhere."""

import torch
from torch import nn

from qnas.nn.pretrained.derivation import Residual, fixed_space
from qnas.nn.pretrained.network import PretrainedNetwork, digest_of_tensors
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import only_arch
from qnas.spaces.space import SearchSpace

MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]
NAME = "tiny-net"


def tiny_space(activation: str = "relu6", padding: str = "same") -> SearchSpace:
    """Return four blocks: without an expansion, with a stride, with a shortcut, and wider ones."""
    blocks = [Residual(8, 1, 3, 1), Residual(12, 2, 5, 6), Residual(12, 1, 5, 6), Residual(16, 2, 3, 4)]
    return fixed_space(
        NAME,
        blocks,
        input={"channels": 3, "resolution_px": 32, "mean": MEAN, "std": STD},
        activation=activation,
        padding=padding,
        norm_eps=1e-2,  # so that another epsilon shows
        stem={"channels": 8, "kernel": 3, "stride": 2, "activation": True},
        head={"channels": 24, "classes": 10},
    )


def tiny_network(activation: str = "relu6", padding: str = "same") -> PretrainedNetwork:
    """Return the network with random weights and statistics."""
    space = tiny_space(activation, padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)  # not the seed of a search, whose weights would then be the same
        network = build_subnet(space, only_arch(space), 10)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.5, 0.3)
                nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]  # has statistics
                nn.init.uniform_(module.running_var, 0.02, 1)  # type: ignore[arg-type]
                module.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return PretrainedNetwork(NAME, space, state, digest_of_tensors(state))


def built(network: PretrainedNetwork) -> nn.Sequential:
    """Return the module of a pretrained network, in evaluation mode."""
    module = build_subnet(network.space, only_arch(network.space), network.space.head.classes)
    module.load_state_dict(network.state)
    return module.eval()
