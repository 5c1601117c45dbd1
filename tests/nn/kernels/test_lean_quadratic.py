import pytest
import torch
from torch import Tensor

from qnas.nn.kernels.lean_quadratic import (
    columns_gradients,
    folded_gradients,
    gram_gradients,
    quadratic_backward,
    quadratic_forward,
    stock_gradients,
    weight_gradient_form,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """dW[c, u, v] = the sum over images and places of x[i + u - k // 2, j + v - k // 2] grad[i, j]."""
    half, (height, width) = kernel // 2, x.shape[2:]
    padded = x.new_zeros(*x.shape[:2], height + 2 * half, width + 2 * half)
    padded[:, :, half : half + height, half : half + width] = x
    taps = [
        (padded[:, :, u : u + height, v : v + width] * grad).sum((0, 2, 3))
        for u in range(kernel)
        for v in range(kernel)
    ]
    return torch.stack(taps, 1).view(-1, 1, kernel, kernel)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "kernel"),
    [(2, 3, 9, 11, 5), (1, 2, 9, 9, 7), (2, 3, 3, 4, 3), (2, 1, 5, 5, 5), (3, 2, 7, 8, 1), (2, 2, 4, 4, 7)],
)
def test_every_form_sums_what_the_definition_sums(
    batch: int, channels: int, height: int, width: int, kernel: int, layout: torch.memory_format
) -> None:
    shape = (batch, channels, height, width)
    x, *grads = (draw(*shape, seed=i).contiguous(memory_format=layout) for i in range(4))
    for form in (stock_gradients, columns_gradients, gram_gradients, folded_gradients):
        for got, grad in zip(form(x, grads, kernel), grads, strict=True):
            torch.testing.assert_close(got, by_definition(x, grad, kernel), rtol=1e-11, atol=1e-11)


def test_the_folded_form_adds_up_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = draw(5, 2, 6, 6), draw(5, 2, 6, 6, seed=1)
    monkeypatch.setattr(
        "qnas.nn.kernels.lean_quadratic.FOLDED_ELEMENTS", 2 * x[0].numel()
    )  # 2 + 2 + 1 images
    (got,) = folded_gradients(x, [grad], 5)
    torch.testing.assert_close(got, by_definition(x, grad, 5), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "kernel", "form"),
    [  # the shapes that the module's figures were measured at
        ((64, 32, 16, 16), 3, stock_gradients),
        ((64, 32, 16, 16), 5, columns_gradients),
        ((64, 32, 16, 16), 7, columns_gradients),
        ((64, 24, 8, 8), 7, folded_gradients),
        ((64, 40, 4, 4), 5, gram_gradients),
        ((64, 128, 4, 4), 5, folded_gradients),
        ((64, 80, 2, 2), 3, gram_gradients),
        ((64, 192, 1, 1), 1, gram_gradients),
        ((0, 32, 16, 16), 7, stock_gradients),
    ],
)
def test_each_shape_takes_the_form_that_was_fastest(
    shape: tuple[int, ...], kernel: int, form: object
) -> None:
    assert weight_gradient_form(torch.empty(shape), kernel) is form


@pytest.mark.parametrize("size", [1, 2, 5])
def test_factors_that_were_kept_give_the_gradients_of_factors_computed_anew(size: int) -> None:
    x, grad = draw(2, 3, size, size), draw(2, 3, size, size, seed=9)
    w_a, w_b, w_c = (draw(3, 1, 5, 5, seed=i) for i in range(1, 4))
    _, factors = quadratic_forward(x, w_a, w_b, w_c)
    before = [t.clone() for t in (x, grad, *factors)]
    kept = quadratic_backward(grad, x, w_a, w_b, w_c, factors=factors)
    anew = quadratic_backward(grad, x, w_a, w_b, w_c)
    for got, expected in zip(kept, anew, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for t, was in zip((x, grad, *factors), before, strict=True):
        assert torch.equal(t, was)  # nothing of the caller's is overwritten


def test_gradients_that_are_not_needed_are_none() -> None:
    x, grad = draw(2, 3, 5, 5), draw(2, 3, 5, 5, seed=9)
    w_a, w_b, w_c = (draw(3, 1, 3, 3, seed=i) for i in range(1, 4))
    full = quadratic_backward(grad, x, w_a, w_b, w_c)
    for i in range(4):
        needed = [j == i for j in range(4)]
        for j, got in enumerate(quadratic_backward(grad, x, w_a, w_b, w_c, needed)):
            if j == i:
                torch.testing.assert_close(got, full[j])
            else:
                assert got is None
