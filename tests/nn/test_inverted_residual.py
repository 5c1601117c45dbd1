"""An inverted residual computes the same as one operation and module by module."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qnas.nn.blocks import BatchNorm2d, Chain, InvertedResidual, build_block
from qnas.nn.inverted_residual import run_fused
from qnas.nn.kernels import inverted, native
from qnas.nn.mixed_block import SharedChoice
from qnas.nn.supernet import Supernet
from qnas.spaces.blocks import Place
from qnas.spaces.lower import make_block
from qnas.spaces.space import parse_space
from qnas.training.scoring import batch_statistics, recalibrate

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C++ kernels")


def image(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def make(
    c_in: int = 16,
    c_out: int = 16,
    stride: int = 1,
    kernel: int = 5,
    expansion: int = 4,
    activation: str = "relu6",
    **conventions: Any,
) -> InvertedResidual:
    torch.manual_seed(0)
    place = Place(c_in, c_out, stride, 1, "batchnorm", activation, **conventions)
    block = build_block(make_block("block", "mbconv", place, kernel=kernel, expansion=expansion))
    assert isinstance(block, InvertedResidual)
    with torch.no_grad():
        for norm in norms_of(block):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    return block.to(memory_format=torch.channels_last)


def norms_of(block: nn.Module) -> list[BatchNorm2d]:
    return [module for module in block.modules() if isinstance(module, BatchNorm2d)]


def in_modules(block: InvertedResidual) -> InvertedResidual:
    """A copy that runs module by module, since a hook follows one of its layers."""
    hooked = copy.deepcopy(block)
    cast(nn.Module, hooked.project).register_forward_hook(lambda *_: None)
    return hooked


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel's forward passes from here on."""
    found: list[str] = []
    forward = inverted.forward

    def counted(*arguments: object) -> object:
        found.append("forward")
        return forward(*arguments)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(inverted, "forward", counted)
    return found


def assert_close(got: Tensor | None, want: Tensor | None) -> None:
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()) + 1e-6)


@needs_kernels
@pytest.mark.parametrize("px", [9, 10])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_tensorflows_padding_and_epsilon_are_served_too(runs: list[str], kernel: int, px: int) -> None:
    block = make(16, 24, 2, kernel, padding="same", norm_eps=1e-3)
    modules = in_modules(block)
    x = image(3, 16, px, px + 1).requires_grad_()
    y, expected = block(x), modules(x)
    assert_close(y, expected)
    assert len(runs) == 1
    grad = image(*y.shape, seed=7)
    ours, theirs = (
        torch.autograd.grad(out, [x, *module.parameters()], grad)
        for out, module in ((y, block), (expected, modules))
    )
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, want)


@needs_kernels
@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
@pytest.mark.parametrize(
    ("c_out", "stride", "kernel", "expansion", "activation"),
    [
        (16, 1, 5, 4, "relu6"),
        (24, 2, 7, 3, "relu"),
        (16, 1, 3, 1, "hswish"),
        (24, 2, 3, 1, "relu6"),
        (20, 1, 3, 6, "relu6"),
    ],
)
def test_a_training_step_is_that_of_the_modules(
    runs: list[str],
    c_out: int,
    stride: int,
    kernel: int,
    expansion: int,
    activation: str,
    momentum: float | None,
) -> None:
    block = make(16, c_out, stride, kernel, expansion, activation)
    for norm in norms_of(block):
        norm.momentum = momentum
    modules = in_modules(block)
    for step in range(2):  # the second has running statistics of the first
        x = image(3, 16, 9, 10, seed=step).requires_grad_()
        y, expected = block(x), modules(x)
        assert_close(y, expected)
        grad = image(*y.shape, seed=7)
        ours, theirs = (
            torch.autograd.grad(out, (x, *module.parameters()), grad)
            for out, module in ((y, block), (expected, modules))
        )
        for got, want in zip(ours, theirs, strict=True):
            assert_close(got, want)
    assert len(runs) == 2
    state = modules.state_dict()
    assert list(block.state_dict()) == list(state)
    for name, tensor in block.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)


@needs_kernels
def test_it_has_the_names_of_a_chain() -> None:
    place = Place(16, 16, 1, 1, "batchnorm", "relu6")
    chain = Chain(make_block("block", "mbconv", place, kernel=5, expansion=4).layers)
    assert list(make().state_dict()) == list(chain.state_dict())
    make().load_state_dict(chain.state_dict())


@needs_kernels
def test_autograd_keeps_the_maps_before_the_norms_and_no_others() -> None:
    block = make(32, 32, expansion=4)
    x = image(2, 32, 12, 12).requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    assert y.requires_grad
    # x, h1 and h2 with four times its channels, and h3
    assert 10 <= sum(kept.values()) / x.untyped_storage().nbytes() < 10.2


@needs_kernels
def test_statistics_of_each_batch_are_used_without_being_stored(runs: list[str]) -> None:
    block = make().eval()
    before = copy.deepcopy(block.state_dict())
    x = image(3, 16, 9, 10)
    with torch.no_grad(), batch_statistics(block):
        y = block(x)
    assert len(runs) == 1
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert_close(y, in_modules(block).train()(x))
    assert not torch.equal(y, block(x))
    assert len(runs) == 1  # in evaluation mode again


