"""The quadratic depthwise convolution on a GPU, y = (w_a * x) . (w_b * x) + w_c * x, in Triton.

It ran on an H200 (benchmarks/RESULTS.md, "On a GPU"), and elsewhere in Triton's interpreter. On another
GPU, run `pytest -m gpu` and benchmarks/gpu.py.

The forward pass reads x (with its halo) and writes y: 2 passes over a tensor, where three convolutions, a
product and a sum take 12. The backward pass needs only x and the weights, and has three steps:

1. recompute both factors a and b from x, and from them their gradients (reads 2, writes 2);
2. dx: these two gradients and y's gradient, convolved with the flipped kernels (reads 3, writes 1);
3. the weight gradients (reads 4).

A single program would have to compute the factors in a halo around its halo. For k 7 this costs more than
these passes: from k 5 on, the limit is a GPU's float32 arithmetic, not its memory bandwidth.
Intermediate gradients have x's dtype, as under autograd; sums are float32.

Results are the same on every run: weight gradients are summed over fixed shares of the tiles, and
the shares in a fixed order, without atomics. Tile sizes follow from the shapes alone. If they were tuned by
timing at run time, the order of the sums, and so the last bits, would depend on the timing.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LANES = 32  # elements that a warp reads together: channels in channels_last, columns otherwise
TILE = 256  # elements of a tile's row
HEIGHTS = (8, 7, 4)  # rows of a tile; the stages at 224 px are 56, 28, 14 and 7 high
TALL_HEIGHTS = (16, 14, 8, 7, 4)  # for dx, which has one sum per position and so room for more rows
WEIGHT_HEIGHT = 4  # for weight gradients: 588 multiply-adds for 82 loads at k 7
WEIGHT_SUMS = 160  # sums that a thread keeps in registers (of 255) for all its tiles
WEIGHT_PROGRAMS = (
    1024  # programs that share the tiles; about 8 run at once on each of an H200's 132 processors
)
WEIGHT_TILES = 16  # least number in a share: with fewer, writing the sums costs more than reading the maps


@functools.cache
def available() -> bool:
    """Return whether the kernels can run: triton is installed, with a GPU or TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def quadratic_forward(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor) -> Tensor:
    """Apply the quadratic convolution at stride 1, padded to keep the size.

    x: (B, C, H, W), channels_last or contiguous (otherwise copied), of a dtype in DTYPES; weights:
    (C, 1, k, k), k odd. Returns (B, C, H, W) in x's dtype and layout.
    """
    maps = _Maps.of(x, w_a, w_b, w_c)
    x = maps.arranged(x)
    y = torch.empty_like(x)
    if x.numel():
        maps.launch("forward", HEIGHTS, x, _packed(w_a, w_b, w_c), y)
    return y


