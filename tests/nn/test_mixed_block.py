import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from helpers.own_blocks import Gate, register_gate
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.nn.blocks import build_block
from qnas.nn.kernels import mixer, native
from qnas.nn.mixed_block import (
    Choice,
    FactoredMixture,
    Gated,
    IndependentChoice,
    Mixture,
    NestedChoice,
    Route,
    SharedChoice,
    grid_of,
    make_choice,
)
from qnas.nn.modes import WeightsMode
from qnas.nn.subnet import take_slice
from qnas.nn.supernet import Supernet
from qnas.spaces.arch import Arch
from qnas.spaces.blocks import Place, register_block
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import Slot, fill, skeleton
from qnas.spaces.space import SearchSpace, parse_space

pytestmark = pytest.mark.usefixtures("_registries")
QUADRA = "{block: quadra, kernel: [3, 5, 7], expansion: [2, 4]}"
MIXED = (
    "{block: mbconv, kernel: [3, 7], expansion: [1, 3]}, {block: quadra, kernel: [3, 5], expansion: [2, 3]}"
)
NEURAL = "{block: quadra, neuron: [linear, quadranet, fan, type3], kernel: [3, 5], expansion: [2, 3]}"


def space_of(candidates: str, *, norm: str = "layernorm", stride: int = 1, channels: int = 6) -> SearchSpace:
    identity = ", {block: identity}" if stride == 1 else ""
    return parse_space(
        f"""\
schema: qnas.space/1
name: small
source: made for tests
input: {{channels: {channels}, resolution_px: 16}}
norm: {norm}
activation: {"gelu" if norm == "layernorm" else "relu6"}
stem: {{channels: {channels}, kernel: 3, stride: 1}}
transition: {"conv" if stride == 1 else "block"}
candidates: [{candidates}{identity}]
stages:
  - {{channels: {channels}, positions: 1, stride: {stride}}}
head: {{classes: 10}}
""",
        "small.yaml",
    )


def slot_of(space: SearchSpace) -> Slot:
    return next(part for part in skeleton(space) if isinstance(part, Slot))


def make(space: SearchSpace, mode: str, seed: int = 0) -> Choice:
    torch.manual_seed(seed)
    return make_choice(space, slot_of(space), mode)  # type: ignore[arg-type]  # parametrised


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def own_block(choice: SharedChoice, space: SearchSpace, index: int) -> nn.Module:
    """Build a candidate's block by itself and give it the slices of the shared one."""
    slot = slot_of(space)
    block = build_block(fill(space, slot, slot.position.candidates[index]))
    whole = choice.shared[slot.position.candidates[index].kind].state_dict()
    block.load_state_dict({k: take_slice(whole[k], t.shape) for k, t in block.state_dict().items()})
    return block


def with_registered_block(sliced: tuple[str, ...] = ("width",)) -> SearchSpace:
    register_gate(sliced)
    return space_of("{block: gate, width: [2, 4], act: [relu, relu6]}")


