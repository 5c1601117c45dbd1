import numpy as np
import pytest
import torch
from torch import nn

from qnas.nn.padding import SameConv2d
from qnas.spaces.layer import same_pads


def by_definition(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """Return a map's convolution with SAME, pixel by pixel, as TensorFlow's documentation defines it."""
    size, kernel = x.shape[-1], weight.shape[-1]
    rest = size % stride
    total = max(kernel - (rest or stride), 0)  # tf.nn.convolution: by the remainder of the size
    before = total // 2
    out = -(-size // stride)
    found = np.zeros((weight.shape[0], out, out))
    for row in range(out):
        for column in range(out):
            for i in range(kernel):
                for j in range(kernel):
                    y, z = row * stride + i - before, column * stride + j - before
                    if 0 <= y < size and 0 <= z < size:
                        found[:, row, column] += weight[:, :, i, j] @ x[:, y, z]
    return found


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (7, 2), (3, 1), (5, 1), (3, 3), (5, 4)])
@pytest.mark.parametrize("size", [8, 9, 10, 11])
def test_same_is_that_of_tensorflow(kernel: int, stride: int, size: int) -> None:
    torch.manual_seed(0)
    conv = SameConv2d(2, 3, kernel, stride, bias=False).double()
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    expected = by_definition(x[0].numpy(), conv.weight.detach().numpy(), stride)
    np.testing.assert_allclose(conv(x)[0].detach().numpy(), expected, atol=1e-12)


def test_without_a_stride_it_is_half_the_kernel_on_each_side() -> None:
    conv = SameConv2d(4, 4, 5, groups=4)
    usual = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    usual.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(conv(x), usual(x))


def test_the_larger_half_is_behind_the_map() -> None:
    assert same_pads(224, 3, 2) == (0, 1)
    assert same_pads(112, 5, 2) == (1, 2)
    assert same_pads(33, 3, 2) == (1, 1)
    assert same_pads(4, 1, 2) == (0, 0)
