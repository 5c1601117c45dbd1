"""The channel half of a QuadraBlock, y = x + PW2(GELU(PW1(LN(x)))), with little memory.

A channels_last map is a matrix of pixels by channels, and both pointwise convolutions are matrix products.
They run over chunks of rows whose expanded activation stays in cache. Autograd keeps only x: the backward
pass recomputes the normalisation and the expanded activation. This costs one of six matrix products and
needs ten times less memory.

The scale s and shift t of the normalisation are folded into PW1: PW1(LN(x)) = (W1 diag(s)) n + (W1 t + b1)
with the normalised rows n. This saves a pass over the rows in the forward pass, and two reductions over
pixels in the backward pass.

The half is one C++ call (pointwise.cpp) if the C++ kernels could be built, and torch's operators otherwise.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnas.nn.kernels import native

# Rows of a chunk with torch's operators: few enough that the expanded activation stays in cache, but enough
# for the weight gradients, read and written once per chunk (half and double of either: 0 to 5% slower).
CHUNK_ACTIVATIONS = 200_000
CHUNK_ROWS = 512


def channel_half(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Return x + PW2(GELU(PW1(LN(x)))), with LN over channels and the GELU of `nn.GELU()`.

    x: (B, C, H, W), copied into channels_last memory if necessary; norm weight and bias, project bias: (C,);
    expand weight: (E, C, 1, 1), its bias (E,); project weight: (C, E, 1, 1). All of one floating dtype.
    Returns (B, C, H, W) in channels_last memory. There are no second derivatives.
    """
    arguments = (x, norm_weight, norm_bias, expand_weight, expand_bias, project_weight, project_bias)
    channels, hidden = x.shape[1], expand_weight.shape[0]
    assert expand_weight.shape == (hidden, channels, 1, 1), "expand weight must be (E, C, 1, 1)"
    assert project_weight.shape == (channels, hidden, 1, 1), "project weight must be (C, E, 1, 1)"
    assert len({t.dtype for t in arguments}) == 1, "all arguments must have one dtype"
    if not torch.is_grad_enabled():
        return _forward(x, arguments[1:], eps)
    y: Tensor = _ChannelHalf.apply(*arguments, eps)
    return y


class _ChannelHalf(torch.autograd.Function):
    """The channel half with a backward pass that needs x and the parameters only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *parameters, ctx.eps = rest
        ctx.save_for_backward(x, *parameters)
        return _forward(x, parameters, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # an architecture step needs neither; with nested weights, only the second
        wanted = any(needed[1:5]), any(needed[5:7])
        backward = _native_backward if _is_native(x) else _torch_backward
        grad_x, *gradients = backward(_rows(grad), _rows(x), parameters, ctx.eps, *wanted)
        assert grad_x is not None
        return (_map(grad_x, x), *gradients, None)


Parameters = Sequence[Tensor]  # in the order of `channel_half`


def _forward(x: Tensor, parameters: Parameters, eps: float) -> Tensor:
    forward = _native_forward if _is_native(x) else _torch_forward
    return _map(forward(_rows(x), parameters, eps), x)


def _is_native(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and native.library() is not None


def _native_forward(rows: Tensor, parameters: Parameters, eps: float) -> Tensor:
    """Return y, (rows, C)."""
    y = torch.empty_like(rows)
    parameters = [p.contiguous() for p in parameters]
    if len(rows):
        native.call(
            "qnas_pointwise_forward", (*rows.shape, len(parameters[2])), eps, [rows, *parameters], [y]
        )
    return y


def _native_backward(
    grad: Tensor, rows: Tensor, parameters: Parameters, eps: float, expand_too: bool, project_too: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, (rows, C), and of the parameters; None for those not wanted."""
    parameters = [p.contiguous() for p in parameters]
    wanted = [expand_too] * 4 + [project_too] * 2
    # the kernel writes all elements, but is not called without rows
    new = torch.empty_like if len(rows) else torch.zeros_like
    found = (new(rows), *(new(p) if w else None for p, w in zip(parameters, wanted, strict=True)))
    if len(rows):
        sizes = (*rows.shape, len(parameters[2]))
        native.call("qnas_pointwise_backward", sizes, eps, [rows, *parameters, grad], found)
    return found


