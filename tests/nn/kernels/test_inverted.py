"""The C++ kernels of an inverted residual against torch's modules in float64, at sizes for every border."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from qnas.nn.kernels import inverted
from qnas.nn.kernels.inverted import Kept, Options, Weights
from qnas.nn.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ kernels")

EPS = 1e-3
TOLERANCE = 1e-5  # of the largest value; float32 has 1.2e-7, and sums have thousands of terms
# in lists of y and the gradients: parameters of norms before a norm, whose sums nearly cancel
CANCELLING = (3, 4, 6, 7)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu6": nn.ReLU6, "relu": nn.ReLU, "hswish": nn.Hardswish}


class Sizes(NamedTuple):
    batch: int
    c_in: int
    hidden: int
    c_out: int
    height: int
    width: int
    has_expand: bool = True


# groups of 16 channels and panels of 32 with every kind of rest; one place, maps smaller than the kernel,
# columns that no tile divides, more images than slices, more rows than a chunk has, bands of a map
SIZES = [
    Sizes(3, 8, 32, 8, 7, 7),
    Sizes(2, 5, 13, 11, 9, 6),
    Sizes(40, 24, 72, 40, 3, 4),
    Sizes(5, 33, 49, 24, 1, 1),
    Sizes(2, 16, 96, 24, 13, 40),
    Sizes(1, 4, 20, 4, 70, 45),
    Sizes(3, 19, 19, 35, 8, 9, has_expand=False),
    Sizes(4, 32, 32, 16, 12, 12, has_expand=False),
]


class Case(NamedTuple):
    x: Tensor
    weights: Weights
    options: Options
    grad: Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return (self.x, *self.weights)


def case(
    sizes: Sizes, kernel: int = 3, stride: int = 1, activation: str = "relu6", before: int | None = None
) -> Case:
    """`before`: rows and columns of padding before the map, half the kernel unless given."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    batch, c_in, hidden, c_out, height, width, has_expand = sizes
    matrix, norm1 = drawn(hidden, c_in, 1, 1, scale=c_in**-0.5), (1 + drawn(hidden), drawn(hidden))
    weights = Weights(
        matrix if has_expand else None,
        norm1[0] if has_expand else None,
        norm1[1] if has_expand else None,
        drawn(hidden, 1, kernel, kernel, scale=1 / kernel),
        1 + drawn(hidden),
        drawn(hidden),
        drawn(c_out, hidden, 1, 1, scale=hidden**-0.5),
        drawn(c_out),
        drawn(c_out),
    )
    pad = kernel // 2 if before is None else before
    options = Options(stride, (pad, pad), activation, EPS, is_residual=c_in == c_out and stride == 1)
    grad = drawn(batch, c_out, -(-height // stride), -(-width // stride))
    return Case(0.5 + drawn(batch, c_in, height, width), weights, options, grad)


def in_modules(weights: Weights, options: Options, height: int, width: int) -> nn.Sequential:
    """The block without its residual connection, of torch's modules with these parameters, in float64."""
    kernel, stride, hidden = weights.depthwise.shape[-1], options.stride, len(weights.depthwise)
    pads = []  # the last window of a row or column ends with the padding
    for size, before in ((width, options.padding[1]), (height, options.padding[0])):
        pads += [before, (-(-size // stride) - 1) * stride + kernel - size - before]
    names = dict(weights._asdict())
    layers: list[nn.Module] = []

    def add(conv: nn.Conv2d, weight: str, norm: str) -> None:
        conv.weight = nn.Parameter(names[weight])
        batch_norm = nn.BatchNorm2d(conv.out_channels, eps=EPS, track_running_stats=False)
        batch_norm.weight = nn.Parameter(names[f"{norm}_weight"])
        batch_norm.bias = nn.Parameter(names[f"{norm}_bias"])
        layers.extend([conv, batch_norm])

    if weights.expand is not None:
        add(nn.Conv2d(weights.expand.shape[1], hidden, 1, bias=False), "expand", "norm1")
        layers.append(ACTIVATIONS[options.activation]())
    layers.append(nn.ZeroPad2d(tuple(pads)))  # type: ignore[arg-type]  # four numbers
    add(nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False), "depthwise", "norm2")
    layers.append(ACTIVATIONS[options.activation]())
    add(nn.Conv2d(hidden, len(weights.project), 1, bias=False), "project", "norm3")
    return nn.Sequential(*layers).double()


def expected(given: Case) -> list[Tensor | None]:
    """y, and the gradients of x and of the parameters in the order of `Weights`."""
    x = given.x.double().requires_grad_()
    block = in_modules(given.weights, given.options, *x.shape[2:])
    y = x + block(x) if given.options.is_residual else block(x)
    found = iter(torch.autograd.grad(y, (x, *block.parameters()), given.grad.double()))
    return [y.detach(), *(None if t is None else next(found) for t in given.inputs)]


def computed(given: Case) -> tuple[list[Tensor | None], Kept]:
    y, kept = inverted.forward(given.x, given.weights, given.options)
    needed = [t is not None for t in given.inputs]
    return [y, *inverted.backward(given.grad, *given[:3], kept, needed)], kept


def assert_close(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    """Compare y and the gradients with those in float64, relative to the largest value."""
    for index, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert (ours is None) == (theirs is None)
        if ours is None or theirs is None:
            continue
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().clamp(min=0.1)  # some gradients are zero but for rounding
        most = 10 * TOLERANCE if index in CANCELLING else TOLERANCE
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=most)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_block_and_its_gradients_are_those_of_torchs_modules(
    sizes: Sizes, kernel: int, stride: int
) -> None:
    given = case(sizes, kernel, stride)
    assert_close(computed(given)[0], expected(given))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_every_activation_and_memory_format_is_served(activation: str, memory: torch.memory_format) -> None:
    given = case(Sizes(3, 24, 48, 24, 9, 8), 5, activation=activation)
    given = given._replace(
        x=given.x.contiguous(memory_format=memory), grad=given.grad.contiguous(memory_format=memory)
    )
    assert_close(computed(given)[0], expected(given))


@pytest.mark.parametrize(
    ("kernel", "stride", "before"), [(3, 2, 0), (5, 2, 1), (5, 2, 2), (7, 2, 2), (3, 1, 0)]
)
@pytest.mark.parametrize("size", [(12, 9), (3, 2)])
def test_padding_may_differ_before_and_after_the_map(
    kernel: int, stride: int, before: int, size: tuple[int, int]
) -> None:
    given = case(Sizes(2, 8, 24, 16, *size), kernel, stride, before=before)
    assert_close(computed(given)[0], expected(given))


def test_rows_and_columns_may_be_padded_differently() -> None:
    given = case(Sizes(2, 8, 24, 16, 9, 12), 5, 2)
    given = given._replace(options=Options(2, (2, 1), "relu6", EPS, is_residual=False))
    assert_close(computed(given)[0], expected(given))


@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[6]])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_reference_is_torchs_modules(sizes: Sizes, stride: int) -> None:
    given = case(sizes, 5, stride, before=1)
    exact = given.x.double(), Weights(*(None if t is None else t.double() for t in given.weights))  # type: ignore[arg-type]
    torch.testing.assert_close(inverted.reference(*exact, given.options), expected(given)[0])


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_are_those_of_the_batch_even_far_from_zero(offset: float) -> None:
    given = case(Sizes(4, 3, 16, 8, 30, 31))
    x = given.x + offset
    kept = inverted.forward(x, given.weights, given.options)[1]
    assert given.weights.expand is not None
    assert kept.mean1 is not None
    assert kept.variance1 is not None
    h1 = torch.nn.functional.conv2d(x.double(), given.weights.expand.double())
    places = (0, 2, 3)
    torch.testing.assert_close(kept.mean1.double(), h1.mean(places), rtol=1e-6, atol=1e-6)
    # each value of h1 is only known to 1e-7 of its size
    variance = h1.var(places, correction=0)
    torch.testing.assert_close(kept.variance1.double(), variance, rtol=1e-6 + 1e-6 * offset, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "sizes", [Sizes(9, 24, 144, 24, 30, 31), Sizes(40, 40, 40, 24, 20, 20, has_expand=False)]
)
def test_results_are_the_same_bytes_for_any_number_of_threads(sizes: Sizes, stride: int) -> None:
    given = case(sizes, 5, stride)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gradients, kept = computed(given)
            found.append([*gradients, *kept[3:]])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            assert (got is None) == (want is None)
            assert got is None or (want is not None and torch.equal(got, want))


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[7]])
def test_only_needed_gradients_are_returned_and_they_are_the_same(sizes: Sizes) -> None:
    given = case(sizes, 5)
    (_, *every), kept = computed(given)
    for index, tensor in enumerate(given.inputs):
        needed = [i == index for i in range(len(given.inputs))]
        found = inverted.backward(given.grad, *given[:3], kept, needed)
        assert [t is not None for t in found] == [n and tensor is not None for n in needed]
        got, want = found[index], every[index]
        assert got is None or (want is not None and torch.equal(got, want))


