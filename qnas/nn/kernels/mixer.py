"""The C++ kernels of the quadratic operator and of the mixers, as plain functions of tensors.

With a = W_a * x, b = W_b * x, c = W_c * x (depthwise, stride 1, padded to keep the size):

- quadratic: y = a b + c;
- mixer: y = x + q(LN(x)), with the quadratic operator q and LN over channels;
- nested: y = x + sum_k p_k q_k(LN(x)) over kernels k = 3, 5, .., whose weights are the centres of the
  largest kernel. It costs little more than the largest kernel alone: smaller kernels are partial sums.

The backward passes need only the inputs and recompute everything else. Tensors are float32 on the CPU, (B,
C, H, W). Results are in channels_last memory; inputs in another format are copied into it. Results are
bitwise the same for any number of threads (`torch.get_num_threads`). These functions do not use autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qnas.nn.kernels import native

MAX_KERNEL = 9
MAX_NESTED = 7


class Norm(NamedTuple):
    """A layer normalisation over channels: weight and bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-6


class Gradients(NamedTuple):
    """The gradients of `forward`'s inputs; None for those not needed and for absent inputs."""

    x: Tensor | None
    w_a: Tensor | None
    w_b: Tensor | None
    w_c: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    shares: Tensor | None


def is_supported(x: Tensor, kernel: int) -> bool:
    """Return whether the kernels are available and support this input and kernel size."""
    return _is_taken(x, kernel) and native.library() is not None


def _is_taken(x: Tensor, kernel: int) -> bool:
    if not (x.is_cpu and x.dtype == torch.float32 and x.ndim == 4):
        return False
    # taps further out than the map is wide only meet padding
    return kernel <= MAX_KERNEL or 2 * max(x.shape[2:]) - 1 <= MAX_KERNEL


def forward(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, norm: Norm | None = None, shares: Tensor | None = None
) -> Tensor:
    """Compute the operator, the mixer if `norm` is given, or the nested mixer if `shares` is given too.

    x and the result: (B, C, H, W); weights: (C, 1, k, k), k odd; shares: (k // 2,), p of the kernels 3, 5,
    .., k, with k at most 7.
    """
    x, inputs = _dense(x), _inputs(x, (w_a, w_b, w_c), norm, shares)
    y = torch.empty_like(x)
    if y.numel():
        sizes, eps = (*x.shape, w_a.shape[-1]), 0.0 if norm is None else norm.eps
        native.call("qnas_quadratic_forward", sizes, eps, [x, *inputs], [y])
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    norm: Norm | None = None,
    shares: Tensor | None = None,
    *,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> Gradients:
    """Return the gradients of `forward`'s inputs, given the gradient of its result.

    `needs_weights` refers to the weights and the norm. The gradient of the shares is always computed.
    """
    assert grad.shape == x.shape, f"grad must be {tuple(x.shape)}, got {tuple(grad.shape)}"
    grad, x, inputs = _dense(grad), _dense(x), _inputs(x, (w_a, w_b, w_c), norm, shares)
    # the norm's gradients follow from that of its output, which is stored in x's gradient
    through_x = needs_x or (needs_weights and norm is not None)
    new = torch.empty_like if x.numel() else torch.zeros_like
    parameters = [new(t) if needs_weights and t is not None else None for t in inputs[:-1]]
    to_shares = None if shares is None else new(shares)
    found = Gradients(*[new(x) if through_x else None, *parameters, to_shares])
    if x.numel():
        sizes, eps = (*x.shape, w_a.shape[-1]), 0.0 if norm is None else norm.eps
        native.call("qnas_quadratic_backward", sizes, eps, [x, *inputs, grad], found)
    return found if needs_x else found._replace(x=None)


def _inputs(
    x: Tensor, weights: tuple[Tensor, ...], norm: Norm | None, shares: Tensor | None
) -> list[Tensor | None]:
    """Check shapes and return the other inputs, contiguous: weights, norm's weight and bias, shares."""
    # written for speed: these lines take a tenth of a forward pass on a small map
    channels, kernel = x.shape[1], weights[0].shape[-1]
    expected = (channels, 1, kernel, kernel)
    for weight in weights:
        assert weight.shape == expected, f"weights must be {expected}, got {tuple(weight.shape)}"
    assert kernel % 2 == 1, f"the kernel must be odd, got {kernel}"
    assert _is_taken(x, kernel), f"no kernel of size {kernel} for {x.dtype} on {x.device}"
    vectors = (None, None) if norm is None else (norm.weight, norm.bias)
    for vector in vectors:
        assert vector is None or vector.shape == (channels,), f"vectors must be ({channels},)"
    if shares is not None:
        assert 3 <= kernel <= MAX_NESTED, f"nested kernels are 3 to {MAX_NESTED}, got {kernel}"
        assert shares.shape == (kernel // 2,), f"shares must be ({kernel // 2},), got {tuple(shares.shape)}"
    dense = []
    for tensor in (*weights, *vectors, shares):
        if tensor is not None:
            is_taken = tensor.dtype == torch.float32 and tensor.is_cpu
            assert is_taken, "inputs must be float32 on the CPU"
            tensor = tensor.contiguous()
        dense.append(tensor)
    return dense


def _dense(x: Tensor) -> Tensor:
    """Return x in dense channels_last memory, copied if necessary.

    The strides are compared, since torch leaves them ambiguous for maps of one position or one channel.
    """
    _, channels, height, width = x.shape
    if x.stride() == (height * width * channels, 1, width * channels, channels):
        return x
    return x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
