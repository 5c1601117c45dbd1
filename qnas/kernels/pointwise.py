"""The channel half of a QuadraBlock, y = x + PW2(GELU(PW1(LN(x)))), lean in memory.

A channels_last map is a matrix of pixels by channels, and both pointwise convolutions are products with
it. They run over chunks of rows whose expanded activation stays in cache. Autograd keeps x alone:
normalisation and expanded activation are computed again in the backward pass, one product of six more, in
exchange for ten times less memory; wide maps may keep the activation (`is_worth_recomputing`).

The scale and shift of the normalisation enter PW1's weights, PW1(LN(x)) = (W1 diag(s)) n + (W1 t + b1)
with n the normalised rows, which spares a pass forward and both of its reductions over pixels backward.

What lies between the products is C++ (pointwise.cpp) where it could be built, torch's operators elsewhere.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnas.kernels import native

# Rows of a chunk: expanded activations that stay in cache, but enough rows for a weight gradient, which is
# read and written once a chunk (half and double of either: 0 to 5% slower).
CHUNK_ACTIVATIONS = 200_000
CHUNK_ROWS = 512

# Where the products are nearly all of the time, one more of them is a seventh of it: from this width on
# the C++ form keeps the expanded activation up to this size, unless it is told otherwise.
WIDE_CHANNELS = 256
KEPT_BYTES = 64 << 20


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
    recompute: bool | None = True,
) -> Tensor:
    """Return x + PW2(GELU(PW1(LN(x)))), with LN over channels and the GELU of `nn.GELU()`.

    x: (B, C, H, W), brought to channels_last memory if it is not; norm weight and bias, project bias: (C,);
    expand weight: (E, C, 1, 1), its bias (E,); project weight: (C, E, 1, 1). All of one floating dtype.
    Returns (B, C, H, W) in channels_last memory. With recompute off the expanded activation, (B, E, H, W),
    is kept for the backward pass; None chooses (`is_worth_recomputing`), and results are the same bits
    either way. The gradient itself is not differentiable.
    """
    arguments = (x, norm_weight, norm_bias, expand_weight, expand_bias, project_weight, project_bias)
    channels, hidden = x.shape[1], expand_weight.shape[0]
    assert expand_weight.shape == (hidden, channels, 1, 1), "expand weight must be (E, C, 1, 1)"
    assert project_weight.shape == (channels, hidden, 1, 1), "project weight must be (C, E, 1, 1)"
    assert len({t.dtype for t in arguments}) == 1, "all arguments must have one dtype"
    if not torch.is_grad_enabled():
        return _forward(*arguments, eps=eps)
    if recompute is None:
        recompute = is_worth_recomputing(x, hidden)
    y: Tensor = _ChannelHalf.apply(*arguments, eps, recompute)
    return y


def is_worth_recomputing(x: Tensor, hidden: int) -> bool:
    """Say whether the expanded activation of x, (B, C, H, W), with so many channels is better not kept."""
    is_small = x.shape[1] >= WIDE_CHANNELS and x.numel() // x.shape[1] * hidden * 4 <= KEPT_BYTES
    return not (is_small and _kernels(x) is not None)


class Elementwise(Protocol):
    """What lies between the products, on rows: (rows, C) or (rows, hidden), dense."""

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x - mean) / sqrt(variance + eps) of each row, and the reciprocal roots, (rows, 1)."""

    def gelu(self, h: Tensor, activated: Tensor) -> None:
        """Write GELU(h), which may be h itself."""

    def gelu_backward(self, h: Tensor, activated: Tensor, grad: Tensor) -> Tensor:
        """Write GELU(h), which may be h itself, turn its gradient into h's; return that's column sums."""

    def normalise_backward(
        self, grad_y: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, grad_x: Tensor
    ) -> None:
        """Write grad_y + the gradient through the normalisation."""


