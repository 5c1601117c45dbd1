"""The two halves of a QuadraBlock relaxed over kernels, expansions and identity, in one pass each.

Candidates are nested: a smaller kernel is the centre of the largest kernel, and a smaller expansion the
leading hidden channels of the largest one. The mixture of all mixers, x + s sum_k p_k q_k(LN(x)), is
therefore computed from partial sums in one pass. The mixture of all channel halves is one channel half with
a gate on each hidden channel: the probability of an expansion that has it, which is 1 for the channels of
the smallest expansion. Both are scaled by s, the share that is not identity. All gradients are exact,
including those of the shares and gates.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.nn.kernels import mixer
from qnas.nn.kernels.block import can_run, run_mixer
from qnas.nn.kernels.pointwise import channel_half

SMALLEST_KERNEL = 3  # smallest kernel for which the C++ kernel has partial sums


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
        return run_mixer(x, norm_weight, norm_bias, w_a, w_b, w_c, shares=every, eps=eps)
    normed = F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], norm_weight, norm_bias, eps)
    normed = normed.permute(0, 3, 1, 2)
    for share, kernel in zip(shares, kernels, strict=True):
        cut = (largest - kernel) // 2
        a, b, c = (
            F.conv2d(
                normed, w[..., cut : largest - cut, cut : largest - cut], None, 1, kernel // 2, 1, len(w)
            )
            for w in (w_a, w_b, w_c)
        )
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
