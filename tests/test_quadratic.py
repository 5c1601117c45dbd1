import pytest
import torch
from torch import Tensor

from qnas.quadratic import quadratic_conv2d


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
