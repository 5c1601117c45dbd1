"""Supernets over several widths: a narrower network is that of its space, with slices of the weights."""

import pytest
import torch
from helpers.networks import WITH_BLOCK_TRANSITIONS
from helpers.tiny import TWO_KINDS
from torch import Tensor

from qnas.common.errors import UsageError
from qnas.nn.blocks import build_block
from qnas.nn.modes import WeightsMode
from qnas.nn.slices import Borrower
from qnas.nn.subnet import take_slice
from qnas.nn.supernet import Supernet
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.blocks import Place
from qnas.spaces.family import SpaceFamily, layout_of, make_family
from qnas.spaces.lower import make_block
from qnas.spaces.space import parse_space
from qnas.training.head_first import head_alone
from qnas.training.scoring import batch_statistics

FAMILIES = {
    "layer norm, convolutions between": make_family(
        parse_space(TWO_KINDS, "t"), [16, 32], [[16, 24], [8, 16]]
    ),
    "batch norm, blocks between": make_family(
        parse_space(WITH_BLOCK_TRANSITIONS, "t"), [32], [[8], [8], [8, 16, 24]]
    ),
}
CLASSES = 5


def supernet_of(family: SpaceFamily, weights: WeightsMode = "shared") -> Supernet:
    torch.manual_seed(0)
    return Supernet(family.largest, CLASSES, torch.Generator().manual_seed(0), weights, family)


def images(count: int = 3) -> Tensor:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_at_any_widths_is_that_of_its_space_with_slices_for_weights(name: str) -> None:
    family = FAMILIES[name]
    supernet, x, seen = supernet_of(family), images(), set()
    for seed, layout in enumerate(family.layouts()):
        space = family.at(layout)
        g = torch.Generator().manual_seed(seed)
        network = tuple(int(torch.randint(len(p.names), (1,), generator=g)) for p in space.positions)
        arch = arch_from_indices(space, network)
        alone = supernet.subnet(arch, CLASSES, space)
        before = {key: tensor.clone() for key, tensor in supernet.state_dict().items()}
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        supernet.train().zero_grad()
        got, expected = supernet(inputs[0], list(network), layout.channels), alone.train()(inputs[1])
        torch.testing.assert_close(got, expected)
        (got**2).sum().backward()
        (expected**2).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        # gradients and statistics are in the slices, and nowhere else
        total, of_alone = (
            sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)
            for module in (supernet, alone)
        )
        assert total == pytest.approx(of_alone, rel=1e-4)
        again = supernet.subnet(arch, CLASSES, space).state_dict()
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(again[key], tensor)
        changed = {k for k, t in supernet.state_dict().items() if not torch.equal(t, before[k])}
        assert all(".running_" in key or "num_batches" in key for key in changed)
        torch.testing.assert_close(supernet.eval()(x, list(network), layout.channels), alone.eval()(x))
        seen.add(tuple(tensor.shape for tensor in alone.state_dict().values()))
    assert len(seen) >= len({layout.channels for layout in family.layouts()})


def test_the_widest_network_runs_in_the_modules_themselves() -> None:
    family = FAMILIES["batch norm, blocks between"]
    supernet, x = supernet_of(family).eval(), images()
    path = [0] * len(family.largest.positions)
    widest = layout_of(family.largest).channels
    assert torch.equal(supernet(x, path), supernet(x, path, widest))
    parts = list(supernet.parts.values())
    assert list(supernet._parts_at(widest)) == parts
    narrow = list(supernet._parts_at((8, 8, 16)))
    # what the width of the last stage does not touch
    assert [part in parts for part in narrow] == [True] * 4 + [False] * 4
    assert not any(isinstance(module, Borrower) and module in narrow for module in supernet.modules())


def test_weights_of_several_widths_are_shared() -> None:
    modes: tuple[WeightsMode, ...] = ("independent", "nested")
    for weights in modes:
        with pytest.raises(UsageError, match=f"`weights='{weights}'`: two-kinds has several widths"):
            supernet_of(FAMILIES["layer norm, convolutions between"], weights)
    one = make_family(parse_space(TWO_KINDS, "t"), [16, 32])
    assert supernet_of(one, "independent").family is one


def test_narrower_blocks_run_in_the_mode_of_the_widest() -> None:
    supernet, x = supernet_of(FAMILIES["batch norm, blocks between"]), images(8)
    path, channels = [0] * 6, (8, 8, 8)
    trained = supernet.train()(x, path, channels)
    for _ in range(3):
        supernet(x, path, channels)
    supernet.eval()
    fixed = supernet(x, path, channels)
    before = {key: tensor.clone() for key, tensor in supernet.state_dict().items()}
    assert not torch.allclose(fixed, trained)
    with batch_statistics(supernet):
        torch.testing.assert_close(supernet(x, path, channels), trained)
    torch.testing.assert_close(supernet(x, path, channels), fixed)
    with head_alone(supernet.train()):
        torch.testing.assert_close(supernet(x, path, channels), fixed)
    assert all(torch.equal(tensor, before[key]) for key, tensor in supernet.state_dict().items())


def test_a_block_borrows_only_what_is_a_slice() -> None:
    small = make_block("1.1", "mbconv", Place(8, 8, 1, 8, "batchnorm", "relu6"), kernel=3, expansion=2)
    large = make_block("1.1", "mbconv", Place(16, 16, 1, 8, "batchnorm", "relu6"), kernel=5, expansion=2)
    lender = build_block(large)
    borrower = Borrower(small, lender, "mbconv_k3_e2")
    assert not list(borrower.parameters())
    assert not borrower.state_dict()
    y = borrower(torch.randn(2, 8, 8, 8))
    assert y.shape == (2, 8, 8, 8)
    assert not list(borrower.parameters())  # nothing stays lent
    own = build_block(small)
    own.load_state_dict({k: take_slice(lender.state_dict()[k], t.shape) for k, t in own.state_dict().items()})
    with pytest.raises(UsageError, match=r"mbconv_k5_e2: .* is not a slice of that of the largest"):
        Borrower(large, build_block(small), "mbconv_k5_e2")