@dataclass(frozen=True)
class TorchElementwise:
    """Torch's operators: every device and floating dtype."""

    eps: float

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See Elementwise."""
        normed, _, rstd = torch.native_layer_norm(x, [x.shape[1]], None, None, self.eps)
        return normed, rstd

    def gelu(self, h: Tensor, activated: Tensor) -> None:
        """See Elementwise."""
        torch.ops.aten.gelu.out(h, out=activated)

    def gelu_backward(self, h: Tensor, activated: Tensor, grad: Tensor) -> Tensor:
        """See Elementwise."""
        torch.ops.aten.gelu_backward.grad_input(grad, h, grad_input=grad)
        torch.ops.aten.gelu.out(h, out=activated)
        return grad.sum(0)

    def normalise_backward(
        self, grad_y: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, grad_x: Tensor
    ) -> None:
        """See Elementwise."""
        # the normalised rows have mean 0: as input they only lack the factor that rstd is
        result = torch.ops.aten.native_layer_norm_backward(
            grad_normed,
            normed,
            [normed.shape[1]],
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            None,
            None,
            [True, False, False],
        )[0]
        torch.addcmul(grad_y, result, rstd, out=grad_x)


@dataclass(frozen=True)
class NativeElementwise:
    """The C++ kernels: float32 on the CPU."""

    eps: float
    functions: dict[str, Callable[..., Any]]
    threads: int

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See Elementwise."""
        normed, rstd = torch.empty_like(x), x.new_empty(len(x), 1)
        self.functions["norm"](
            x.data_ptr(), *x.shape, self.eps, normed.data_ptr(), rstd.data_ptr(), self.threads
        )
        return normed, rstd

    def gelu(self, h: Tensor, activated: Tensor) -> None:
        """See Elementwise."""
        self.functions["gelu"](h.data_ptr(), activated.data_ptr(), h.numel(), self.threads)

    def gelu_backward(self, h: Tensor, activated: Tensor, grad: Tensor) -> Tensor:
        """See Elementwise."""
        sums = h.new_zeros(h.shape[1])
        pointers = (h.data_ptr(), activated.data_ptr(), grad.data_ptr())
        self.functions["gelu_backward"](*pointers, *h.shape, sums.data_ptr(), self.threads)
        return sums

    def normalise_backward(
        self, grad_y: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor, grad_x: Tensor
    ) -> None:
        """See Elementwise."""
        rows = (grad_y, grad_normed, normed, rstd)
        self.functions["norm_backward"](
            *(t.data_ptr() for t in rows), *normed.shape, grad_x.data_ptr(), self.threads
        )


_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "norm": (_POINTER, _COUNT, _COUNT, ctypes.c_float, _POINTER, _POINTER, _THREADS),
    "gelu": (_POINTER, _POINTER, _COUNT, _THREADS),
    "gelu_backward": (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _THREADS),
    "norm_backward": (*[_POINTER] * 4, _COUNT, _COUNT, _POINTER, _THREADS),
}


@lru_cache(maxsize=1)
def _functions(library: native.Native) -> dict[str, Callable[..., Any]]:
    return {
        name: library.function(f"qnas_pointwise_{name}", *signature) for name, signature in SIGNATURES.items()
    }


def _kernels(x: Tensor) -> native.Native | None:
    return native.library() if x.is_cpu and x.dtype == torch.float32 else None


def _elementwise(x: Tensor, eps: float) -> Elementwise:
    library = _kernels(x)
    if library is None:
        return TorchElementwise(eps)
    return NativeElementwise(eps, _functions(library), torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), a view where the memory is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) -> (B, C, H, W) in channels_last memory, a view."""
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield `size` rows of each tensor at a time; the last may have fewer."""
    return zip(*(torch.split(t, size) for t in tensors), strict=True)