def test_the_backward_pass_leaves_what_was_kept() -> None:
    given = case(SIZES[0], 5)
    first, kept = computed(given)
    again = inverted.backward(given.grad, *given[:3], kept, [True] * 10)
    for got, want in zip(again, first[1:], strict=True):
        assert got is not None
        assert want is not None
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("activation", "corner"),
    [("relu6", 0.0), ("relu6", 6.0), ("relu", 0.0), ("hswish", -3.0), ("hswish", 3.0)],
)
def test_slopes_at_corners_are_torchs(activation: str, corner: float) -> None:
    given = case(SIZES[0], activation=activation)
    flat = torch.zeros_like(given.weights.norm2_weight), torch.full_like(given.weights.norm2_bias, corner)
    weights = given.weights._replace(norm2_weight=flat[0], norm2_bias=flat[1])
    given = given._replace(weights=weights)
    # z is the corner itself everywhere; the norm's weight still has a gradient where the slope is not zero
    got, want = computed(given)[0][6], expected(given)[6]
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert bool(want.abs().max() > 0.1) == (activation == "hswish" and corner > 0)


def test_nan_stays_nan() -> None:
    given = case(SIZES[0])
    given.x[1, 2, 3, 4] = torch.nan
    found, kept = computed(given)
    assert found[0] is not None
    assert found[0].isnan().all()  # every statistic has it
    assert kept.mean2.isnan().all()
    *others, bias = found  # the last norm's bias has the plain sum of y's gradient
    assert all(t is None or t.isnan().any() for t in others)
    assert bias is not None
    assert bias.isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = case(SIZES[0])
    with pytest.raises(AssertionError, match="expand must be"):
        inverted.forward(given.x[:, :5], given.weights, given.options)
    _, kept = inverted.forward(*given[:3])
    with pytest.raises(AssertionError, match="grad must be"):
        inverted.backward(given.grad[:, :5], *given[:3], kept, [True] * 10)


def test_only_what_was_built_is_supported() -> None:
    given = case(SIZES[0])

    def supported(kernel: int = 3, stride: int = 1, dtype: torch.dtype = torch.float32) -> bool:
        given = case(SIZES[0], kernel, stride)
        weights = Weights(*(t.to(dtype) for t in given.weights if t is not None))
        return inverted.is_supported(given.x, weights, given.options)

    assert all(supported(kernel, stride) for kernel in (3, 5, 7, 9) for stride in (1, 2))
    assert not supported(11)
    assert not supported(stride=3)
    assert not supported(dtype=torch.float64)
    assert not inverted.is_supported(given.x[:0], given.weights, given.options)
