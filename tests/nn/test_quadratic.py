import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qnas.nn.kernels import native
from qnas.nn.quadratic import (
    KEPT_ELEMENTS,
    choose_form,
    decompositions,
    quadratic_conv2d,
    quadratic_conv2d_reference,
)

OPERATOR = torch.ops.qnas.quadratic_conv2d.default
BACKWARD = torch.ops.qnas.quadratic_conv2d_backward.default


@pytest.fixture(params=["native", "lean"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make float32 on the CPU take this form."""
    monkeypatch.setenv("QNAS_KERNELS", "0" if request.param == "lean" else "1")
    if request.param == "native" and native.library() is None:
        pytest.skip("no compiler")
    return str(request.param)


def random_inputs(
    batch: int, channels: int, height: int, width: int, kernel: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = (draw(channels, 1, kernel, kernel) for _ in range(3))
    x = draw(batch, channels, height, width)
    w_a, w_b, w_c = weights
    return x, w_a, w_b, w_c, draw(channels)


def by_definition(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor) -> Tensor:
    """Y = (W_a * X) . (W_b * X) + W_c * X + bias, place by place, zeros outside the map."""
    kernel = w_a.shape[-1]
    y = torch.zeros_like(x)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        a = b = linear = 0.0
        for u in range(kernel):
            for v in range(kernel):
                row, column = i + u - kernel // 2, j + v - kernel // 2
                if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                    value = float(x[n, c, row, column])
                    a += float(w_a[c, 0, u, v]) * value
                    b += float(w_b[c, 0, u, v]) * value
                    linear += float(w_c[c, 0, u, v]) * value
        y[n, c, i, j] = a * b + linear + float(bias[c])
    return y


@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "kernel"),
    [
        (2, 3, 4, 4, 3),
        (1, 2, 5, 3, 3),  # odd and not square
        (1, 2, 3, 3, 7),  # a kernel larger than the map
        (1, 2, 1, 1, 5),
        (2, 2, 4, 5, 1),
    ],
)
def test_the_convolution_is_its_definition(
    batch: int, channels: int, height: int, width: int, kernel: int
) -> None:
    inputs = random_inputs(batch, channels, height, width, kernel)
    torch.testing.assert_close(quadratic_conv2d(*inputs), by_definition(*inputs), rtol=1e-12, atol=1e-12)


def test_without_a_bias_nothing_is_added() -> None:
    x, w_a, w_b, w_c, bias = random_inputs(2, 3, 4, 4, 3)
    difference = quadratic_conv2d(x, w_a, w_b, w_c, bias) - quadratic_conv2d(x, w_a, w_b, w_c)
    torch.testing.assert_close(difference, bias[:, None, None].expand_as(difference))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_gradients_are_those_of_finite_differences(kernel: int) -> None:
    inputs = tuple(t.requires_grad_() for t in random_inputs(2, 2, 4, 3, kernel))
    assert torch.autograd.gradcheck(quadratic_conv2d, inputs)
    assert torch.autograd.gradcheck(quadratic_conv2d, inputs[:4])


def test_gradients_are_those_of_finite_differences_where_some_inputs_need_none() -> None:
    for needed in range(5):
        inputs = random_inputs(1, 2, 3, 3, 3)
        inputs[needed].requires_grad_()
        assert torch.autograd.gradcheck(quadratic_conv2d, inputs)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_may_have_one_image_or_none(batch: int) -> None:
    x, *weights = random_inputs(batch, 3, 5, 4, 3)
    for weight in weights:
        weight.requires_grad_()
    y = quadratic_conv2d(x, *weights)
    assert y.shape == x.shape
    y.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if batch == 0:
        assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_the_memory_layout_of_the_input_changes_nothing() -> None:
    x, *weights = random_inputs(2, 4, 6, 5, 3)
    expected = quadratic_conv2d(x, *weights)
    layouts = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack([x, -x], dim=-1)[..., 0],
        "expanded": x[:1].expand(2, -1, -1, -1),
    }
    for name, view in layouts.items():
        want = quadratic_conv2d(x[:1].repeat(2, 1, 1, 1), *weights) if name == "expanded" else expected
        channels_last = [w.contiguous(memory_format=torch.channels_last) for w in weights[:3]]
        for w in (weights[:3], channels_last):
            got = quadratic_conv2d(view, w[0], w[1], w[2], weights[3])
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_images_of_a_batch_do_not_touch() -> None:
    x, *weights = random_inputs(3, 2, 5, 5, 3)
    together = quadratic_conv2d(x, *weights)
    for i in range(3):
        torch.testing.assert_close(quadratic_conv2d(x[i : i + 1], *weights), together[i : i + 1])


def test_weights_of_a_wrong_shape_are_our_mistake() -> None:
    x, w_a, w_b, w_c, _ = random_inputs(1, 2, 4, 4, 3)
    with pytest.raises(AssertionError):
        quadratic_conv2d(x, w_a, w_b[:, :, :1], w_c)
    with pytest.raises(AssertionError, match="odd"):
        quadratic_conv2d(x, *(w[:, :, :2, :2] for w in (w_a, w_b, w_c)))


SHAPES = [  # batch, channels, height, width, kernel
    (2, 3, 9, 7, 3),  # odd and not square
    (2, 17, 8, 8, 5),
    (2, 16, 14, 13, 7),
    (3, 5, 4, 4, 5),
    (2, 5, 2, 2, 7),  # kernels larger than the map
    (2, 4, 1, 1, 5),
    (1, 2, 3, 11, 7),
    (1, 2, 11, 1, 5),
    (2, 3, 6, 6, 11),  # larger than any kernel in C++
    (1, 1, 5, 5, 3),
    (2, 3, 4, 5, 1),
    (1, 3, 5, 4, 3),
    (0, 3, 5, 4, 3),  # an empty batch
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_agrees_with_the_reference_in_float64(
    form: str, shape: tuple[int, int, int, int, int], layout: torch.memory_format
) -> None:
    exact = [t.requires_grad_() for t in random_inputs(*shape)]
    rough = [t.detach().float().requires_grad_() for t in exact]
    rough[0] = rough[0].detach().contiguous(memory_format=layout).requires_grad_()
    assert choose_form(*rough[:4]) == ("lean" if shape[-1] == 11 else form)
    grad = torch.randn(shape[:4], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, got = quadratic_conv2d_reference(*exact), quadratic_conv2d(*rough)
    compare(got, expected, 1e-6)
    pairs = zip(
        torch.autograd.grad(got, rough, grad.float()), torch.autograd.grad(expected, exact, grad), strict=True
    )
    for found, wanted in pairs:
        compare(found, wanted, 2e-6)


def compare(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors of sums are small against the largest sum, not against those that cancel."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_stays_within_its_rounding(shape: tuple[int, int, int, int, int]) -> None:
    rough = [t.bfloat16().requires_grad_() for t in random_inputs(*shape)]
    exact = [t.detach().double().requires_grad_() for t in rough]
    expected, got = quadratic_conv2d_reference(*exact), quadratic_conv2d(*rough)
    assert got.dtype == torch.bfloat16
    compare(got, expected, 4 * 2**-8)  # rounding to 8 bits, four times: both factors, product, sum
    pairs = zip(
        torch.autograd.grad(got.sum(), rough), torch.autograd.grad(expected.sum(), exact), strict=True
    )
    for found, wanted in pairs:
        compare(found, wanted, 4 * 2**-8)


def test_inputs_that_need_no_gradient_get_none(form: str) -> None:
    for needed in itertools.product([False, True], repeat=5):
        inputs = [t.float() for t in random_inputs(2, 3, 6, 5, 5)]
        for t, is_needed in zip(inputs, needed, strict=True):
            t.requires_grad_(is_needed)
        y, expected = quadratic_conv2d(*inputs), quadratic_conv2d_reference(*inputs)
        assert y.requires_grad == any(needed)
        if any(needed):
            wanted = [t for t in inputs if t.requires_grad]
            pairs = zip(
                torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True
            )
            for got, want in pairs:
                compare(got, want, 1e-5)


def test_training_keeps_x_alone_beside_the_weights(form: str) -> None:
    inputs = [t.float().requires_grad_() for t in random_inputs(5, 16, 64, 64, 3)]
    assert inputs[0].numel() > KEPT_ELEMENTS
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        quadratic_conv2d(*inputs)
    weights = sum(t.numel() for t in inputs[1:4])
    assert sum(kept.values()) - weights <= 1.1 * inputs[0].numel()


@pytest.mark.parametrize("kernel", [3, 5])
def test_gradients_of_gradients_are_those_of_finite_differences(kernel: int) -> None:
    inputs = tuple(t.requires_grad_() for t in random_inputs(2, 2, 4, 3, kernel))
    assert torch.autograd.gradgradcheck(quadratic_conv2d, inputs)
    inputs[1].requires_grad_(False)
    assert torch.autograd.gradgradcheck(quadratic_conv2d, inputs)


def test_a_gradient_penalty_trains_the_input_and_the_weights(form: str) -> None:
    inputs = [t.float().requires_grad_() for t in random_inputs(2, 3, 6, 5, 3)]

    def penalty(function: Any) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        squares = torch.stack([g.square().sum() for g in gradients])
        return torch.autograd.grad(squares.sum(), inputs)

    pairs = zip(penalty(quadratic_conv2d), penalty(quadratic_conv2d_reference), strict=True)
    for got, expected in pairs:
        compare(got, expected, 1e-4)


def test_the_form_follows_device_type_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = random_inputs(2, 3, 6, 5, 3)[:4]
    rough = [t.float() for t in exact]
    assert choose_form(*exact) == "lean"
    assert choose_form(*(t.to("meta") for t in rough)) == "reference"
    assert choose_form(*rough) == ("lean" if native.library() is None else "native")
    assert choose_form(rough[0], *exact[1:]) == "lean"  # mixed types: torch says what is wrong
    monkeypatch.setenv("QNAS_KERNELS", "0")
    assert choose_form(*rough) == "lean"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_operators_keep_torchs_rules(form: str, has_bias: bool, layout: torch.memory_format) -> None:
    x, w_a, w_b, w_c, bias = (t.float().requires_grad_() for t in random_inputs(2, 5, 6, 7, 3))
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(OPERATOR, (x, w_a, w_b, w_c, bias if has_bias else None))
    plain = [t.detach() for t in (x, w_a, w_b, w_c)]
    for needed in ([True] * 4, [True, False, False, True], [False] * 4):
        torch.library.opcheck(BACKWARD, (torch.ones_like(plain[0]), *plain, needed))
    plain[0] = plain[0][:, :, :2, :2].contiguous(memory_format=layout)  # results must not share memory
    torch.library.opcheck(BACKWARD, (torch.ones_like(plain[0]), *plain, [True] * 4))


class Mixer(nn.Module):
    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.detach().clone()) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        return quadratic_conv2d(x, *self.weights.parameters()).relu()  # dynamo of torch 2.8 takes no list


def called(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_a_compiler_sees_one_operator_without_a_break(form: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    x, *weights = (t.float() for t in random_inputs(2, 5, 6, 7, 5))
    mixer = Mixer(*weights)
    torch._dynamo.reset()
    y = torch.compile(mixer, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, mixer(x))
    (graph,) = graphs
    assert called(graph.graph).count(OPERATOR) == 1
    assert torch.ops.aten.convolution.default not in called(graph.graph)


@pytest.mark.skipif(native.find_compiler() is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_default_compiler_computes_the_same_gradients(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # with CI set, torch refuses operators that its table has decompositions of, unless a cache has the code;
    # an empty cache holds for every torch, while the options that turn the caches off differ between versions
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = [t.float().requires_grad_() for t in random_inputs(2, 5, 6, 7, 5)]
    inputs[0] = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(quadratic_conv2d, fullgraph=True)
    for used in (inputs, inputs[:4]):  # with and without a bias
        got = torch.autograd.grad(compiled(*used).square().sum(), used)
        expected = torch.autograd.grad(quadratic_conv2d_reference(*used).square().sum(), used)
        for found, wanted in zip(got, expected, strict=True):
            compare(found, wanted, 1e-5)


def test_an_exported_program_holds_one_operator_that_decomposes_into_three_convolutions() -> None:
    x, *weights = (t.float() for t in random_inputs(3, 5, 6, 7, 3))
    mixer = Mixer(*weights)
    program = torch.export.export(mixer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert called(program.graph).count(OPERATOR) == 1
    plain = program.run_decompositions(decompositions())
    targets = called(plain.graph)
    assert all(target.namespace == "aten" for target in targets)
    assert targets.count(torch.ops.aten.convolution.default) == 3
    for batch in (x, x[:1], x.repeat(2, 1, 1, 1)):
        torch.testing.assert_close(plain.module()(batch), mixer(batch))


def test_autocast_sees_a_convolution(form: str) -> None:
    inputs = [t.float().requires_grad_() for t in random_inputs(2, 5, 6, 7, 5)]
    torch._dynamo.reset()
    functions = [quadratic_conv2d, torch.compile(quadratic_conv2d, fullgraph=True, backend="aot_eager")]
    for function in functions:
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = function(*inputs), quadratic_conv2d_reference(*inputs)
            assert y.dtype == expected.dtype == torch.bfloat16
            got = torch.autograd.grad(y.float().sum(), inputs)  # autocast is on in the backward pass too
        wanted = torch.autograd.grad(expected.float().sum(), inputs)
        compare(y.float(), expected.float(), 4 * 2**-8)
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == torch.float32
            compare(g, w, 8 * 2**-8)


def test_autocast_leaves_float64_and_a_backward_pass_outside_it(form: str) -> None:
    exact = random_inputs(2, 3, 6, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert quadratic_conv2d(*exact).dtype == torch.float64
    inputs = [t.float().requires_grad_() for t in exact]
    y = quadratic_conv2d(*inputs)
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), inputs)
    for g, w in zip(got, expected, strict=True):
        assert torch.equal(g, w)


def test_vmap_and_functional_gradients_are_right(form: str) -> None:
    x, w_a, w_b, w_c, bias = (t.float() for t in random_inputs(4, 3, 6, 5, 3))
    mapped = torch.vmap(lambda image: quadratic_conv2d(image[None], w_a, w_b, w_c, bias)[0])(x)
    torch.testing.assert_close(mapped, quadratic_conv2d(x, w_a, w_b, w_c, bias))
    gradient = torch.func.grad(lambda w: quadratic_conv2d(x, w, w_b, w_c).sum())(w_a)
    w_a.requires_grad_()
    (expected,) = torch.autograd.grad(quadratic_conv2d(x, w_a, w_b, w_c).sum(), w_a)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the assertions on shapes
def test_what_watches_torchs_operators_sees_three_convolutions(form: str) -> None:
    shape, kernel = (2, 3, 6, 5), 3
    x, *weights = (t.float() for t in random_inputs(*shape, kernel))
    with FlopCounterMode(display=False) as counter:
        quadratic_conv2d(x, *weights)
    assert counter.get_total_flops() == 2 * 3 * math.prod(shape) * kernel**2
    traced = torch.jit.trace(lambda x: quadratic_conv2d(x, *weights), (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(2 * x), quadratic_conv2d(2 * x, *weights))