def _chunk_rows(rows: int, hidden: int) -> int:
    """Return the rows of a chunk, such that all chunks have about the same."""
    most = max(CHUNK_ROWS, CHUNK_ACTIVATIONS // hidden)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _fold_norm(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return W1 diag(s), (E, C), and W1 t + b1, (E,)."""
    matrix = weight.flatten(1)
    return matrix * norm_weight, torch.addmv(bias, matrix, norm_bias)


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    eps: float,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute the half; `keep`, (rows, E), takes the expanded activation before GELU where it is given."""
    parts = _elementwise(x, eps)
    rows = _rows(x)
    expand, shift = _fold_norm(norm_weight, norm_bias, expand_weight, expand_bias)
    project = project_weight.flatten(1)
    hidden = len(expand)
    size = _chunk_rows(len(rows), hidden)
    y = torch.empty_like(rows)
    activated_rows = rows.new_empty(min(size, len(rows)), hidden)
    for i, (part, part_y) in enumerate(_chunks(size, rows, y)):
        activated = activated_rows[: len(part)]
        h = activated if keep is None else keep[i * size : i * size + len(part)]
        normed, _ = parts.normalise(part)
        torch.addmm(shift, normed, expand.t(), out=h)
        parts.gelu(h, activated)
        torch.add(part, project_bias, out=part_y)
        part_y.addmm_(activated, project.t())
    return _map(y, x)


class _ChannelHalf(torch.autograd.Function):
    """The half with a backward pass from x, or from x and the expanded activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        parameters, (eps, recompute) = rest[:6], rest[6:]
        pixels, hidden = x.numel() // x.shape[1], len(parameters[2])
        kept = None if recompute else x.new_empty(pixels, hidden)
        ctx.save_for_backward(x, *parameters, kept)
        ctx.eps = eps
        return _forward(x, *parameters, eps=eps, keep=kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad
        found = _backward(
            grad,
            *saved,
            eps=ctx.eps,
            kept=kept,
            expand_too=any(needed[1:5]),
            project_too=any(needed[5:7]),
        )
        return (*found, None, None)


def _backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    eps: float,
    kept: Tensor | None,
    expand_too: bool,
    project_too: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and of the six parameters, in their order and shapes.

    Those of the norm and of PW1 only with `expand_too`, those of PW2 only with `project_too`: the
    architecture's step of a search needs neither, or with nested weights the second alone.
    """
    parts = _elementwise(x, eps)
    rows, grad_y = _rows(x), _rows(grad)
    expand, shift = _fold_norm(norm_weight, norm_bias, expand_weight, expand_bias)
    project = project_weight.flatten(1)
    hidden, channels = expand.shape
    size = _chunk_rows(len(rows), hidden)
    grad_x = torch.empty_like(rows)
    # Both weight gradients are summed as (C, E): a product so shaped is 10% faster than its transpose.
    grad_expand, grad_project = rows.new_zeros(channels, hidden), rows.new_zeros(channels, hidden)
    grad_shift = rows.new_zeros(hidden)
    activated_rows, slope_rows = (rows.new_empty(min(size, len(rows)), hidden) for _ in range(2))
    for i, (part, part_y, part_x) in enumerate(_chunks(size, rows, grad_y, grad_x)):
        activated, slope = activated_rows[: len(part)], slope_rows[: len(part)]
        normed, rstd = parts.normalise(part)
        if kept is None:
            h = torch.addmm(shift, normed, expand.t(), out=activated)
        else:
            h = kept[i * size : i * size + len(part)]
        torch.mm(part_y, project, out=slope)  # the gradient of GELU's output
        sums = parts.gelu_backward(h, activated, slope)  # from here on that of its input
        if project_too:
            grad_project.addmm_(part_y.t(), activated)
        if expand_too:
            grad_shift += sums
            grad_expand.addmm_(normed.t(), slope)
        parts.normalise_backward(part_y, torch.mm(slope, expand), normed, rstd, part_x)
    of_project = (grad_project.view_as(project_weight), grad_y.sum(0)) if project_too else (None, None)
    if not expand_too:
        return (_map(grad_x, x), *[None] * 4, *of_project)
    folded = grad_expand.t().contiguous()  # of W1 diag(s), (E, C)
    matrix = expand_weight.flatten(1)
    grad_norm_weight, grad_norm_bias = (matrix * folded).sum(0), torch.mv(matrix.t(), grad_shift)
    return (
        _map(grad_x, x),
        grad_norm_weight,
        grad_norm_bias,
        folded.mul_(norm_weight).addr_(grad_shift, norm_bias).view_as(expand_weight),
        grad_shift,
        *of_project,
    )


__all__ = ["channel_half", "is_worth_recomputing"]
