"""The quadratic depthwise convolution: Y = (W_a * X) . (W_b * X) + W_c * X.

`*` is a depthwise convolution and `.` the elementwise product (QuadraNet, arXiv 2311.17956, eq. 6
and 7). This is the reference form, three convolutions under torch's own autograd: what is exported
and what faster forms are compared with.
"""

import torch.nn.functional as F
from torch import Tensor


def quadratic_conv2d(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the quadratic depthwise convolution at stride 1, padded to keep the size.

    x: (B, C, H, W); weights: (C, 1, k, k) with k odd; bias: (C,), added at the end. Returns (B, C, H, W).
    """
    channels, kernel = w_a.shape[0], w_a.shape[-1]
    assert w_a.shape == w_b.shape == w_c.shape == (channels, 1, kernel, kernel), (
        "weights must be (C, 1, k, k)"
    )
    assert kernel % 2 == 1, f"kernel must be odd, got {kernel}"
    padding = kernel // 2
    a = F.conv2d(x, w_a, padding=padding, groups=channels)
    b = F.conv2d(x, w_b, padding=padding, groups=channels)
    c = F.conv2d(x, w_c, bias, padding=padding, groups=channels)
    return a * b + c
