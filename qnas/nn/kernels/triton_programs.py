# The function bodies are Triton, not Python: tuples grow in loops, arguments have no types, constants are
# in capitals.
# mypy: ignore-errors
# ruff: noqa: N803, RUF005
"""The Triton programs that `triton_quadratic` documents and launches.

Import this module only if triton is installed. Conventions:

- A tile is TH rows of a map; each row is a (BW, BC) tensor of columns and channels. The rows are a tuple
  that is unrolled at compile time, so that a thread keeps a strip of rows in registers and every loaded
  value serves up to k sums. There is no shared memory and no layout conversion.
- All maps of a call have size (C, H, W) and, within an image, strides (c, h, w). Positions outside a map
  read as zero, which is the padding.
- Weights are packed as (k, k, 3, C), contiguous along channels, with w_a, w_b and w_c of a tap adjacent.
- Sums are float32, whatever the dtype of the tensors.
- A row number is a (1, 1) tensor: the interpreter of Triton 3.9 accepts no scalar in a mask.
"""

import triton
import triton.language as tl

# A program is compiled anew, which takes seconds, where another of its whole numbers is divisible by 16.
# These do not decide how memory is read; without them, the stages of a network share their programs.
SIZES = ("H", "W", "tiles", "tiles_each")


@triton.jit
def _zeros(N: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(N):
        zeros = zeros + (tl.zeros((BW, BC), tl.float32),)
    return zeros


@triton.jit
def _load_rows(image, row, columns, channels, size, strides, N: tl.constexpr):
    """Return N rows starting at `row`: a tuple of (BW, BC) in float32."""
    inside = (columns >= 0) & (columns < size[2]) & (channels < size[0])
    start = image + channels * strides[0] + columns * strides[2]
    rows = ()
    for n in tl.static_range(N):
        mask = inside & (row + n >= 0) & (row + n < size[1])
        rows = rows + (tl.load(start + (row + n) * strides[1], mask=mask, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _store_rows(rows, image, row, columns, channels, size, strides, N: tl.constexpr):
    inside = (columns < size[2]) & (channels < size[0])
    start = image + channels * strides[0] + columns * strides[2]
    for n in tl.static_range(N):
        value = rows[n].to(image.dtype.element_ty)
        tl.store(start + (row + n) * strides[1], value, mask=inside & (row + n < size[1]))


@triton.jit
def _own_tile(size, stride_b, TH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """Return the image offset, first row, columns (BW, 1) and channels (1, BC) of this program's tile."""
    across, down, deep = tl.cdiv(size[2], BW), tl.cdiv(size[1], TH), tl.cdiv(size[0], BC)
    tile = tl.program_id(0)
    columns = tile % across * BW + tl.arange(0, BW)[:, None]
    row = tile // across % down * TH + tl.arange(0, 1)[:, None]
    channels = tile // (across * down) % deep * BC + tl.arange(0, BC)[None, :]
    image = (tile // (across * down * deep)).to(tl.int64) * stride_b
    return image, row, columns, channels


@triton.jit
def _convolve(
    sums,
    image,
    weights,
    tap_step,
    row,
    columns,
    channels,
    size,
    strides,
    N: tl.constexpr,
    K: tl.constexpr,
    TH: tl.constexpr,
):
    """Add N convolutions of an image to `sums`: N * TH of (BW, BC), the TH rows of the first one first.

    `weights` points to the first tap of the first convolution; those of the others follow at distance C.
    `tap_step` is the distance to the next tap, negative for a flipped kernel.
    """
    for j in range(K):
        rows = _load_rows(image, row - K // 2, columns + (j - K // 2), channels, size, strides, TH + K - 1)
        added = ()
        for n in tl.static_range(N):
            taps = ()
            for i in tl.static_range(K):
                tap = weights + (i * K + j) * tap_step + n * size[0] + channels
                taps = taps + (tl.load(tap, mask=channels < size[0], other=0.0).to(tl.float32),)
            for t in tl.static_range(TH):
                total = sums[n * TH + t]
                for i in tl.static_range(K):
                    total += rows[t + i] * taps[i]
                added = added + (total,)
        sums = added
    return sums


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, weights, y, C, H, W, stride_b, stride_c, stride_h, stride_w,
    K: tl.constexpr, TH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute y = a b + c, where a, b and c are convolutions of x, for one tile of one image."""
    size, strides = (C, H, W), (stride_c, stride_h, stride_w)
    image, row, columns, channels = _own_tile(size, stride_b, TH, BW, BC)
    sums = _zeros(3 * TH, BW, BC)
    sums = _convolve(sums, x + image, weights, 3 * C, row, columns, channels, size, strides, 3, K, TH)
    rows = ()
    for t in tl.static_range(TH):
        rows = rows + (sums[t] * sums[TH + t] + sums[2 * TH + t],)
    _store_rows(rows, y + image, row, columns, channels, size, strides, TH)


@triton.jit(do_not_specialize=SIZES)
def products(
    x, weights, grad, grad_a, grad_b, C, H, W, stride_b, stride_c, stride_h, stride_w,
    K: tl.constexpr, TH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute grad_a = grad b and grad_b = grad a, the gradients of a and b, for one tile of one image."""
    size, strides = (C, H, W), (stride_c, stride_h, stride_w)
    image, row, columns, channels = _own_tile(size, stride_b, TH, BW, BC)
    sums = _zeros(2 * TH, BW, BC)
    sums = _convolve(sums, x + image, weights, 3 * C, row, columns, channels, size, strides, 2, K, TH)
    given = _load_rows(grad + image, row, columns, channels, size, strides, TH)
    of_a = ()
    of_b = ()
    for t in tl.static_range(TH):
        of_a = of_a + (given[t] * sums[TH + t],)
        of_b = of_b + (given[t] * sums[t],)
    _store_rows(of_a, grad_a + image, row, columns, channels, size, strides, TH)
    _store_rows(of_b, grad_b + image, row, columns, channels, size, strides, TH)


@triton.jit(do_not_specialize=SIZES)
def data_gradient(
    grad_a, grad_b, grad, weights, dx, C, H, W, stride_b, stride_c, stride_h, stride_w,
    K: tl.constexpr, TH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute dx, the sum of three gradients convolved with flipped kernels, for one tile of one image."""
    size, strides = (C, H, W), (stride_c, stride_h, stride_w)
    image, row, columns, channels = _own_tile(size, stride_b, TH, BW, BC)
    sources = (grad_a + image, grad_b + image, grad + image)
    last = weights + (K * K - 1) * 3 * C
    sums = _zeros(TH, BW, BC)
    for n in tl.static_range(3):
        sums = _convolve(
            sums, sources[n], last + n * C, -3 * C, row, columns, channels, size, strides, 1, K, TH
        )
    _store_rows(sums, dx + image, row, columns, channels, size, strides, TH)


@triton.jit(do_not_specialize=SIZES)
def weight_gradients(
    x, grad_a, grad_b, grad, partial, tiles, tiles_each,
    C, H, W, stride_b, stride_c, stride_h, stride_w,
    K: tl.constexpr, TAPS: tl.constexpr, TH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute partial[p], (k, k, 3, C), the weight gradients from the p-th share of the tiles of all images.

    The grid is (channel groups, shares, groups of TAPS kernel columns). A program keeps its sums in
    registers for all its tiles and sums over the columns of the map only at its end.
    """
    size, strides = (C, H, W), (stride_c, stride_h, stride_w)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    channels = channel[None, :]
    share = tl.program_id(1)
    first_tap = tl.program_id(2) * TAPS
    across, down = tl.cdiv(W, BW), tl.cdiv(H, TH)
    sums = _zeros(TAPS * K * 3, BW, BC)
    for tile in range(share * tiles_each, tl.minimum((share + 1) * tiles_each, tiles)):
        columns = tile % across * BW + tl.arange(0, BW)[:, None]
        row = tile // across % down * TH + tl.arange(0, 1)[:, None]
        image = (tile // (across * down)).to(tl.int64) * stride_b
        of_a = _load_rows(grad_a + image, row, columns, channels, size, strides, TH)
        of_b = _load_rows(grad_b + image, row, columns, channels, size, strides, TH)
        of_c = _load_rows(grad + image, row, columns, channels, size, strides, TH)
        added = ()
        for j in tl.static_range(TAPS):
            shifted = columns + (first_tap + j - K // 2)
            rows = _load_rows(x + image, row - K // 2, shifted, channels, size, strides, TH + K - 1)
            for i in tl.static_range(K):
                a = sums[(j * K + i) * 3]
                b = sums[(j * K + i) * 3 + 1]
                c = sums[(j * K + i) * 3 + 2]
                for t in tl.static_range(TH):
                    a += of_a[t] * rows[t + i]
                    b += of_b[t] * rows[t + i]
                    c += of_c[t] * rows[t + i]
                added = added + (a, b, c)
        sums = added
    own = partial + share.to(tl.int64) * (K * K * 3 * C) + channel
    for j in tl.static_range(TAPS):
        mask = channel < tl.where(first_tap + j < K, C, 0)
        for i in tl.static_range(K):
            for n in tl.static_range(3):
                tap = i * K + first_tap + j
                tl.store(own + (tap * 3 + n) * C, tl.sum(sums[(j * K + i) * 3 + n], 0), mask=mask)