def quadratic_backward(
    grad: Tensor, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_a, w_b and w_c, each in the dtype of its tensor.

    grad: (B, C, H, W), the gradient of y; the other arguments are those of `quadratic_forward`. Results are
    bitwise the same on every run.
    """
    assert grad.shape == x.shape, f"gradient {tuple(grad.shape)} must have x's shape {tuple(x.shape)}"
    maps = _Maps.of(x, w_a, w_b, w_c)
    x, grad = maps.arranged(x), maps.arranged(grad.to(x.dtype))
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(w_a), torch.zeros_like(w_b), torch.zeros_like(w_c)
    weights = _packed(w_a, w_b, w_c)
    grad_a, grad_b = torch.empty_like(x), torch.empty_like(x)
    maps.launch("products", HEIGHTS, x, weights, grad, grad_a, grad_b)
    maps.launch("data_gradient", TALL_HEIGHTS, grad_a, grad_b, grad, weights, dx)
    sums = maps.weight_gradients(x, grad_a, grad_b, grad)  # (k, k, 3, C)
    dw_a, dw_b, dw_c = (
        sums[:, :, n].permute(2, 0, 1)[:, None].to(weight.dtype, memory_format=torch.contiguous_format)
        for n, weight in enumerate((w_a, w_b, w_c))
    )
    return dx, dw_a, dw_b, dw_c


@dataclass(frozen=True)
class _Maps:
    """The common shape and layout of all maps of a call, and the kernel size."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor, *weights: Tensor) -> "_Maps":
        assert x.ndim == 4, f"x must be (B, C, H, W), got {tuple(x.shape)}"
        channels, kernel = x.shape[1], weights[0].shape[-1]
        expected = (channels, 1, kernel, kernel)
        for weight in weights:
            assert weight.shape == expected, f"weights must be {expected}, got {tuple(weight.shape)}"
            assert weight.device == x.device, f"weights are on {weight.device}, x on {x.device}"
        assert kernel % 2 == 1, f"kernel must be odd, got {kernel}"
        assert x[:1].numel() < 2**31, f"an image of {x[:1].numel()} elements is beyond 32-bit offsets"
        assert x.dtype in DTYPES, f"x must be one of {DTYPES}, got {x.dtype}"
        # a map of one channel has both layouts; treat it as contiguous
        channels_last = channels > 1 and x.is_contiguous(memory_format=torch.channels_last)
        return cls(x.shape[0], channels, x.shape[2], x.shape[3], kernel, channels_last)

    def arranged(self, x: Tensor) -> Tensor:
        """Return x in the common layout, copied if necessary."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def strides(self) -> tuple[int, int, int, int]:
        """Return the strides of the layout. Torch's own are arbitrary in dimensions of size 1."""
        c, h, w = self.channels, self.height, self.width
        return (c * h * w, 1, w * c, c) if self.channels_last else (c * h * w, h * w, w, 1)

    def tile(self, elements: int) -> tuple[int, int]:
        """Return the numbers of columns and channels in a tile's row, powers of two."""
        along = self.channels if self.channels_last else self.width
        first = min(LANES, elements, 1 << (along - 1).bit_length())
        second = elements // first
        return (second, first) if self.channels_last else (first, second)

    def launch(self, program: str, heights: tuple[int, ...], *tensors: Tensor) -> None:
        """Run a program of `triton_programs` on each tile of each image."""
        rows = min(heights, key=lambda rows: _cover(self.height, rows) * rows)
        columns, channels = self.tile(TILE)
        tiles = _cover(self.width, columns) * _cover(self.height, rows) * _cover(self.channels, channels)
        shape = (self.channels, self.height, self.width, *self.strides())
        # along channels, four elements per thread are one load; along columns, two save registers
        warps = 2 if self.channels_last else 4
        constants = (self.kernel, rows, columns, channels)
        _run(program, (self.batch * tiles,), *tensors, *shape, *constants, warps=warps)

    def weight_gradients(self, x: Tensor, grad_a: Tensor, grad_b: Tensor, grad: Tensor) -> Tensor:
        """Return the gradients of the three weights, (k, k, 3, C) float32."""
        k = self.kernel
        taps = max(1, min(k, WEIGHT_SUMS // (3 * k)))  # kernel columns per program
        each = 4 if 4 * 3 * k * taps <= WEIGHT_SUMS else 1  # elements per thread
        columns, channels = self.tile(LANES * each)
        tiles = self.batch * _cover(self.height, WEIGHT_HEIGHT) * _cover(self.width, columns)
        deep = _cover(self.channels, channels)
        shares = max(1, min(_cover(WEIGHT_PROGRAMS, deep), tiles // WEIGHT_TILES))
        tiles_each = _cover(tiles, shares)
        shares = _cover(tiles, tiles_each)
        partial = torch.empty(shares, k, k, 3, self.channels, dtype=torch.float32, device=x.device)
        shape = (self.channels, self.height, self.width, *self.strides())
        _run(
            "weight_gradients",
            (deep, shares, _cover(k, taps)),
            *(x, grad_a, grad_b, grad, partial, tiles, tiles_each),
            *shape,
            *(k, taps, WEIGHT_HEIGHT, columns, channels),
            warps=1,
        )
        return partial.sum(0)


def _run(program: str, grid: tuple[int, ...], *arguments: Any, warps: int) -> None:
    from qnas.nn.kernels import triton_programs  # imports triton, which may be missing

    tensor = arguments[0]
    # Triton launches on the current device
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        getattr(triton_programs, program)[grid](*arguments, num_warps=warps, enable_fp_fusion=True)


def _packed(*weights: Tensor) -> Tensor:
    """Return three weights (C, 1, k, k) as (k, k, 3, C), contiguous."""
    return torch.stack([weight[:, 0].permute(1, 2, 0) for weight in weights], 2)


def _cover(size: int, part: int) -> int:
    return -(-size // part)
