from dataclasses import replace

import pytest
import torch
from helpers.pretrained import built, tiny_network

from qnas.nn.modes import WeightsMode
from qnas.nn.pretrained.derivation import derived_space, own_arch
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.nn.pretrained.start import (
    fitted,
    importance,
    sorted_channels,
    sorted_widths,
    start_from,
    starting_network,
)
from qnas.nn.subnet import module_name
from qnas.nn.supernet import Supernet
from qnas.spaces.arch import Arch
from qnas.spaces.family import make_family
from qnas.spaces.space import SearchSpace


def started(
    network: PretrainedNetwork,
    *,
    quadratic: bool = False,
    weights: WeightsMode = "shared",
    classes: int = 10,
) -> Supernet:
    torch.manual_seed(1)
    space = derived_space(network.space, quadratic=quadratic)
    supernet = Supernet(space, classes, torch.Generator().manual_seed(0), weights)
    start_from(supernet, network)
    return supernet.eval()


def grown(space: SearchSpace, own: Arch, neuron: str = "") -> tuple[int, ...]:
    """Return the network with kernels of 7, and these neurons."""
    names = [f"mbconv_k7{choice[9:]}{neuron}" for choice in own.choices]
    return Arch(tuple(names)).indices(space)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["shared", "independent"])
@pytest.mark.parametrize(
    ("activation", "padding"), [("relu6", "same"), ("relu", "symmetric"), ("hswish", "same")]
)
def test_the_largest_networks_compute_what_the_network_does(
    weights: WeightsMode, activation: str, padding: str
) -> None:
    network = tiny_network(activation, padding)
    supernet = started(network, quadratic=True, weights=weights)
    x = torch.randn(16, 3, 32, 32)
    expected = built(network)(x)
    assert expected.std() > 0.1
    own = own_arch(supernet.space, network.space)
    of_products = [grown(supernet.space, own, "_factored")] if activation == "relu6" else []
    for routes in (own.indices(supernet.space), grown(supernet.space, own), *of_products):
        torch.testing.assert_close(supernet(x, routes), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(supernet.subnet(own, 10).eval()(x), expected, atol=1e-4, rtol=0)


def test_the_order_of_hidden_channels_changes_nothing_but_their_places() -> None:
    network = tiny_network()
    state = sorted_channels(network)
    moved = replace(network, state=state)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(built(moved)(x), built(network)(x))
    assert not torch.equal(state["2_1.expand.weight"], network.state["2_1.expand.weight"])
    assert torch.equal(state["1_1.depthwise.weight"], network.state["1_1.depthwise.weight"])  # of its input


@torch.no_grad()
def test_the_order_of_channels_between_blocks_changes_nothing_but_their_places() -> None:
    network = tiny_network()
    state = sorted_widths(network.space, network.state, [1, 2])
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(built(replace(network, state=state))(x), built(network)(x), atol=1e-5, rtol=0)
    moved = {key for key, tensor in state.items() if not torch.equal(tensor, network.state[key])}
    assert {"2_1.project.weight", "2_2.expand.weight", "2_1.norm3.weight", "head.expand.weight"} <= moved
    assert not any(key.startswith(("stem.", "1_1.", "2_1.expand", "head.classifier")) for key in moved)


@torch.no_grad()
def test_a_narrower_stage_has_the_channels_that_matter() -> None:
    network, keep = tiny_network(), [0, 3, 5, 7]
    space = network.space
    last = [module_name(p) for p in space.positions if p.stage == len(space.stages) - 1]
    state = {key: tensor.clone() for key, tensor in network.state.items()}
    for name in last:  # the others of the last stage hold nothing
        for key in ("weight", "bias"):
            kept = state[f"{name}.norm3.{key}"][keep]
            state[f"{name}.norm3.{key}"].zero_()
            state[f"{name}.norm3.{key}"][keep] = kept
    network = replace(network, state=state)
    largest = derived_space(space)
    widths = [[stage.channels] for stage in largest.stages]
    widths[-1] = [len(keep), *widths[-1]]
    family = make_family(largest, None, widths)
    supernet = Supernet(largest, 10, torch.Generator().manual_seed(0), "shared", family)
    start_from(supernet, network)
    x, routes = torch.randn(4, 3, 32, 32), own_arch(largest, space).indices(largest)
    expected = built(network)(x)
    narrow = tuple(min(row) for row in widths)
    assert expected.std() > 0.01
    torch.testing.assert_close(supernet.eval()(x, routes), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(supernet(x, routes, narrow), expected, atol=1e-4, rtol=0)


def test_a_smaller_expansion_has_the_most_important_channels() -> None:
    network = tiny_network()
    block = {k.removeprefix("2_2."): v for k, v in network.state.items() if k.startswith("2_2.")}
    order = importance(block, "relu6").argsort(descending=True)
    kept = set(order[: 2 * 12].tolist())
    supernet = started(network)
    arch = Arch(("mbconv_k3_e1", "mbconv_k5_e6", "mbconv_k5_e2", "mbconv_k3_e4"))
    found = supernet.subnet(arch, 10).state_dict()["2_2.expand.weight"]
    rows = {tuple(row.flatten().tolist()) for row in found}
    assert rows == {tuple(block["expand.weight"][i].flatten().tolist()) for i in kept}


def test_importance_is_the_projection_times_what_the_channel_sends() -> None:
    # channels of a norm with no scale send a constant, clipped at 6: its root mean square is that
    block = {
        "project.weight": torch.tensor([[1.0, -2.0, 1.0, 1.0]])[:, :, None, None],
        "norm2.weight": torch.zeros(4),
        "norm2.bias": torch.tensor([1.0, 1.0, 9.0, -1.0]),
    }
    torch.testing.assert_close(importance(block, "relu6"), torch.tensor([1.0, 2.0, 6.0, 0.0]))
    torch.testing.assert_close(importance(block, "relu"), torch.tensor([1.0, 2.0, 9.0, 0.0]))
    # and of one without a shift half of a normal's square: 1/2
    normal = block | {"norm2.weight": torch.ones(4), "norm2.bias": torch.zeros(4)}
    torch.testing.assert_close(importance(normal, "relu")[0], torch.tensor(0.5**0.5), atol=2e-3, rtol=0)


def test_a_smaller_kernel_is_the_centre_and_a_larger_one_has_a_ring_of_zeros() -> None:
    network = tiny_network()
    supernet = started(network)
    own = sorted_channels(network)["2_2.depthwise.weight"]
    arch = Arch(("mbconv_k3_e1", "mbconv_k5_e6", "mbconv_k3_e6", "mbconv_k3_e4"))
    cut = supernet.subnet(arch, 10).state_dict()["2_2.depthwise.weight"]
    assert torch.equal(cut, own[:, :, 1:4, 1:4])
    arch = Arch(("mbconv_k3_e1", "mbconv_k5_e6", "mbconv_k7_e6", "mbconv_k3_e4"))
    large = supernet.subnet(arch, 10).state_dict()["2_2.depthwise.weight"]
    assert torch.equal(large[:, :, 1:6, 1:6], own)
    assert large.abs().sum() == own.abs().sum()


def test_parts_of_tensors_fit_in_each_dimension() -> None:
    whole = torch.arange(2 * 3 * 3 * 3.0).view(2, 3, 3, 3)
    assert torch.equal(fitted(whole, torch.Size([1, 2, 1, 1])), whole[:1, :2, 1:2, 1:2])
    assert torch.equal(fitted(whole, torch.Size([2, 3, 5, 5]))[:, :, 1:4, 1:4], whole)
    assert torch.equal(fitted(whole[0, 0, 0], torch.Size([2])), whole[0, 0, 0, :2])
    assert fitted(torch.tensor(7), torch.Size([])) == 7


def test_the_names_of_pretrained_parameters_leave_out_what_is_new() -> None:
    network = tiny_network()
    supernet = started(network, quadratic=True, classes=7)
    names = {name for name, _ in supernet.named_parameters()}
    new = {"alpha", "parts.head.classifier.weight", "parts.head.classifier.bias"}
    new |= {name for name in names if ".conv_b." in name or ".norm_b." in name}
    assert supernet.pretrained == names - new
    assert started(network).pretrained == names - new - {name for name in names if "_factored" in name} | {
        "parts.head.classifier.weight",
        "parts.head.classifier.bias",
    }
    assert Supernet(supernet.space, 7, torch.Generator()).pretrained == frozenset()


def test_the_second_factor_starts_at_one_and_learns() -> None:
    supernet = started(tiny_network(), quadratic=True).train()
    own = own_arch(supernet.space, tiny_network().space)
    block = supernet.parts["2_2"].get_submodule("shared.mbconv_factored")
    routes = grown(supernet.space, own, "_factored")
    supernet(torch.randn(8, 3, 32, 32), routes).square().mean().backward()
    scale, weight = (block.get_parameter(name) for name in ("norm_b.weight", "conv_b.weight"))
    assert scale.grad is not None
    assert float(scale.detach().abs().sum()) == 0
    assert float(scale.grad.abs().min()) > 0
    assert float(weight.detach().abs().sum()) > 0


@torch.no_grad()
def test_a_network_alone_starts_as_in_a_supernet() -> None:
    network = tiny_network()
    supernet = started(network)
    arch = Arch(("mbconv_k5_e1", "mbconv_k3_e3", "identity", "mbconv_k7_e2"))
    alone = starting_network(network, supernet.space, arch, 10).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(alone(x), supernet.subnet(arch, 10).eval()(x))


def test_statistics_are_the_network_s_too() -> None:
    network = tiny_network()
    state = started(network).subnet(own_arch(derived_space(network.space), network.space), 10).state_dict()
    assert int(state["stem.norm.num_batches_tracked"]) == 7
    assert torch.equal(state["3_1.norm3.running_var"], network.state["3_1.norm3.running_var"])