def _torch_forward(rows: Tensor, parameters: Parameters, eps: float) -> Tensor:
    """Return y, (rows, C), on any device and in any floating dtype."""
    norm_weight, norm_bias, expand_weight, expand_bias, project_weight, project_bias = parameters
    expand, shift = _fold_norm(norm_weight, norm_bias, expand_weight, expand_bias)
    project = project_weight.flatten(1)
    hidden = len(expand)
    size = _chunk_rows(len(rows), hidden)
    y = torch.empty_like(rows)
    activated_rows = rows.new_empty(min(size, len(rows)), hidden)
    for part, part_y in _chunks(size, rows, y):
        activated = activated_rows[: len(part)]
        normed, _, _ = torch.native_layer_norm(part, [part.shape[1]], None, None, eps)
        torch.addmm(shift, normed, expand.t(), out=activated)
        torch.ops.aten.gelu.out(activated, out=activated)
        torch.add(part, project_bias, out=part_y)
        part_y.addmm_(activated, project.t())
    return y


def _torch_backward(
    grad: Tensor, rows: Tensor, parameters: Parameters, eps: float, expand_too: bool, project_too: bool
) -> tuple[Tensor | None, ...]:
    """Return the same as `_native_backward`."""
    norm_weight, norm_bias, expand_weight, expand_bias, project_weight, _ = parameters
    expand, shift = _fold_norm(norm_weight, norm_bias, expand_weight, expand_bias)
    project = project_weight.flatten(1)
    hidden, channels = expand.shape
    size = _chunk_rows(len(rows), hidden)
    grad_x = torch.empty_like(rows)
    # Both weight gradients are summed as (C, E): this product is 10% faster than its transpose.
    grad_expand, grad_project = rows.new_zeros(channels, hidden), rows.new_zeros(channels, hidden)
    grad_shift = rows.new_zeros(hidden)
    activated_rows, slope_rows = (rows.new_empty(min(size, len(rows)), hidden) for _ in range(2))
    for part, part_y, part_x in _chunks(size, rows, grad, grad_x):
        activated, slope = activated_rows[: len(part)], slope_rows[: len(part)]
        normed, _, rstd = torch.native_layer_norm(part, [channels], None, None, eps)
        torch.addmm(shift, normed, expand.t(), out=activated)
        torch.mm(part_y, project, out=slope)  # gradient of GELU's output
        torch.ops.aten.gelu_backward.grad_input(slope, activated, grad_input=slope)  # now of its input
        torch.ops.aten.gelu.out(activated, out=activated)
        if project_too:
            grad_project.addmm_(part_y.t(), activated)
        if expand_too:
            grad_shift += slope.sum(0)
            grad_expand.addmm_(normed.t(), slope)
        _normalise_backward(part_y, torch.mm(slope, expand), normed, rstd, part_x)
    of_project = (grad_project.view_as(project_weight), grad.sum(0)) if project_too else (None, None)
    if not expand_too:
        return (grad_x, *[None] * 4, *of_project)
    folded = grad_expand.t().contiguous()  # of W1 diag(s), (E, C)
    matrix = expand_weight.flatten(1)
    grad_norm_weight, grad_norm_bias = (matrix * folded).sum(0), torch.mv(matrix.t(), grad_shift)
    return (
        grad_x,
        grad_norm_weight,
        grad_norm_bias,
        folded.mul_(norm_weight).addr_(grad_shift, norm_bias).view_as(expand_weight),
        grad_shift,
        *of_project,
    )


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), a view where the memory is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) -> (B, C, H, W), a view in channels_last memory."""
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield `size` rows of each tensor at a time; the last may have fewer."""
    return zip(*(torch.split(t, size) for t in tensors), strict=True)


def _chunk_rows(rows: int, hidden: int) -> int:
    """Return the number of rows of a chunk. All chunks have about the same number."""
    most = max(CHUNK_ROWS, CHUNK_ACTIVATIONS // hidden)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _fold_norm(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return W1 diag(s), (E, C), and W1 t + b1, (E,)."""
    matrix = weight.flatten(1)
    return matrix * norm_weight, torch.addmv(bias, matrix, norm_bias)


def _normalise_backward(
    grad_y: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, to: Tensor
) -> None:
    """Write into `to` the sum of grad_y and the gradient through the normalisation."""
    # differentiate at the normalised rows, with mean 0 and rstd 1; the factor rstd follows
    mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    through = torch.ops.aten.native_layer_norm_backward(
        grad_normed, normed, [normed.shape[1]], mean, one, None, None, [True, False, False]
    )[0]
    torch.addcmul(grad_y, through, rstd, out=to)