# the norm of the space is that of `space_of`, and its activation
OF_WORDS = (
    "{block: quadra, norm: [space, %s, scale], act: [space, hswish], kernel: [3, 5], expansion: [2, 3]}"
)
SPACES: dict[str, Callable[[], SearchSpace]] = {
    "registered": with_registered_block,
    "quadra": lambda: space_of(QUADRA),
    "quadra, batch norm": lambda: space_of(QUADRA, norm="batchnorm"),
    "neurons": lambda: space_of(NEURAL),
    "neurons, batch norm": lambda: space_of(NEURAL, norm="batchnorm"),
    "norms and activations": lambda: space_of(OF_WORDS % "batchnorm"),
    "norms and activations, batch norm": lambda: space_of(OF_WORDS % "layernorm", norm="batchnorm"),
    "two kinds": lambda: space_of(MIXED, norm="batchnorm"),
    "star": lambda: space_of(
        "{block: star, kernel: [3, 5], expansion: [2, 4], mixers: [double, single]}", norm="batchnorm"
    ),
    "inverted residuals with options": lambda: space_of(
        "{block: mbconv, kernel: [3, 5], expansion: [3, 6], neuron: [linear, factored],"
        " attention: [none, se], act: [space, hswish]}",
        norm="batchnorm",
    ),
    "striding with options": lambda: space_of(
        "{block: mbconv, kernel: [3, 5], expansion: [3, 6], neuron: factored, attention: se}",
        norm="batchnorm",
        stride=2,
    ),
    "striding": lambda: space_of(
        "{block: mbconv, kernel: [3, 5], expansion: [3, 6]}", norm="batchnorm", stride=2
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_a_shared_candidate_is_its_own_block_with_slices_for_weights(name: str) -> None:
    space = SPACES[name]()
    choice = cast(SharedChoice, make(space, "shared").to(memory_format=torch.channels_last))
    x = image(3, 6, 8, 8)
    for index, candidate in enumerate(slot_of(space).position.candidates):
        if candidate.block == "identity":
            assert choice(x, index) is x
            continue
        own, before = own_block(choice, space, index), copy.deepcopy(choice.state_dict())
        choice.zero_grad()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        expected, got = own(inputs[0]), choice(inputs[1], index)
        torch.testing.assert_close(got, expected)
        (expected**2).sum().backward()
        (got**2).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        gradients = {n: p.grad for n, p in choice.shared[candidate.kind].named_parameters()}
        for key, parameter in own.named_parameters():
            gradient = gradients.pop(key)
            assert gradient is not None
            assert parameter.grad is not None
            torch.testing.assert_close(take_slice(gradient, parameter.shape), parameter.grad)
            # and nothing outside of the slice
            assert gradient.abs().sum() == pytest.approx(float(parameter.grad.abs().sum()), rel=1e-4)
        assert not any(g is not None for g in gradients.values())
        after = choice.shared[candidate.kind].state_dict()
        for key, buffer in own.named_buffers():  # running statistics
            torch.testing.assert_close(take_slice(after[key], buffer.shape), buffer)
            untouched = after[key].clone()
            take_slice(untouched, buffer.shape).copy_(
                take_slice(before[f"shared.{candidate.kind}.{key}"], buffer.shape)
            )
            torch.testing.assert_close(untouched, before[f"shared.{candidate.kind}.{key}"])


def test_a_block_that_does_not_say_how_weights_are_shared_has_independent_ones_alone() -> None:
    space = with_registered_block(sliced=())
    choice = make(space, "independent")
    assert choice(image(1, 6, 8, 8), 3).shape == (1, 6, 8, 8)
    with pytest.raises(UsageError) as error:
        make(space, "shared")
    assert str(error.value) == (
        "block gate does not say which of its parameters are slices of the largest: search with "
        "`weights='independent'`"
    )


def test_tensors_that_are_no_slices_are_named() -> None:
    class Inverse(Gate):
        @staticmethod
        def layers(place: Place, width: int, act: str = "relu") -> tuple[LayerSpec, ...]:
            return Gate.layers(place, 5 - width)

        def __init__(self, c_in: int, width: int, act: str) -> None:
            super().__init__(c_in, 5 - width, act)

    parameters = {"width": (1, 2), "act": ("relu",)}
    register_block("inverse", parameters=parameters, sliced=("width",))(Inverse)
    with pytest.raises(UsageError) as error:
        make(space_of("{block: inverse, width: [1, 2]}"), "shared")
    assert str(error.value) == (
        "inverse_w1: expand.weight, [24, 6, 1, 1], is not a slice of that of the largest candidate, "
        "[18, 6, 1, 1]: search with `weights='independent'`"
    )


def test_the_centre_of_kernels_and_the_leading_channels_are_shared() -> None:
    kernel = torch.arange(49.0).reshape(1, 1, 7, 7)
    assert take_slice(kernel, (1, 1, 3, 3)).tolist() == [[[[16, 17, 18], [23, 24, 25], [30, 31, 32]]]]
    matrix = torch.arange(24.0).reshape(6, 4, 1, 1)
    assert take_slice(matrix, (2, 3, 1, 1)).flatten(1).tolist() == [[0, 1, 2], [4, 5, 6]]


def test_shared_candidates_hold_no_tensors_of_their_own() -> None:
    space = space_of(MIXED, norm="batchnorm")
    choice = cast(SharedChoice, make(space, "shared"))
    assert {".".join(key.split(".")[:2]) for key in choice.state_dict()} == {"shared.mbconv", "shared.quadra"}
    largest = {"mbconv": (7, 3), "quadra": (5, 3)}
    for kind, (kernel, expansion) in largest.items():
        shapes = {tuple(p.shape) for p in choice.shared[kind].parameters()}
        assert any(shape[-1] == kernel for shape in shapes if len(shape) == 4)
        assert (6 * expansion, 6, 1, 1) in shapes
    choice(image(1, 6, 8, 8), 0)
    assert not list(choice.candidates.parameters())
    copy.deepcopy(choice)  # nothing of a pass is left in it


@pytest.mark.skipif(native.library() is None, reason="the C++ kernels cannot be built here")
def test_slices_run_by_the_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = []
    forward = mixer.forward

    def record(x: Tensor, w_a: Tensor, *rest: Tensor) -> Tensor:
        kernels.append(w_a.shape[-1])
        return forward(x, w_a, *rest)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(mixer, "forward", record)
    space = space_of(QUADRA)
    choice = make(space, "shared").to(memory_format=torch.channels_last)
    for index in range(6):
        choice(image(2, 6, 8, 8), index)
    assert kernels == [3, 3, 5, 5, 7, 7]


class Scale(nn.Module):
    """A toy candidate whose output is known."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x**2


def toys(factors: tuple[float, ...] = (0.5, -1.5, 2.0, 3.0)) -> IndependentChoice:
    choice = IndependentChoice([])
    for i, factor in enumerate(factors):
        choice.add_module(str(i), Scale(factor))
    return choice


@pytest.mark.parametrize("candidates", [(0, 1, 2, 3), (2, 0)])
def test_gate_gradients_are_a_mixtures_whose_shares_are_the_gates(candidates: tuple[int, ...]) -> None:
    choice, x = toys(), image(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    for active in range(len(candidates)):
        shares = torch.zeros(4, dtype=torch.float64)
        shares[candidates[active]] = 1.0
        shares.requires_grad_()
        gates = F.one_hot(torch.tensor(active), len(candidates)).double().requires_grad_()
        mixture, gated = choice(x, Mixture(shares)), choice(x, Gated(candidates, active, gates))
        torch.testing.assert_close(gated, mixture)
        of_mixture = torch.autograd.grad((mixture.sin()).sum(), [x, shares])
        of_gates = torch.autograd.grad((gated.sin()).sum(), [x, gates])
        torch.testing.assert_close(of_gates[0], of_mixture[0])
        torch.testing.assert_close(of_gates[1], of_mixture[1][list(candidates)])


def test_inactive_candidates_keep_nothing_in_memory_until_the_backward_pass() -> None:
    choice = toys()
    calls: list[str] = []
    for name, module in choice.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    y = choice(image(2, 3, 4, 4, dtype=torch.float64), Gated((0, 1, 2, 3), 2, gates))
    assert calls == ["2"]
    y.sum().backward()
    assert sorted(calls) == ["0", "1", "2", "3"]
    # and their weights get no gradient
    assert [p.grad is None for p in choice.parameters()] == [True, True, False, True]


def test_gates_work_under_autocast() -> None:
    space = space_of(QUADRA)
    choice = make(space, "independent")
    gates = F.one_hot(torch.tensor(2), 7).float().requires_grad_()
    gradients = []
    for enabled in (False, True):
        # as a stem leaves it; rounded, since older versions of torch draw other numbers in bfloat16
        x = image(2, 6, 8, 8).to(torch.bfloat16 if enabled else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = choice(x, Gated(tuple(range(7)), 2, gates))
        gradients.append(torch.autograd.grad((y.float() ** 2).sum(), gates)[0])
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=0.05, atol=0.02 * float(gradients[0].abs().max())
    )


@pytest.mark.parametrize("mode", ["independent", "shared", "nested"])
def test_a_mixture_is_the_weighted_sum_of_the_candidates(mode: str) -> None:
    choice = make(space_of(QUADRA), mode)
    x, shares = image(2, 6, 8, 8), torch.softmax(torch.arange(7.0), 0)
    expected = sum(share * choice(x, i) for i, share in enumerate(shares))
    torch.testing.assert_close(choice(x, Mixture(shares)), expected)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x.movedim(1, 3), [x.shape[1]], norm.weight, norm.bias, norm.eps).movedim(3, 1)


def explicit_mixture(choice: NestedChoice, space: SearchSpace) -> Callable[[Tensor, FactoredMixture], Tensor]:
    """Mix both halves of plain blocks, a block for each kernel and each expansion."""
    names = slot_of(space).position.names

    def block(kernel: int, expansion: int) -> nn.Module:
        return own_block(choice, space, names.index(f"quadra_k{kernel}_e{expansion}")).double()

    def run(x: Tensor, route: FactoredMixture) -> Tensor:
        branch = torch.zeros_like(x)
        for share, kernel in zip(route.kernels, (3, 5, 7), strict=True):
            b = block(kernel, 2)
            branch = branch + share * b.mix(layer_norm(x, b.norm1))  # type: ignore[operator,arg-type]
        x = x + route.block * branch
        branch = torch.zeros_like(x)
        for share, expansion in zip(route.expansions, (2, 4), strict=True):
            b = block(3, expansion)
            hidden = F.gelu(b.expand(layer_norm(x, b.norm2)))  # type: ignore[operator,arg-type]
            branch = branch + share * b.project(hidden)  # type: ignore[operator]
        return x + route.block * branch

    return run


def test_a_nested_mixture_mixes_each_half_of_plain_blocks() -> None:
    space = space_of(QUADRA)
    choice = cast(NestedChoice, make(space, "nested").double())
    x = image(2, 6, 5, 5, dtype=torch.float64)
    parameters = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2, 2)]
    results = []
    for run in (choice, explicit_mixture(choice, space)):
        kernels, expansions, block = (torch.softmax(p, 0) for p in parameters)
        y = run(x, FactoredMixture(kernels, expansions, block[0]))
        results.append((y, *torch.autograd.grad(y.sin().sum(), parameters)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_a_nested_mixture_of_one_candidate_is_that_candidate(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNAS_KERNELS", kernels)
    # not in the order of their sizes
    space = space_of("{block: quadra, kernel: [7, 3], expansion: [4, 1, 2]}")
    choice, x = cast(NestedChoice, make(space, "nested")), image(2, 6, 8, 8)
    assert choice.grid.kernels == (3, 7)
    assert choice.grid.expansions == (1, 2, 4)
    for index, place in enumerate(choice.grid.places):
        kernel, expansion = place or (0, 0)
        route = FactoredMixture(
            F.one_hot(torch.tensor(kernel), 2).double(),
            F.one_hot(torch.tensor(expansion), 3).double(),
            torch.tensor(float(place is not None), dtype=torch.float64),
        )
        torch.testing.assert_close(choice(x, route), choice(x, index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "space",
    [
        space_of("{block: quadra, kernel: 3, expansion: [2, 4]}, {block: quadra, kernel: 5, expansion: 2}"),
        space_of(QUADRA, norm="batchnorm"),
        space_of("{block: mbconv, kernel: [3, 5], expansion: 3}", norm="batchnorm"),
        space_of(NEURAL),
        space_of("{block: quadra, neuron: linear, kernel: [3, 5], expansion: [2, 4]}"),
        space_of("{block: quadra, norm: batchnorm, kernel: [3, 5], expansion: [2, 4]}"),
        space_of("{block: quadra, act: relu6, kernel: [3, 5], expansion: [2, 4]}"),
        space_of("{block: quadra, norm: [space, scale], kernel: [3, 5], expansion: [2, 4]}"),
    ],
    ids=[
        *("no grid", "batch norm", "mbconv", "neurons", "another neuron"),
        *("own batch norm", "own activation", "two norms"),
    ],
)
def test_what_cannot_be_nested_is_refused_with_the_fix(space: SearchSpace) -> None:
    with pytest.raises(UsageError, match=r"position 1\.1 of space small.*`weights='shared'` takes all"):
        make(space, "nested")
    make(space, "shared")


def test_candidates_with_layer_norm_and_gelu_of_their_own_may_be_nested() -> None:
    plain = space_of(QUADRA)
    own = space_of(QUADRA.replace("{", "{norm: layernorm, act: gelu, "), norm="batchnorm")
    choice, expected = make(own, "nested"), make(plain, "nested")
    assert grid_of(own, own.positions[0]) == grid_of(plain, plain.positions[0])
    state = choice.state_dict()
    for key, tensor in expected.state_dict().items():
        state[key.replace("shared.quadra.", "shared.quadra_gelu_layernorm.")].copy_(tensor)
    route = FactoredMixture(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.4]), torch.tensor(0.9))
    x = image(2, 6, 8, 8)
    torch.testing.assert_close(choice(x, route), expected(x, route))


def test_a_single_candidate_is_a_grid_whatever_it_is() -> None:
    space = space_of("{block: mbconv, kernel: 3, expansion: 3}", norm="batchnorm", stride=2)
    assert grid_of(space, space.positions[0]).places == ((0, 0),)
    route: Route = 0
    assert make(space, "nested")(image(1, 6, 8, 8), route).shape == (1, 6, 4, 4)


def test_neurons_share_weights_within_their_own_kind_only() -> None:
    choice = make(space_of(NEURAL), "shared")
    kinds = {key.split(".")[1] for key in choice.state_dict()}
    assert kinds == {"quadra", "quadra_linear", "quadra_fan", "quadra_type3"}
    names = slot_of(space_of(NEURAL)).position.names
    x = image(2, 6, 8, 8)
    for index, name in enumerate(names):
        choice.zero_grad()
        y = choice(x, index)
        if name == "identity":
            continue
        y.square().sum().backward()
        used = {key.split(".")[1] for key, p in choice.named_parameters() if p.grad is not None}
        assert used == {"_".join(name.split("_")[:1] + name.split("_")[3:])}


@pytest.mark.parametrize(
    "candidates", [MIXED, NEURAL, OF_WORDS % "layernorm"], ids=["two kinds", "neurons", "norms"]
)
@pytest.mark.parametrize("weights", ["shared", "independent"])
def test_subnet_matches_supernet_where_a_position_has_several_kinds_of_block(
    candidates: str, weights: WeightsMode
) -> None:
    space = space_of(candidates, norm="batchnorm")
    supernet = Supernet(space, 10, torch.Generator().manual_seed(0), weights).eval()
    x = image(2, 6, 8, 8)
    with torch.no_grad():
        for index, name in enumerate(space.positions[0].names):
            network = supernet.subnet(Arch((name,)), 10).eval()
            torch.testing.assert_close(network(x), supernet(x, [index]))
