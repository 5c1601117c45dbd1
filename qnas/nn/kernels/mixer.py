"""The quadratic operator and the mixers made of it, by the C++ kernels: plain functions of tensors.

With a = W_a * x, b = W_b * x, c = W_c * x (depthwise, stride 1, padded to keep the size):

- quadratic: y = a b + c;
- mixer: y = x + q(LN(x)), q the quadratic operator with a bias of c, LN over channels;
- nested: y = x + sum_k p_k q_k(LN(x)) over the kernels k = 3, 5, .. whose weights are the centres of
  one largest kernel. Its cost is near that of the largest alone: smaller kernels are partial sums.

The backward passes take x alone and compute everything else anew. Tensors are float32 on the CPU, (B, C,
H, W); others than channels_last ones are copied into that format, which results have. Results are
the same bit for bit for any number of threads (`torch.get_num_threads`). No autograd here.
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qnas.nn.kernels.native import Signature, library

MAX_KERNEL = 9
MAX_NESTED = 7
_SIZES = ctypes.c_int64 * 6
_POINTER = ctypes.c_void_p
_FORWARD = (_POINTER,) * 8 + (ctypes.c_float,) + (_POINTER,) * 2
_BACKWARD = (_POINTER,) * 9 + (ctypes.c_float,) + (_POINTER,) * 9


class Norm(NamedTuple):
    """A layer normalisation over channels: weight and bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-6


class MixerGradients(NamedTuple):
    """Gradients of a mixer's inputs, each of its input's shape; None where not needed or no input."""

    x: Tensor | None
    w_a: Tensor | None
    w_b: Tensor | None
    w_c: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def is_supported(x: Tensor, kernel: int) -> bool:
    """Say whether the kernels can be had, and take this input and kernel size."""
    return _is_taken(x, kernel) and library() is not None


def _is_taken(x: Tensor, kernel: int) -> bool:
    if not (x.is_cpu and x.dtype == torch.float32 and x.ndim == 4):
        return False
    # what lies beyond the map's reach meets nothing but padding
    return kernel <= MAX_KERNEL or 2 * max(x.shape[2:]) - 1 <= MAX_KERNEL


def quadratic_forward(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor) -> Tensor:
    """Return a b + c, (B, C, H, W), for weights (C, 1, k, k) with k odd."""
    return _forward(x, (w_a, w_b, w_c), None, None, None)


