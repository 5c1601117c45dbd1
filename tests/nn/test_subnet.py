import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qnas.common.resources import stems
from qnas.nn.blocks import count_parameters
from qnas.nn.subnet import build_network, build_subnet, module_name
from qnas.spaces.arch import Arch, sample_arch
from qnas.spaces.lower import BlockSpec, count_macs, count_params, lower
from qnas.spaces.space import SearchSpace, load_space

SHIPPED = list(stems("search_spaces", ".yaml"))
SMALL_PX = 45  # odd, so that every rounding of a size counts


def some_archs(space: SearchSpace) -> list[Arch]:
    rng = np.random.default_rng(0)
    return [sample_arch(space, rng)] if space.is_fixed else [sample_arch(space, rng) for _ in range(4)]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_module_is_what_was_counted(name: str) -> None:
    space = load_space(name)
    for arch in some_archs(space):
        blocks = lower(space, arch, resolution_px=SMALL_PX, classes=7)
        # torch's shape functions on the meta device: nothing is computed
        with torch.device("meta"):
            network = build_network(blocks).eval()
            outputs = _run(network, torch.empty(2, 3, SMALL_PX, SMALL_PX))
        assert count_parameters(network) == count_params(blocks)
        assert outputs.macs == 2 * count_macs(blocks)  # two images
        shapes = dict(outputs.shapes)
        for block in blocks:
            _check_shape(block, shapes)
        assert not shapes


class _Outputs:
    """The outputs of the blocks of a network."""

    def __init__(self, macs: int, shapes: dict[str, tuple[int, ...]]) -> None:
        self.macs, self.shapes = macs, shapes


def _run(network: nn.Sequential, x: Tensor) -> _Outputs:
    shapes = {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for name, module in network.named_children():
            x = module(x)
            shapes[name] = tuple(x.shape)
    return _Outputs(counter.get_total_flops() // 2, shapes)


def _check_shape(block: BlockSpec, shapes: dict[str, tuple[int, ...]]) -> None:
    if not block.layers:
        return
    last = block.layers[-1]
    shape = shapes.pop(module_name(block))
    expected = (2, last.c_out, last.out_px, last.out_px)
    assert shape == expected[: len(shape)], block.name


@pytest.mark.parametrize("name", ["quadranet-small", "quadranet-mobile-bn", "proxyless-mobile"])
def test_one_network_serves_every_resolution_and_batch(name: str) -> None:
    space = load_space(name)
    network = build_subnet(space, sample_arch(space, np.random.default_rng(0)), 5).eval()
    with torch.no_grad():
        for px in (32, 45, 64):
            x = torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(0))
            logits = network(x)
            assert logits.shape == (3, 5)
            alone = torch.cat([network(x[i : i + 1]) for i in range(3)])
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


def test_identities_vanish() -> None:
    space = load_space("quadranet-small")
    network = build_subnet(space, Arch(("identity",) * len(space.positions)), 5)
    assert [name for name, _ in network.named_children()] == ["stem", "2_transition", "3_transition", "head"]


def test_weights_are_in_channels_last_memory() -> None:
    space = load_space("quadranet-small")
    network = build_subnet(space, sample_arch(space, np.random.default_rng(0)), 5)
    for name, weight in network.named_parameters():
        if weight.ndim == 4:
            assert weight.is_contiguous(memory_format=torch.channels_last), name