@needs_kernels
def test_statistics_that_are_measured_anew_are_those_of_the_modules(runs: list[str]) -> None:
    block = make().eval()
    modules = in_modules(block)
    batches = [(image(4, 16, 8, 8, seed=seed), torch.zeros(4)) for seed in range(3)]
    recalibrate(block, batches)
    assert len(runs) == 3
    recalibrate(modules, batches)
    for ours, theirs in zip(norms_of(block), norms_of(modules), strict=True):
        assert_close(ours.running_mean, theirs.running_mean)
        assert_close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked


def freeze_a_norm(block: InvertedResidual) -> None:
    norms_of(block)[1].eval()


def differ_in_eps(block: InvertedResidual) -> None:
    norms_of(block)[1].eps = 0.5


def put_in_a_convolution(block: InvertedResidual) -> None:
    block.set_submodule("project", nn.Conv2d(64, 16, 1))  # with a bias


def put_in_another_norm(block: InvertedResidual) -> None:
    block.set_submodule("norm2", nn.BatchNorm2d(64))


def fold_a_norm(block: InvertedResidual) -> None:
    block.set_submodule("norm2", nn.Identity())


def follow_a_layer(block: InvertedResidual) -> None:
    cast(nn.Module, block.act2).register_forward_pre_hook(lambda *_: None)


def be_a_double(block: InvertedResidual) -> None:
    block.double()


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        freeze_a_norm,
        differ_in_eps,
        put_in_a_convolution,
        put_in_another_norm,
        fold_a_norm,
        follow_a_layer,
        be_a_double,
        nn.Module.eval,
    ],
)
def test_anything_unusual_runs_module_by_module(
    runs: list[str], change: Callable[[InvertedResidual], object]
) -> None:
    block = make()
    change(block)
    x = image(3, 16, 9, 10).to(next(block.parameters()).dtype)
    modules = copy.deepcopy(block)
    y = block(x)
    assert not runs
    torch.testing.assert_close(y, Chain.forward(modules, x))


@needs_kernels
def test_a_single_place_is_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make(expansion=1)(image(1, 16, 1, 1))


@needs_kernels
def test_several_processes_share_their_statistics_module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = make(), image(3, 16, 9, 10)
    assert run_fused(block, x, BatchNorm2d, is_residual=True) is not None
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert run_fused(block, x, BatchNorm2d, is_residual=True) is None


@needs_kernels
def test_under_autocast_it_runs_in_autocasts_types(runs: list[str]) -> None:
    block = make()
    modules = in_modules(block)
    x = image(3, 16, 9, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = block(x), modules(x)
    assert not runs
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


@needs_kernels
def test_tracers_see_torchs_operators() -> None:
    block, x = make(), image(3, 16, 9, 10)
    program = torch.export.export(block, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.conv2d.default", "aten.batch_norm.default"} <= called
    assert not any("qnas" in name.lower() for name in called)
    traced = torch.jit.trace(block, (x,), check_trace=False)  # type: ignore[no-untyped-call]  # torch's own
    assert str(traced.inlined_graph).count("aten::batch_norm") == 3


@needs_kernels
def test_whoever_counts_torchs_operators_sees_them(runs: list[str]) -> None:
    block, x = make(), image(3, 16, 9, 10)
    counted = []
    for module in (block, in_modules(block)):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counted.append(counter.get_total_flops())
    assert not runs
    assert counted[0] == counted[1] > 0


@needs_kernels
@pytest.mark.parametrize("expansion", [1, 3])
def test_second_derivatives_are_those_of_the_modules(expansion: int) -> None:
    block = make(8, 8, expansion=expansion)
    modules = in_modules(block)
    found = []
    for module in (block, modules):
        x = image(2, 8, 5, 6).requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, *module.parameters())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@needs_kernels
def test_frozen_weights_get_no_gradients(runs: list[str]) -> None:
    block = make().requires_grad_(False)
    x = image(2, 16, 6, 6).requires_grad_()
    block(x).sum().backward()
    assert len(runs) == 1
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in block.parameters())


@needs_kernels
def test_without_gradients_a_batch_still_updates_the_statistics(runs: list[str]) -> None:
    block = make()
    with torch.no_grad():
        y = block(image(2, 16, 6, 6))
    assert len(runs) == 1
    assert y.grad_fn is None
    assert all(norm.num_batches_tracked == 1 for norm in norms_of(block))


SPACE = """\
schema: qnas.space/1
name: small
source: made for tests
input: {channels: 3, resolution_px: 16}
norm: batchnorm
activation: relu6
stem: {channels: 8, kernel: 3, stride: 1}
transition: block
candidates: [{block: mbconv, kernel: [3, 5], expansion: [2, 3]}]
stages:
  - {channels: 8, positions: 1, stride: 1}
  - {channels: 16, positions: 1, stride: 2}
head: {classes: 10}
"""


@needs_kernels
def test_slices_of_a_supernet_train_as_module_by_module(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    net = Supernet(parse_space(SPACE, "small.yaml"), 10, generator, weights="shared")
    assert any(isinstance(module, SharedChoice) for module in net.modules())
    modules = copy.deepcopy(net)
    x, path = image(3, 3, 16, 16), [1, 2]
    net(x, path).square().sum().backward()
    assert len(runs) == 2
    monkeypatch.setattr("qnas.nn.blocks.run_fused", lambda *_: None)
    modules(x, path).square().sum().backward()
    assert len(runs) == 2
    for weight, its in zip(net.parameters(), modules.parameters(), strict=True):
        assert (weight.grad is None) == (its.grad is None)
        if weight.grad is not None:
            assert_close(weight.grad, its.grad)
    for ours, theirs in zip(net.buffers(), modules.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