def quadratic_backward(
    grad: Tensor,
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    *,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x and of the three weights; None for those that are not needed."""
    got = _backward(grad, x, (w_a, w_b, w_c), None, None, None, needs_x, needs_weights)
    return got.x, got.w_a, got.w_b, got.w_c


def mixer_forward(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None, norm: Norm
) -> Tensor:
    """Return x + q(LN(x)), (B, C, H, W); bias (C,) is that of c."""
    return _forward(x, (w_a, w_b, w_c), bias, norm, None)


def mixer_backward(
    grad: Tensor,
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    bias: Tensor | None,
    norm: Norm,
    *,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> MixerGradients:
    """Return the gradients of `mixer_forward`'s inputs; `needs_weights` is for all of them but x."""
    got = _backward(grad, x, (w_a, w_b, w_c), bias, norm, None, needs_x, needs_weights)
    return MixerGradients(*got[:-1])


def nested_forward(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None, norm: Norm, shares: Tensor
) -> Tensor:
    """Return x + sum_k p_k q_k(LN(x)), (B, C, H, W).

    shares: p, a number for each of the kernels 3, 5, .., up to that of the weights, which is at most
    7; q_k takes the k x k centres of the weights, and all of the bias.
    """
    return _forward(x, (w_a, w_b, w_c), bias, norm, shares)


def nested_backward(
    grad: Tensor,
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    bias: Tensor | None,
    norm: Norm,
    shares: Tensor,
    *,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> tuple[MixerGradients, Tensor]:
    """Return the gradients of `nested_forward`'s inputs, the last one that of the shares.

    The shares' is always computed; `needs_weights` is for all others but x's.
    """
    got = _backward(grad, x, (w_a, w_b, w_c), bias, norm, shares, needs_x, needs_weights)
    assert got.shares is not None
    return MixerGradients(*got[:-1]), got.shares


class _Gradients(NamedTuple):
    x: Tensor | None
    w_a: Tensor | None
    w_b: Tensor | None
    w_c: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    shares: Tensor | None


Weights = tuple[Tensor, Tensor, Tensor]


def _forward(
    x: Tensor, weights: Weights, bias: Tensor | None, norm: Norm | None, shares: Tensor | None
) -> Tensor:
    x, inputs = _dense(x), _inputs(x, weights, bias, norm, shares)
    y = torch.empty_like(x)
    if y.numel():
        eps = 0.0 if norm is None else norm.eps
        _functions()[0](_sizes(x, weights), _at(x), *map(_at, inputs[:-1]), eps, _at(inputs[-1]), _at(y))
    return y


def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    bias: Tensor | None,
    norm: Norm | None,
    shares: Tensor | None,
    needs_x: bool,
    needs_weights: bool,
) -> _Gradients:
    assert grad.shape == x.shape, f"grad must be {tuple(x.shape)}, got {tuple(grad.shape)}"
    grad, x, inputs = _dense(grad), _dense(x), _inputs(x, weights, bias, norm, shares)
    # the norm's own gradients come from that of its output, which lies where x's will
    through_x = needs_x or (needs_weights and norm is not None)
    # contiguous: weights in channels_last memory are no matter
    parameters = [torch.empty_like(t) if needs_weights and t is not None else None for t in inputs[:-1]]
    to_x = torch.empty_like(x) if through_x else None
    to_shares = None if shares is None else torch.empty_like(shares)
    got = _Gradients(*[to_x, *parameters, to_shares])
    if x.numel() == 0:
        for tensor in got:
            if tensor is not None:
                tensor.zero_()
        return got if needs_x else got._replace(x=None)
    eps = 0.0 if norm is None else norm.eps
    arguments = (_sizes(x, weights), _at(grad), _at(x), *map(_at, inputs[:-1]), eps, _at(inputs[-1]))
    _functions()[1](*arguments, *map(_at, got))
    return got if needs_x else got._replace(x=None)


def _inputs(
    x: Tensor, weights: Weights, bias: Tensor | None, norm: Norm | None, shares: Tensor | None
) -> list[Tensor | None]:
    """Check shapes and return all inputs but x, dense: weights, bias, norm's weight and bias, shares."""
    # loops and early exits: these lines are a tenth of a forward pass on a small map
    channels, kernel = x.shape[1], weights[0].shape[-1]
    expected = (channels, 1, kernel, kernel)
    for weight in weights:
        assert weight.shape == expected, f"weights must be {expected}, got {tuple(weight.shape)}"
    assert kernel % 2 == 1, f"the kernel must be odd, got {kernel}"
    assert _is_taken(x, kernel), f"no kernel of size {kernel} for {x.dtype} on {x.device}"
    everything = (*weights, bias, None if norm is None else norm.weight, None if norm is None else norm.bias)
    for vector in everything[3:]:
        assert vector is None or vector.shape == (channels,), f"vectors must be ({channels},)"
    if shares is not None:
        assert 3 <= kernel <= MAX_NESTED, f"nested kernels are 3 to {MAX_NESTED}, got {kernel}"
        assert shares.shape == (kernel // 2,), f"shares must be ({kernel // 2},), got {tuple(shares.shape)}"
    dense = []
    for tensor in (*everything, shares):
        if tensor is not None:
            is_taken = tensor.dtype == torch.float32 and tensor.is_cpu
            assert is_taken, "inputs must be float32 on the CPU"
            tensor = tensor.contiguous()
        dense.append(tensor)
    return dense


def _dense(x: Tensor) -> Tensor:
    """Return x with its channels side by side and places in order, the memory of channels_last.

    A map of one place or one channel is contiguous both ways, and torch leaves its strides ambiguous.
    """
    _, channels, height, width = x.shape
    if x.stride() == (height * width * channels, 1, width * channels, channels):
        return x
    return x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _sizes(x: Tensor, weights: Weights) -> ctypes.Array[ctypes.c_int64]:
    batch, channels, height, width = x.shape
    return _SIZES(batch, height, width, channels, weights[0].shape[-1], torch.get_num_threads())


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=1)
def _functions() -> tuple[Signature, Signature]:
    native = library()
    assert native is not None, "ask is_supported first"
    return (
        native.function("qnas_quadratic_forward", *_FORWARD),
        native.function("qnas_quadratic_backward", *_BACKWARD),
    )


__all__ = [
    "MixerGradients",
    "Norm",
    "is_supported",
    "mixer_backward",
    "mixer_forward",
    "nested_backward",
    "nested_forward",
    "quadratic_backward",
    "quadratic_forward",
]
