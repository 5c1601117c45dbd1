"""The mixer half of a QuadraBlock with layer normalisation, and both halves relaxed over all candidates.

The block is x1 = x + quadratic(LN(x)), then y = x1 + PW2(GELU(PW1(LN(x1)))), the half in pointwise.py.
Autograd keeps x and x1 and recomputes the rest in the backward pass. This takes 2 times the memory of x,
where the plain modules take 14.

Both halves relaxed over kernels, expansions and identity are one pass each, as candidates are nested: a
smaller kernel is the centre of the largest kernel, and a smaller expansion the leading hidden channels of the
largest one. The mixture of all mixers, x + s sum_k p_k q_k(LN(x)), is therefore computed from partial sums.
The mixture of all channel halves is one channel half with a gate on each hidden channel: the probability of
an expansion that has it, which is 1 for the channels of the smallest expansion. Both are scaled by s, the
share that is not identity. All gradients are exact, including those of the shares and gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnas.nn.kernels import mixer
from qnas.nn.kernels.lean_quadratic import depthwise, quadratic_backward, quadratic_forward
from qnas.nn.kernels.pointwise import channel_half

SMALLEST_KERNEL = 3  # smallest kernel for which the C++ kernel has partial sums


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
    return _run_mixer(*tensors, shares=None, eps=eps)


def _run_mixer(*tensors: Tensor, shares: Tensor | None, eps: float) -> Tensor:
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


def nested_mixer_half(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    shares: Tensor,
    kernels: Sequence[int],
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Return x + sum_k p_k q_k(LN(x)), with q_k the quadratic operator of the k x k centres of the weights.

    x: (B, C, H, W); norm weight and bias: (C,); w_a, w_b, w_c: (C, 1, K, K); kernels: odd sizes up to K;
    shares: p, (kernels,), of any sum. Returns (B, C, H, W). The C++ kernel, which has no second derivatives,
    serves float32 on the CPU with kernels from 3 to 7; torch's operators serve all other cases.
    """
    assert shares.shape == (len(kernels),), f"a share a kernel, got {tuple(shares.shape)} for {kernels}"
    largest = w_a.shape[-1]
    fits = min(kernels) >= SMALLEST_KERNEL and max(kernels) <= largest <= mixer.MAX_NESTED
    if fits and can_run(x) and mixer.is_supported(x, largest):
        places = torch.tensor([k // 2 - 1 for k in kernels])
        every = shares.new_zeros(largest // 2).index_add(0, places, shares)
        x = x.contiguous(memory_format=torch.channels_last)
        return _run_mixer(x, norm_weight, norm_bias, w_a, w_b, w_c, shares=every, eps=eps)
    normed = F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], norm_weight, norm_bias, eps)
    normed = normed.permute(0, 3, 1, 2)
    for share, kernel in zip(shares, kernels, strict=True):
        side = slice((largest - kernel) // 2, (largest + kernel) // 2)
        a, b, c = (depthwise(normed, w[..., side, side]) for w in (w_a, w_b, w_c))
        x = x + share * (a * b + c)
    return x


def nested_channel_half(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    gates: Tensor,
    share: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Return x + s (PW2(g . GELU(PW1(LN(x)))) + b), with a gate g for each hidden channel.

    Shapes as in `pointwise.channel_half`; gates: (E,); share: s, a scalar. Gates and share are folded into
    PW2, and their gradients follow from PW2's.
    """
    project = project_weight * (share * gates)[:, None, None]
    shift = share * project_bias
    if can_run(x):
        return channel_half(x, norm_weight, norm_bias, expand_weight, expand_bias, project, shift, eps=eps)
    normed = F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], norm_weight, norm_bias, eps)
    hidden = F.gelu(F.conv2d(normed.permute(0, 3, 1, 2), expand_weight, expand_bias))
    return x + F.conv2d(hidden, project, shift)
