"""QuadraBlock through its kernels: values, gradients, memory, layouts; and the cases of plain modules."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qnas.nn.blocks import QuadraBlock
from qnas.nn.kernels import native
from qnas.nn.kernels.block import can_run, mixer_half
from qnas.nn.mixed_block import Choice
from qnas.nn.supernet import Supernet
from qnas.spaces.space import SearchSpace

# batch, channels, height, width, kernel, expansion
SHAPES = [
    (2, 16, 9, 7, 3, 4),
    (1, 24, 5, 5, 7, 2),
    (3, 5, 3, 2, 5, 3),
    (2, 40, 1, 1, 7, 4),
    (2, 64, 20, 24, 7, 4),
]


@pytest.fixture(params=["torch", "C++"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv("QNAS_KERNELS", "0")
    elif native.library() is None:
        pytest.skip("no C++ kernels here")
    return str(request.param)


def build(channels: int, kernel: int, expansion: int, **options: Any) -> QuadraBlock:
    torch.manual_seed(channels)
    block = QuadraBlock(channels, kernel, expansion, **options)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return block.to(memory_format=torch.channels_last)


def image(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def plain(block: QuadraBlock, x: Tensor) -> Tensor:
    """The block by torch's functions one after another."""
    w = dict(block.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        rows, weight, bias = x.permute(0, 2, 3, 1), w[f"{name}.weight"], w[f"{name}.bias"]
        return F.layer_norm(rows, rows.shape[3:], weight, bias, 1e-6).permute(0, 3, 1, 2)

    def depthwise(x: Tensor, name: str) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))

    n = norm(x, "norm1")
    x = x + depthwise(n, "conv_a") * depthwise(n, "conv_b") + depthwise(n, "conv_c")
    hidden = F.gelu(F.conv2d(norm(x, "norm2"), w["expand.weight"], w["expand.bias"]))
    return x + F.conv2d(hidden, w["project.weight"], w["project.bias"])


def results(block: QuadraBlock, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    named = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad(y, list(named.values()), grad)
    return {"y": y.detach(), **dict(zip(named, found, strict=True))}


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_plain_block(shape: tuple[int, ...], form: str) -> None:
    batch, channels, height, width, kernel, expansion = shape
    block = build(channels, kernel, expansion)
    x = image(batch, channels, height, width).requires_grad_()
    exact_block, exact = deepcopy(block).double(), x.detach().double().requires_grad_()
    wanted = results(exact_block, exact, plain(exact_block, exact))
    got = results(block, x, block(x))
    for name, reference in wanted.items():
        scale = float(reference.abs().max())
        assert float((got[name].double() - reference).abs().max()) <= 1e-5 * scale, name
        assert got[name].shape == reference.shape


def kept_multiples(block: nn.Module, x: Tensor) -> float:
    """Return what autograd keeps for the backward pass, parameters aside, as multiples of x."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)  # bound: what a result holds must live until all is counted
    del y
    return sum(kept.values()) / x.untyped_storage().nbytes()


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_block_keeps_no_more_than_its_input_and_one_map_between(kernel: int, form: str) -> None:
    block, x = build(16, kernel, 4), image(4, 16, 12, 12).requires_grad_()
    assert 1.9 <= kept_multiples(block, x) <= 2.3
    block.has_kernels = False
    assert kept_multiples(block, x) > 10


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that bring a whole map from one memory layout into the other."""

    def __init__(self, smallest: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.smallest = smallest
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.numel() >= self.smallest and source.stride() != result.stride():
                self.found.append(f"{func} {tuple(source.shape)} {source.stride()} -> {result.stride()}")
        return result


def test_a_network_copies_no_map_into_another_layout_from_stem_to_head(
    tiny_space: SearchSpace, form: str
) -> None:
    supernet = Supernet(tiny_space, 10, torch.Generator().manual_seed(0))
    *body, _ = supernet.parts.values()
    x = image(2, 3, 32, 32)
    with Copies(smallest=2 * 16 * 8 * 8) as copies:
        for part in body:
            x = part(x, 0) if isinstance(part, Choice) else part(x)
        x.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.shape == (2, 16, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert not copies.found


def test_the_counter_of_copies_sees_one() -> None:
    with Copies(smallest=1) as copies:
        image(2, 4, 6, 6).contiguous()
    assert copies.found


def test_results_are_the_same_on_every_run(form: str) -> None:
    block, x = build(32, 7, 4), image(8, 32, 16, 16).requires_grad_()
    first, second = results(block, x, block(x)), results(block, x, block(x))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_threads_change_nothing_but_the_rounding_of_products(form: str) -> None:
    block, x = build(32, 7, 4), image(8, 32, 16, 16).requires_grad_()
    one, threads = results(block, x, block(x)), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two, again = results(block, x, block(x)), results(block, x, block(x))
    finally:
        torch.set_num_threads(threads)
    for name, reference in one.items():
        assert torch.equal(two[name], again[name])
        assert float((two[name] - reference).abs().max()) <= 1e-5 * float(reference.abs().max()), name


def test_the_mixer_alone_gives_only_the_gradients_that_are_asked_for(form: str) -> None:
    block, x = build(8, 5, 2), image(2, 8, 6, 6)
    inputs = [
        x,
        block.norm1.weight,
        block.norm1.bias,
        *(c.weight for c in (block.conv_a, block.conv_b, block.conv_c)),
    ]
    everything = [t.detach().requires_grad_() for t in inputs]  # type: ignore[operator]
    wanted = torch.autograd.grad(mixer_half(*everything).sum(), everything)
    for i, reference in enumerate(wanted):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(everything)]
        mixer_half(*leaves).sum().backward()  # type: ignore[no-untyped-call]
        found = leaves[i].grad
        assert found is not None
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
        assert all(t.grad is None for j, t in enumerate(leaves) if j != i)


def is_plain_run(block: QuadraBlock, x: Tensor) -> bool:
    """Say whether a forward pass calls the block's modules."""
    calls: list[None] = []
    handle = block.expand.register_forward_hook(lambda *_: calls.append(None))
    block(x)
    handle.remove()
    return bool(calls)


def test_the_plain_modules_run_where_the_kernels_are_not_for() -> None:
    block, x = build(8, 3, 2), image(1, 8, 6, 6)
    assert not is_plain_run(block, x)
    with torch.no_grad():
        assert not is_plain_run(block, x)  # the other path of an architecture's step
        assert is_plain_run(block.eval(), x)
    assert not is_plain_run(block, x)  # with gradients, evaluated or not
    with torch.autocast("cpu", torch.bfloat16):
        assert is_plain_run(block, x)
    assert is_plain_run(deepcopy(block).double(), x.double())
    assert is_plain_run(deepcopy(block).to("meta"), x.to("meta"))
    for options in ({"norm": "batchnorm"}, {"activation": "relu"}):
        assert is_plain_run(build(8, 3, 2, **options), x)


def test_an_exported_and_a_compiled_block_consist_of_the_plain_operators() -> None:
    block, x = build(8, 3, 2), image(1, 8, 6, 6)
    wanted = block(x)
    program = torch.export.export(block, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("conv2d" in name for name in names), names
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(block, (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_plain_path_are_those_of_finite_differences() -> None:
    block = build(3, 3, 2).double()
    x = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert not can_run(x)
    assert torch.autograd.gradcheck(block, (x,))
