"""The C++ kernels against their definitions in float64, at sizes that cover every border case."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.nn.kernels import mixer
from qnas.nn.kernels.mixer import Norm
from qnas.nn.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ kernels")

# (B, C, H, W): groups of 16 channels with every kind of rest, one place, one row, one column, maps
# smaller than the kernel, columns that no tile divides, more images than slices.
SHAPES = [
    (2, 5, 4, 3),
    (1, 16, 7, 7),
    (3, 17, 1, 1),
    (2, 24, 2, 2),
    (2, 40, 9, 33),
    (1, 8, 1, 12),
    (1, 19, 14, 1),
    (1, 64, 20, 57),
    (33, 3, 3, 3),
    (40, 24, 5, 6),
    (1, 100, 3, 8),
]
TOLERANCE = 1e-5  # of the largest value; float32 has 1.2e-7, and sums have thousands of terms


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def quadratic(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor) -> Tensor:
    return depthwise(x, w_a) * depthwise(x, w_b) + depthwise(x, w_c)


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, 1e-6).permute(0, 3, 1, 2)


def mixed(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x + quadratic(normalised(x, scale, shift), w_a, w_b, w_c)


def nested(
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    scale: Tensor,
    shift: Tensor,
    shares: Tensor,
) -> Tensor:
    y, kernel = x, w_a.shape[-1]
    for share, width in zip(shares, range(3, kernel + 1, 2), strict=True):
        centre = (..., *(slice((kernel - width) // 2, (kernel + width) // 2),) * 2)
        a, b, c = (w[centre] for w in (w_a, w_b, w_c))
        y = y + share * quadratic(normalised(x, scale, shift), a, b, c)
    return y


class Case(NamedTuple):
    """The inputs of the forms: all but the last three are `operator`'s, (x, w_a, w_b, w_c)."""

    operator: tuple[Tensor, Tensor, Tensor, Tensor]
    norm: Norm
    shares: Tensor
    grad: Tensor


