"""Inverted residuals that train fast on a CPU: all layers of one as a single operation.

With torch's modules, most of a training step is memory traffic of norms and activations on maps of six times
the channels. The C++ kernels (`kernels.inverted`) pass over each map once. A block runs there while its batch
norms use the statistics of the batch; otherwise, and where anything else is unusual, its modules run one by
one. benchmarks/block.py compares a training step with that of torch's own modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qnas.nn.depthwise import DepthwiseConv2d
from qnas.nn.kernels import inverted
from qnas.nn.kernels.block import can_run
from qnas.nn.kernels.inverted import Kept, Options, Weights
from qnas.nn.padding import SameConv2d
from qnas.nn.quadratic import differentiable_gradients, is_watched
from qnas.spaces.layer import same_pads

NORMS = ("norm1", "norm2", "norm3")
EXPANSION, REST = ("expand", "norm1", "act1"), ("depthwise", "norm2", "act2", "project", "norm3")
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU6: "relu6", nn.ReLU: "relu", nn.Hardswish: "hswish"}

# The padding before a map (above or to the left) by size, kernel and stride, for each class of depthwise
# convolutions whose result has ceil(size / stride) rows.
PADDINGS: dict[type[nn.Conv2d], Callable[[int, int, int], int]] = {
    DepthwiseConv2d: lambda size, kernel, stride: kernel // 2,
    SameConv2d: lambda size, kernel, stride: same_pads(size, kernel, stride)[0],
}


def run_fused(
    block: nn.Sequential, x: Tensor, norm_type: type[nn.BatchNorm2d], is_residual: bool
) -> Tensor | None:
    """Run the layers of an inverted residual as one operation; return None where only its modules can run.

    x: (B, C, H, W). Norms must be of exactly `norm_type`, which has `track(mean, variance, count)`. Their
    running statistics are updated as by the modules.
    """
    layers = cast(Mapping[str, nn.Module], block._modules)
    last = layers.get("norm3")
    if last is None or not last.training or not can_run(x) or is_watched() or dist.is_initialized():
        return None
    if tuple(layers) not in (REST, EXPANSION + REST) or any(map(_is_hooked, layers.values())):
        return None
    norms = [cast(nn.BatchNorm2d, layers[name]) for name in NORMS if name in layers]
    if not all(type(norm) is norm_type and norm.training and norm.affine for norm in norms):
        return None
    if len({norm.eps for norm in norms}) > 1:
        return None
    options, weights = _options(layers, x, norms[0].eps, is_residual), _weights(layers)
    if options is None or not _fits(x, weights, options):
        return None
    y, *statistics = _run(x, weights, options)
    count = y.numel() // y.shape[1]
    for i, norm in enumerate(reversed(norms)):  # without an expansion, there is no first one
        mean, variance = statistics[4 - 2 * i : 6 - 2 * i]
        if norm.track_running_stats and norm.running_mean is not None:
            cast(Any, norm).track(mean, variance, x.numel() // x.shape[1] if i == 2 else count)
    return y


def _is_hooked(layer: nn.Module) -> bool:
    """Return whether anyone follows this layer's runs."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def _options(layers: Mapping[str, nn.Module], x: Tensor, eps: float, is_residual: bool) -> Options | None:
    """Return the options; None where the kernels serve no such convolutions or activations."""
    pointwise = [cast(nn.Conv2d, layers[name]) for name in ("expand", "project") if name in layers]
    conv = cast(nn.Conv2d, layers["depthwise"])
    kinds = {type(layers[name]) for name in ("act1", "act2") if name in layers}
    activation = ACTIVATIONS.get(kinds.pop()) if len(kinds) == 1 else None
    before = PADDINGS.get(type(conv))
    if activation is None or before is None or conv.bias is not None or not all(map(_is_plain, pointwise)):
        return None
    top, left = (before(size, conv.kernel_size[0], conv.stride[0]) for size in x.shape[2:])
    return Options(conv.stride[0], (top, left), activation, eps, is_residual)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Return whether this is a pointwise convolution without a bias."""
    if type(conv) is not nn.Conv2d or conv.bias is not None:
        return False
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _weights(layers: Mapping[str, nn.Module]) -> Weights:
    found: dict[str, Any] = dict.fromkeys(Weights._fields)
    for name, layer in layers.items():
        if name in NORMS:
            found[f"{name}_weight"], found[f"{name}_bias"] = layer.weight, layer.bias
        elif name in found:
            found[name] = layer.weight
    return Weights(**found)


def _fits(x: Tensor, weights: Weights, options: Options) -> bool:
    """Return whether the kernels serve these tensors."""
    channels = len(weights.depthwise) if weights.expand is None else weights.expand.shape[1]
    places = len(x) * -(-x.shape[2] // options.stride) * -(-x.shape[3] // options.stride)
    return (
        x.shape[1] == channels
        and places > 1  # torch's norm refuses a single value
        and all(t is None or type(t) in (Tensor, nn.Parameter) for t in weights)
        and inverted.is_supported(x, weights, options)
    )


def _run(x: Tensor, weights: Weights, options: Options) -> tuple[Tensor, ...]:
    """Return y, and the mean and the biased variance of each norm."""
    if torch.is_grad_enabled():
        found: tuple[Tensor, ...] = _Inverted.apply(options, x, *weights)
        return found
    y, kept = inverted.forward(x, weights, options)
    return cast(tuple[Tensor, ...], (y, *kept[3:]))


class _Inverted(torch.autograd.Function):
    """The block with a backward pass by the kernels; its other results are the norms' statistics."""

    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, *parameters: Any) -> tuple[Tensor | None, ...]:
        y, kept = inverted.forward(x, Weights(*parameters), options)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in kept[3:] if t is not None))
        ctx.save_for_backward(x, *parameters, *kept)
        return (y, *kept[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved: Sequence[Any] = ctx.saved_tensors
        inputs, kept = saved[:10], Kept(*saved[10:])
        x, weights, needed = inputs[0], Weights(*inputs[1:]), ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needed))
        if torch.is_grad_enabled():  # create_graph: only torch's operators have second derivatives
            y = inverted.reference(x, weights, ctx.options)
            return (None, *differentiable_gradients(y, inputs, grad, needed))
        return (None, *inverted.backward(grad, x, weights, ctx.options, kept, needed))
