"""The quadratic operator in torch's operators, with little memory and fast gradients; needs no compiler.

The backward pass needs x and the weights only and recomputes both factors. The slow part in torch is the
weight gradient of a depthwise convolution on a CPU: oneDNN has a kernel for weights at most COLUMNS wide and
no taller than the map, and falls back to a kernel up to 20 times slower for all others. Each form below
therefore serves the shapes for which it is the fastest. Figures are milliseconds for three gradients, torch's
(stock) and the form's, for shapes (B, C, H = W) (benchmarks/quadratic.py):

- columns: a few columns of the weights at a time; k 5 and 7 ((64,32,16): 10.7 -> 1.8 and 19.7 -> 3.7)
- gram: one matrix product per channel, of all positions with all positions; small maps
  ((64,40,4): 1.0 -> 0.3 and 2.3 -> 0.3; (64,80,2), k 3: 0.65 -> 0.30)
- folded: a forward convolution with the gradient as its kernel; maps little larger than the weights
  ((64,24,8), k 7: 3.9 -> 0.9)
- stock: torch's own; k 3
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 3  # largest kernel width of oneDNN's fast depthwise weight gradient
TINY_PLACES = 4  # H x W up to which the matrix product is fastest for every k
FEW_PLACES = 16  # the same for small inputs and k larger than COLUMNS
SMALL_ELEMENTS = 1 << 16  # elements of x below which the overhead of a call matters
FOLDED_ELEMENTS = 1 << 20  # elements of the folded input; a larger one does not fit the cache

Factors = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def quadratic_forward(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Factors]:
    """Return y = (w_a * x) . (w_b * x) + w_c * x + bias, and both factors of the product.

    x: (B, C, H, W); weights: (C, 1, k, k), k odd; bias: (C,). The result and the factors have x's shape.
    """
    _, (w_a, w_b, w_c) = _within_reach(x, w_a, w_b, w_c)
    a, b = depthwise(x, w_a), depthwise(x, w_b)
    return depthwise(x, w_c, bias).addcmul_(a, b), (a, b)


def quadratic_backward(
    grad: Tensor,
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    needed: Sequence[bool] = (True, True, True, True),
    factors: Factors | None = None,
) -> Gradients:
    """Return the gradients of x, w_a, w_b and w_c; None for those not `needed`.

    grad: (B, C, H, W), the gradient of the result; factors: those that `quadratic_forward` returned, or None
    to recompute them.
    """
    cut, (w_a, w_b, w_c) = _within_reach(x, w_a, w_b, w_c)
    outer = [grad, grad, grad]  # gradients of the three convolutions' results
    if any(needed[:3]):
        a, b = factors or (depthwise(x, w_a), depthwise(x, w_b))
        # in place if computed here: allocating memory costs as much as the multiplication
        outer[:2] = (grad * b, grad * a) if factors else (b.mul_(grad), a.mul_(grad))
    grad_x: Tensor | None = None
    if needed[0]:
        # the transpose of a padded convolution of stride 1 is the convolution with the flipped weights
        grad_x = depthwise(outer[0], w_a.flip(2, 3))
        grad_x += depthwise(outer[1], w_b.flip(2, 3))
        grad_x += depthwise(outer[2], w_c.flip(2, 3))
    found: list[Tensor | None] = [None, None, None]
    wanted = [i for i in range(3) if needed[1 + i]]
    if wanted:
        parts = _weight_gradients(x, [outer[i] for i in wanted], w_a.shape[-1], cut)
        for i, part in zip(wanted, parts, strict=True):
            found[i] = part
    return grad_x, found[0], found[1], found[2]


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the input and the weights of `depthwise`; None for those not `needed`.

    grad: (B, C, H, W), the gradient of the result.
    """
    cut, (weight,) = _within_reach(x, weight)
    grad_x = depthwise(grad, weight.flip(2, 3)) if needed[0] else None
    return grad_x, _weight_gradients(x, [grad], weight.shape[-1], cut)[0] if needed[1] else None