def case(shape: tuple[int, ...], kernel: int) -> Case:
    torch.manual_seed(0)
    channels = shape[1]
    w_a, w_b, w_c = (torch.randn(channels, 1, kernel, kernel) / kernel for _ in range(3))
    scale, shift = (torch.randn(channels) for _ in range(2))
    x, grad = torch.randn(shape), torch.randn(shape)
    return Case((x, w_a, w_b, w_c), Norm(scale, shift), torch.rand(kernel // 2), grad)


def expected(form: object, arguments: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients by torch, in float64."""
    leaves = [t.double().requires_grad_() for t in arguments]
    assert callable(form)
    y = form(*leaves)
    gradients = torch.autograd.grad(y, leaves, grad.double(), materialize_grads=True)
    return (y.detach(), *gradients)


def assert_close(got: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours is not None
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().clamp(min=1e-3) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_is_its_definition(shape: tuple[int, ...], kernel: int) -> None:
    operator, *_, grad = case(shape, kernel)
    got = (mixer.forward(*operator), *mixer.backward(grad, *operator)[:4])
    assert_close(got, expected(quadratic, operator, grad))


# direct sums have 1e-7 to 2e-7; for 5 and 7 taps other points than ours, or ten of them, have over 2e-6
@pytest.mark.parametrize(("kernel", "most"), [(3, 3e-7), (5, 1.5e-6), (7, 1.5e-6)])
def test_minimal_filtering_loses_little(kernel: int, most: float) -> None:
    operator, *_ = case((2, 32, 24, 24), kernel)
    exact = quadratic(*[t.double() for t in operator])
    error = (mixer.forward(*operator) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < most


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_gradients_lose_little(kernel: int) -> None:
    operator, *_, grad = case((2, 32, 24, 24), kernel)
    for got, exact in zip(
        mixer.backward(grad, *operator)[:4], expected(quadratic, operator, grad)[1:], strict=True
    ):
        assert got is not None
        assert (got - exact).square().mean().sqrt() < 5e-7 * exact.square().mean().sqrt()


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_column_is_the_same_bits_whatever_is_right_of_it(kernel: int) -> None:
    (x, a, b, c), *_ = case((1, 40, 6, 40), kernel)
    wide = mixer.forward(x, a, b, c)
    for width in range(12 + kernel, 40, 3):  # groups of tiles that overlap or not, the last whole or cut off
        narrow = mixer.forward(x[..., :width], a, b, c)
        inside = width - kernel // 2 - 4  # the last tiles meet zeros where the others have columns
        torch.testing.assert_close(narrow[..., :inside], wide[..., :inside], rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixer_is_its_definition(shape: tuple[int, ...], kernel: int) -> None:
    operator, norm, _, grad = case(shape, kernel)
    y = mixer.forward(*operator, norm)
    got = (y, *mixer.backward(grad, *operator, norm)[:-1])
    assert_close(got, expected(mixed, (*operator, norm.weight, norm.bias), grad))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_nested_is_the_sum_over_its_kernels(shape: tuple[int, ...], kernel: int) -> None:
    operator, norm, shares, grad = case(shape, kernel)
    y = mixer.forward(*operator, norm, shares)
    *gradients, to_shares = mixer.backward(grad, *operator, norm, shares)
    assert to_shares is not None
    wanted = expected(nested, (*operator, norm.weight, norm.bias, shares), grad)
    assert_close((y, *gradients), wanted[:-1])
    magnitude = (grad * y).abs().sum()  # of the terms of what is one number for each kernel
    torch.testing.assert_close(to_shares / magnitude, (wanted[-1] / magnitude).float(), rtol=0, atol=1e-6)


def test_kernel_beyond_the_maps_reach_is_of_any_size() -> None:
    operator, *_, grad = case((2, 5, 2, 4), 21)
    got = (mixer.forward(*operator), *mixer.backward(grad, *operator)[:4])
    assert_close(got, expected(quadratic, operator, grad))
    assert not mixer.is_supported(torch.zeros(1, 5, 20, 20), 21)


@pytest.mark.parametrize(("needs_x", "needs_weights"), [(True, False), (False, True), (False, False)])
def test_only_needed_gradients_are_computed(needs_x: bool, needs_weights: bool) -> None:
    operator, *_, grad = case((2, 20, 6, 5), 5)
    everything = mixer.backward(grad, *operator)[:4]
    got = mixer.backward(grad, *operator, needs_x=needs_x, needs_weights=needs_weights)[:4]
    for ours, theirs, needed in zip(got, everything, (needs_x, *[needs_weights] * 3), strict=True):
        assert (ours is not None) == needed
        assert ours is None or (theirs is not None and ours.equal(theirs))


@pytest.mark.parametrize("shape", [(3, 20, 6, 5), (2, 5, 2, 2), (0, 5, 4, 3)])
@pytest.mark.parametrize(("needs_x", "needs_weights"), [(True, False), (False, True), (False, False)])
def test_only_needed_gradients_of_the_mixers_are_computed(
    shape: tuple[int, ...], needs_x: bool, needs_weights: bool
) -> None:
    operator, norm, shares, grad = case(shape, 7)
    *everything, all_shares = mixer.backward(grad, *operator, norm, shares)
    *got, to_shares = mixer.backward(
        grad, *operator, norm, shares, needs_x=needs_x, needs_weights=needs_weights
    )
    assert to_shares is not None
    assert all_shares is not None
    *alone, none = mixer.backward(grad, *operator, norm)
    assert none is None
    *got_alone, _ = mixer.backward(grad, *operator, norm, needs_x=needs_x, needs_weights=needs_weights)
    for some, wanted in ((got, everything), (got_alone, alone)):
        for ours, theirs, needed in zip(some, wanted, (needs_x, *[needs_weights] * 5), strict=True):
            assert (ours is not None) == needed
            assert ours is None or (theirs is not None and ours.equal(theirs))
    # without the weights' gradients, what c adds to it is summed over places instead of over taps
    magnitude = (grad * mixer.forward(*operator, norm, shares)).abs().sum().clamp(min=1e-3)
    torch.testing.assert_close(to_shares / magnitude, all_shares / magnitude, rtol=0, atol=1e-6)


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in several memory formats."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    return [x.contiguous(), x.contiguous(memory_format=torch.channels_last), wide[..., ::2]]


def test_memory_formats_do_not_matter_and_results_are_channels_last() -> None:
    (x, w_a, w_b, w_c), *_, grad = case((2, 20, 6, 5), 5)
    y = mixer.forward(x, w_a, w_b, w_c)
    assert y.is_contiguous(memory_format=torch.channels_last)
    gradients = mixer.backward(grad, x, w_a, w_b, w_c)[:4]
    for one, other in zip(layouts(x), reversed(layouts(grad)), strict=True):
        a, b, c = (w.to(memory_format=torch.channels_last) for w in (w_a, w_b, w_c))
        assert mixer.forward(one, a, b, c).equal(y)
        for ours, theirs in zip(mixer.backward(other, one, a, b, c)[:4], gradients, strict=True):
            assert ours is not None
            assert theirs is not None
            assert ours.equal(theirs)


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3)])
def test_empty_batch_has_zero_gradients(shape: tuple[int, ...]) -> None:
    operator, norm, shares, grad = case(shape, 3)
    assert mixer.forward(*operator, norm, shares).shape == shape
    *gradients, to_shares = mixer.backward(grad, *operator, norm, shares)
    given = (*operator, norm.weight, norm.bias, shares)
    for ours, theirs in zip((*gradients, to_shares), given, strict=True):
        assert ours is not None
        assert ours.equal(torch.zeros_like(theirs))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("shape", [(3, 40, 40, 41), (37, 24, 12, 13), (1, 24, 50, 50)])
def test_results_are_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...], kernel: int) -> None:
    operator, norm, shares, grad = case(shape, kernel)

    def everything() -> list[Tensor | None]:
        *gradients, to_shares = mixer.backward(grad, *operator, norm, shares)
        return [
            mixer.forward(*operator),
            *mixer.backward(grad, *operator)[:4],
            mixer.forward(*operator, norm, shares),
            *gradients,
            to_shares,
        ]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert ours is not None
            assert theirs is not None
            assert ours.equal(theirs)


def test_channel_does_not_leak_into_another() -> None:
    operator, *_ = case((2, 40, 6, 7), 5)
    y = mixer.forward(*operator)
    operator[0][:, 17] = float("nan")
    spoilt = mixer.forward(*operator)
    assert spoilt[:, 17].isnan().any()
    others = [c for c in range(40) if c != 17]
    assert spoilt[:, others].equal(y[:, others])


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_image_that_is_no_number_leaves_the_others_alone(kernel: int) -> None:
    # what a thread computes one image with is used for the next; odd widths end within a tile
    operator, *_, grad = case((3, 40, 6, 13), kernel)
    clean = (mixer.forward(*operator), mixer.backward(grad, *operator).x)
    operator[0][1] = grad[1] = float("nan")
    spoilt = (mixer.forward(*operator), mixer.backward(grad, *operator).x)
    for before, after in zip(clean, spoilt, strict=True):
        assert before is not None
        assert after is not None
        assert after[1].isnan().all()
        assert after[::2].equal(before[::2])


def test_large_offset_of_the_channels_leaves_the_norm_exact() -> None:
    (x, w_a, w_b, w_c), norm, *_ = case((2, 24, 5, 5), 3)
    x = x + 1000.0
    got = mixer.forward(x, w_a, w_b, w_c, norm).double() - x.double()
    double = [t.double() for t in (x, w_a, w_b, w_c, norm.weight, norm.bias)]
    wanted = mixed(*double) - double[0]
    # near 1000 float32 has steps of 6e-5, which the mean has too
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(5, 1, 5, 5)}, r"weights must be \(5, 1, 5, 5\), got \(5, 1, 3, 3\)"),
        ({0: torch.zeros(2, 5, 4, 3, dtype=torch.float64)}, "no kernel of size 3 for torch.float64"),
        ({3: torch.zeros(5, 1, 3, 3, dtype=torch.float64)}, "inputs must be float32"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[int, Tensor], message: str) -> None:
    operator, *_ = case((2, 5, 4, 3), 3)
    x, w_a, w_b, w_c = (change.get(i, tensor) for i, tensor in enumerate(operator))
    with pytest.raises(AssertionError, match=message):
        mixer.forward(x, w_a, w_b, w_c)
