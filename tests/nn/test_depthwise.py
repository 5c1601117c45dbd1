"""Depthwise convolutions have torch's results and gradients in every form."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.nn.depthwise import DepthwiseConv2d, choose_form, depthwise_conv2d
from qnas.nn.kernels import depthwise as native_depthwise
from qnas.nn.kernels import lean_quadratic, native

FORMS = ("native", "lean", "stock")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the C++ kernels, without them, and torch's own."""
    if request.param == "native" and native.library() is None:
        pytest.skip("the C++ kernels cannot be built here")
    if request.param != "native":
        monkeypatch.setenv("QNAS_KERNELS", "0")
    if request.param == "stock":
        monkeypatch.setattr(
            "qnas.nn.depthwise.weight_gradient_form", lambda *_: lean_quadratic.stock_gradients
        )
    return str(request.param)


# batch, channels, height, width, kernel
SHAPES = [
    (2, 17, 8, 8, 5),
    (2, 16, 14, 13, 7),
    (3, 40, 15, 20, 3),
    (2, 5, 2, 2, 7),
    (1, 4, 1, 1, 5),
    (3, 6, 9, 7, 3),
    (35, 20, 4, 5, 5),
    (1, 24, 70, 66, 9),
    (2, 8, 6, 6, 1),
]


def gradients(
    run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = run(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_convolution_and_its_gradients_are_torchs(
    form: str, shape: tuple[int, int, int, int, int], memory: torch.memory_format, stride: int
) -> None:
    batch, channels, height, width, kernel = shape
    x = drawn(batch, channels, height, width).float().contiguous(memory_format=memory)
    weight, bias = drawn(channels, 1, kernel, kernel, seed=1).float(), drawn(channels, seed=2).float()

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride, kernel // 2, groups=channels)

    grad = drawn(*stock(x, weight, bias).shape, seed=3).float()
    exact = gradients(stock, *(tensor.double() for tensor in (x, weight, bias, grad)))
    found = gradients(partial(depthwise_conv2d, stride=stride), x, weight, bias, grad)
    most = 2e-6 if form == "native" else 1e-5  # torch's sums differ in their order
    for got, want in zip(found, exact, strict=True):
        assert (got.double() - want).abs().max() <= most * want.abs().max()


def test_the_form_is_the_fastest_that_serves(form: str) -> None:
    def chosen(px: int, kernel: int, stride: int = 1, dtype: torch.dtype = torch.float32) -> str:
        x, weight = torch.zeros(2, 3, px, px, dtype=dtype), torch.zeros(3, 1, kernel, kernel, dtype=dtype)
        return choose_form(x, weight, stride)

    other = "stock" if form == "stock" else "lean"
    assert (chosen(16, 5), chosen(16, 7, 2)) == (
        ("native", "native") if form == "native" else (other, "stock")
    )
    assert (chosen(16, 3), chosen(8, 3)) == ("native" if form == "native" else "stock", "stock")
    assert chosen(16, 3, 2) == chosen(16, 1) == chosen(16, 7, 3) == "stock"
    assert chosen(1, 5) == chosen(16, 5, dtype=torch.float64) == chosen(16, 11) == other
    with torch.no_grad():
        assert chosen(16, 5) == "stock"


@pytest.mark.skipif(native.library() is None, reason="no C++ kernels")
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_the_same_bytes_for_any_number_of_threads(stride: int) -> None:
    x, weight = drawn(9, 40, 30, 31).float(), drawn(40, 1, 5, 5, seed=1).float()
    grad = drawn(9, 40, -(-30 // stride), -(-31 // stride), seed=2).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native_depthwise.backward(grad, x, weight, stride))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            assert got is not None
            assert want is not None
            assert torch.equal(got, want)


@pytest.mark.skipif(native.library() is None, reason="no C++ kernels")
def test_the_kernel_computes_only_what_is_needed() -> None:
    x, weight, grad = drawn(2, 16, 8, 8).float(), drawn(16, 1, 5, 5).float(), drawn(2, 16, 8, 8).float()
    both = native_depthwise.backward(grad, x, weight, 1)
    for needed in ((True, False), (False, True)):
        found = native_depthwise.backward(grad, x, weight, 1, needed)
        for got, want, is_needed in zip(found, both, needed, strict=True):
            assert (got is not None) == is_needed
            assert got is None or (want is not None and torch.equal(got, want))
    with pytest.raises(AssertionError, match="grad must be"):
        native_depthwise.backward(grad, x, weight, 2)


def test_a_gradient_is_computed_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    form = lean_quadratic.weight_gradient_form

    def counted(*arguments: object) -> object:
        calls.append("weights")
        return form(*arguments)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(lean_quadratic, "weight_gradient_form", counted)
    x, weight, bias = drawn(2, 3, 8, 8), drawn(3, 1, 5, 5, seed=1), drawn(3, seed=2)
    depthwise_conv2d(x.requires_grad_(), weight, bias).sum().backward()  # type: ignore[no-untyped-call]
    assert not calls
    depthwise_conv2d(x.detach(), weight.requires_grad_(), bias).sum().backward()  # type: ignore[no-untyped-call]
    assert calls == ["weights"]


@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivatives_are_those_of_finite_differences(form: str, stride: int) -> None:
    x, weight, bias = drawn(2, 2, 4, 3), drawn(2, 1, 5, 5, seed=1), drawn(2, seed=2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradgradcheck(partial(depthwise_conv2d, stride=stride), inputs)
    # of the form in single precision, which the check above does not reach
    x, weight = drawn(2, 3, 8, 8).float().requires_grad_(), drawn(3, 1, 5, 5, seed=1).float().requires_grad_()
    (first,) = torch.autograd.grad(
        depthwise_conv2d(x, weight, stride=stride).square().sum(), x, create_graph=True
    )
    (stock,) = torch.autograd.grad(
        F.conv2d(x, weight, stride=stride, padding=2, groups=3).square().sum(), x, create_graph=True
    )
    found, expected = (torch.autograd.grad(each.square().sum(), weight)[0] for each in (first, stock))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_under_autocast_it_runs_in_autocasts_type(form: str) -> None:
    x, weight = drawn(2, 3, 8, 8).float(), drawn(3, 1, 5, 5, seed=1).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_backward_pass_under_autocast_keeps_the_types_of_the_forward_pass(form: str) -> None:
    x, weight = drawn(2, 3, 8, 8).float().requires_grad_(), drawn(3, 1, 5, 5, seed=1).float().requires_grad_()
    y = depthwise_conv2d(x, weight)
    expected = torch.autograd.grad(y.sum(), [x, weight], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), [x, weight])
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        if form != "stock":  # torch's own backward pass follows autocast
            assert torch.equal(got, want)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_module_is_a_convolution_of_torch_to_whoever_looks(form: str, stride: int) -> None:
    module = DepthwiseConv2d(6, 5, stride, bias=False)
    plain = nn.Conv2d(6, 6, 5, stride, 2, groups=6, bias=False)
    plain.load_state_dict(module.state_dict())
    x = drawn(2, 6, 9, 9).float()
    assert torch.equal(module(x), plain(x))
    program = torch.export.export(module, (x,))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert called == {torch.ops.aten.conv2d.default}
    weights = dict(module.named_parameters())
    per_image = torch.func.vmap(
        torch.func.grad(lambda w, one: torch.func.functional_call(module, w, (one[None],)).square().sum()),
        in_dims=(None, 0),
    )(weights, x)
    total = torch.autograd.grad(module(x).square().sum(), module.weight)[0]
    torch.testing.assert_close(per_image["weight"].sum(0), total, rtol=1e-4, atol=1e-3)