def _weight_gradients(x: Tensor, grads: Sequence[Tensor], kernel: int, cut: int) -> list[Tensor]:
    """Return the gradients of k x k weights, padded with `cut` rows and columns of zeros on each side."""
    found = weight_gradient_form(x, kernel)(x, grads, kernel)
    return [F.pad(part, (cut, cut, cut, cut)) for part in found] if cut else found


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own weights at stride 1, padded to keep the size."""
    if weight.shape[-1] == 1:
        y = x * weight.reshape(-1, 1, 1)  # takes a tenth of a convolution's time on 1 x 1 maps
        return y if bias is None else y.add_(bias[:, None, None])
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def weight_gradient_form(x: Tensor, kernel: int) -> Callable[[Tensor, Sequence[Tensor], int], list[Tensor]]:
    """Return the fastest of the forms below for this shape.

    Each form takes x (B, C, H, W), gradients of the same shape, and k; it returns a list of (C, 1, k, k).
    """
    height, width = x.shape[2:]
    places = height * width
    if x.numel() == 0 or not x.is_cpu:  # the others were measured on CPUs
        return stock_gradients
    is_small = x.numel() < SMALL_ELEMENTS
    if places <= TINY_PLACES or (places <= FEW_PLACES and kernel > COLUMNS and is_small):
        return gram_gradients
    if kernel <= COLUMNS:
        return stock_gradients
    # on a narrower map, most multiplications of the columns form are with padding
    is_wide = min(height, width) >= 2 * kernel - 5
    return columns_gradients if is_wide and not is_small else folded_gradients


def stock_gradients(x: Tensor, grads: Sequence[Tensor], kernel: int) -> list[Tensor]:
    """Compute each weight gradient with torch's own operator."""
    return [_convolution_gradient(x, grad, kernel, kernel, kernel // 2) for grad in grads]


def columns_gradients(x: Tensor, grads: Sequence[Tensor], kernel: int) -> list[Tensor]:
    """Compute the weight gradients with torch's operator, a few columns of the weights at a time."""
    x = x.contiguous(memory_format=torch.channels_last)
    grads = [grad.contiguous(memory_format=torch.channels_last) for grad in grads]
    results = [x.new_empty(x.shape[1], 1, kernel, kernel) for _ in grads]
    for tile in torch.arange(kernel).tensor_split(-(-kernel // COLUMNS)):
        first, last = int(tile[0]), int(tile[-1])
        # the columns that these taps read, padding included, so that the convolution pads no columns
        reached = F.pad(x, (kernel // 2 - first, last - kernel // 2))
        for grad, result in zip(grads, results, strict=True):
            result[..., first : last + 1] = _convolution_gradient(reached, grad, kernel, len(tile), 0)
    return results


def gram_gradients(x: Tensor, grads: Sequence[Tensor], kernel: int) -> list[Tensor]:
    """Compute the weight gradients from the products of x and the gradient at all pairs of positions."""
    batch, channels, height, width = x.shape
    places = height * width
    at_places = x.permute(1, 2, 3, 0).reshape(channels, places, batch)
    stacked = torch.stack(tuple(grads)).permute(2, 1, 0, 3, 4).reshape(channels, batch, len(grads) * places)
    pairs = torch.bmm(at_places, stacked).view(channels, places, len(grads), places)
    taps = _taps_of_pairs(height, width, kernel, x.dtype, x.device)
    rows = pairs.permute(2, 0, 1, 3).reshape(len(grads) * channels, places * places)
    # cloned, since an operator's results may not share memory
    return [g.clone() for g in (rows @ taps).view(len(grads), channels, 1, kernel, kernel)]


def folded_gradients(x: Tensor, grads: Sequence[Tensor], kernel: int) -> list[Tensor]:
    """Compute the weight gradients as forward convolutions of x with the gradients, image by image."""
    batch, channels, height, width = x.shape
    images = max(1, FOLDED_ELEMENTS // (channels * height * width))
    totals = [x.new_zeros(channels, 1, kernel, kernel) for _ in grads]
    for start in range(0, batch, images):
        part = x[start : start + images].contiguous()
        folded = len(part) * channels
        for grad, total in zip(grads, totals, strict=True):
            weight = grad[start : start + images].contiguous().view(folded, 1, height, width)
            y = F.conv2d(part.view(1, folded, height, width), weight, padding=kernel // 2, groups=folded)
            total += y.view(-1, channels, 1, kernel, kernel).sum(0)
    return totals


def _convolution_gradient(x: Tensor, grad: Tensor, height: int, width: int, pad_columns: int) -> Tensor:
    """Return the gradient of depthwise weights (C, 1, height, width); rows are padded by height // 2."""
    channels, padding = x.shape[1], [height // 2, pad_columns]
    weight = x.new_empty(channels, 1, height, width)  # for its shape alone
    mask = [False, True, False]
    # arguments: no bias, stride, padding, dilation, not transposed, output padding, groups, mask
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], channels, mask
    )
    result: Tensor = found[1]
    return result


def _within_reach(x: Tensor, *weights: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Cut off the outer taps that only ever meet padding.

    Returns the number of rows and columns cut on each side, and the remaining weights.
    """
    cut = max(0, (weights[0].shape[-1] - (2 * max(x.shape[2:]) - 1)) // 2)
    inner = (..., slice(cut, -cut), slice(cut, -cut))
    return cut, tuple(weight[inner] for weight in weights) if cut else weights


@lru_cache(maxsize=64)
def _taps_of_pairs(height: int, width: int, kernel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (H W H W, k k): 1 where a tap connects a position of x with a position of the gradient."""
    with torch.inference_mode(False), torch.no_grad():
        rows, columns = (
            (torch.arange(n)[:, None] - torch.arange(n) + kernel // 2)[..., None] == torch.arange(kernel)
            for n in (height, width)
        )  # (n of x, n of the gradient, k): whether the tap connects the two
        taps = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
        return taps.reshape((height * width) ** 2, kernel**2).to(device=device, dtype=dtype)
