"""The mixer half of a QuadraBlock with layer normalisation, of which autograd keeps only the input.

The block is x1 = x + quadratic(LN(x)), then y = x1 + PW2(GELU(PW1(LN(x1)))), the half in pointwise.py.
Autograd keeps x and x1 and recomputes the rest in the backward pass. This takes 2 times the memory of x,
where the plain modules take 14.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnas.nn.kernels import mixer
from qnas.nn.kernels.lean_quadratic import quadratic_backward, quadratic_forward


def can_run(x: Tensor) -> bool:
    """Return whether the halves accept x: float32 on a CPU, not traced, compiled or under autocast."""
    return (
        type(x) is Tensor  # not a tensor subclass of a tracer or compiler
        and x.ndim == 4
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch.is_autocast_enabled("cpu")
    )


def mixer_half(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Return x + (w_a * n) . (w_b * n) + w_c * n with n = LN(x), normalised over channels.

    x: (B, C, H, W), copied into channels_last memory if necessary; norm weight and bias: (C,); w_a, w_b, w_c:
    (C, 1, k, k) with k odd. Returns (B, C, H, W) in channels_last memory. There are no second derivatives.
    """
    tensors = (x.contiguous(memory_format=torch.channels_last), norm_weight, norm_bias, w_a, w_b, w_c)
    return run_mixer(*tensors, shares=None, eps=eps)


def run_mixer(*tensors: Tensor, shares: Tensor | None, eps: float) -> Tensor:
    """Run `mixer_half`, or with `shares` the mixture of nested kernels, which exists in C++ only."""
    if not torch.is_grad_enabled():
        return _forward(tensors, shares, eps)
    y: Tensor = _MixerHalf.apply(*tensors, shares, eps)
    return y


class _MixerHalf(torch.autograd.Function):
    """The mixer half with a backward pass that needs x and the parameters only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, shares, ctx.eps = arguments
        ctx.save_for_backward(*tensors, shares)
        return _forward(tensors, shares, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, shares = ctx.saved_tensors
        x, norm_weight, norm_bias, w_a, w_b, w_c = tensors
        needed = ctx.needs_input_grad
        if not mixer.is_supported(x, w_a.shape[-1]):
            return (*_torch_backward(grad, tensors, ctx.eps, needed), None, None)
        norm = mixer.Norm(norm_weight, norm_bias, ctx.eps)
        needs_weights = any(needed[1:6])  # false in an architecture step
        got = mixer.backward(
            grad, x, w_a, w_b, w_c, norm, shares, needs_x=needed[0], needs_weights=needs_weights
        )
        return (got.x, got.norm_weight, got.norm_bias, got.w_a, got.w_b, got.w_c, got.shares, None)


def _forward(tensors: Sequence[Tensor], shares: Tensor | None, eps: float) -> Tensor:
    x, norm_weight, norm_bias, w_a, w_b, w_c = tensors
    if mixer.is_supported(x, w_a.shape[-1]):
        return mixer.forward(x, w_a, w_b, w_c, mixer.Norm(norm_weight, norm_bias, eps), shares)
    assert shares is None, "the mixture of nested kernels has no other form"
    normed = _layer_norm(x, norm_weight, norm_bias, eps)[0]
    return quadratic_forward(normed, w_a, w_b, w_c)[0].add_(x)


def _torch_backward(
    grad: Tensor, tensors: Sequence[Tensor], eps: float, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and of the five parameters, None where not `needed`."""
    x, norm_weight, norm_bias, w_a, w_b, w_c = tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    normed, mean, rstd = _layer_norm(x, norm_weight, norm_bias, eps)
    through_norm = any(needed[:3])
    inner, *weights = quadratic_backward(grad, normed, w_a, w_b, w_c, (through_norm, *needed[3:6]))
    if inner is None:
        return (None, None, None, *weights)
    grad_x, *norm = torch.ops.aten.native_layer_norm_backward(
        inner.permute(0, 2, 3, 1),
        x.permute(0, 2, 3, 1),
        [x.shape[1]],
        mean,
        rstd,
        norm_weight,
        norm_bias,
        list(needed[:3]),
    )
    if needed[0]:
        grad_x = grad_x.permute(0, 3, 1, 2).add_(grad)
    return (*(g if n else None for g, n in zip((grad_x, *norm), needed, strict=False)), *weights)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return LN(x) over channels, (B, C, H, W), the means, and the reciprocal standard deviations."""
    normed, mean, rstd = torch.native_layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], weight, bias, eps)
    return normed.permute(0, 3, 1, 2), mean, rstd
