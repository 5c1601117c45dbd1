"""Features of a kernel, of which its latency is a weighted sum.

Every feature is at or above zero and never falls when channels, kernel size or resolution grow at
equal stride; with weights at or above zero a prediction has the same properties by construction.
Counts are in thousands (`k`) or millions (`m`), so that the weights in a device file are readable.

`_c32` rounds channels up to full tiles, whose unused part is computed too, `_r4` output pixels,
`_t16x8` the sides of the output, `_i8` input channels. `_above_256` counts from where a tensor outgrows a
cache or a launch.
`_k5` counts kernels of 5 and more only: a step, so that a fit can follow how an implementation
treats its kernel sizes without ever falling with them.
`_wide16` counts convolutions with more than 16 input channels in a group only.

The `engine_` features count the work of the convolution engines of a Myriad X (qnas.latency.myriad).
They grow with a convolution except for steps of its tiling: one more group of input channels can
allow wider tiles, so that fewer border pixels are computed twice.
"""

from collections.abc import Callable
from functools import partial

from qnas.latency import myriad
from qnas.latency.kernels import Kernel


def _up(value: int, tile: int) -> int:
    return -(-value // tile) * tile


def _channels_in(k: Kernel) -> int:
    """Input channels summed into one output channel."""
    return 1 if k.kind == "dwconv" else k.c_in // k.groups


def _fan_in(k: Kernel, tile: int = 1) -> int:
    """Inputs summed into one output."""
    return k.kernel**2 * _up(_channels_in(k), tile if k.kind != "dwconv" else 1)


def _mmacs(k: Kernel, row_tile: int = 1, in_tile: int = 1, out_tile: int = 1) -> float:
    columns = k.groups * _up(k.c_out // k.groups, out_tile)
    return _up(k.rows, row_tile) * _fan_in(k, in_tile) * columns / 1e6


def _mmacs_pow2(k: Kernel) -> float:
    """Multiply-adds with the channels of a group filled up to a power of two."""
    per_group = (_channels_in(k), k.c_out // k.groups)
    c_in, c_out = (1 << (max(1, channels) - 1).bit_length() for channels in per_group)
    return k.rows * k.kernel**2 * k.groups * c_in * c_out / 1e6


def _roof(intensity: int) -> "Count":
    """Return multiply-adds in tiles, or, where it is more, `intensity` for each element read or written.

    Of a processor that does so many multiply-adds while it moves one element, this is the time (the roofline
    model, Williams et al. 2009). Several intensities together make a smooth corner.
    """
    return lambda k: max(_mmacs(k, 1, 8, 32), intensity * (_kin(k) + _kout(k)) / 1e3)


def _kin(k: Kernel) -> float:
    return k.batch * k.resolution_px**2 * k.c_in / 1e3


def _kout(k: Kernel) -> float:
    return k.rows * k.c_out / 1e3


def _klines(k: Kernel) -> float:
    """Rows of all output channels: the number of loops over the pixels of a row."""
    return k.batch * k.out_px * k.c_out / 1e3


def _kweights(k: Kernel) -> float:
    return _fan_in(k) * k.c_out / 1e3


def _kchannels(k: Kernel) -> float:
    return k.c_out / 1e3


Count = Callable[[Kernel], float]


def _above(threshold: int, count: Count) -> Count:
    return lambda k: max(0.0, count(k) - threshold)


def _from_kernel(size: int, count: Count) -> Count:
    return lambda k: count(k) if k.kernel >= size else 0.0


def _wider(size: int, count: Count) -> Count:
    """Count for groups of more than `size` input channels only: runtimes have kernels for narrow ones."""
    return lambda k: count(k) if _channels_in(k) > size else 0.0


def _strided(count: Count) -> Count:
    """Count for strides above 1 only; models are compared at equal stride, so nothing falls."""
    return lambda k: count(k) if k.stride > 1 else 0.0


def _tiled(count: Callable[[Kernel, myriad.Tiling], float]) -> Count:
    return lambda k: count(k, myriad.tile(k.resolution_px, k.c_in, k.c_out, k.kernel, k.stride))


FEATURES: dict[str, Count] = {
    "launch": lambda k: 1.0,
    # arithmetic
    "mmacs": _mmacs,
    "mmacs_c8": lambda k: _mmacs(k, 1, 8, 8),
    "mmacs_r4_c8": lambda k: _mmacs(k, 4, 1, 8),
    "mmacs_c32": lambda k: _mmacs(k, 1, 1, 32),
    "mmacs_c64": lambda k: _mmacs(k, 1, 64, 64),
    "mmacs_i4_c4": lambda k: _mmacs(k, 1, 4, 4),
    "mmacs_r4_i4_c4": lambda k: _mmacs(k, 4, 4, 4),
    "mmacs_r4_i4_c8": lambda k: _mmacs(k, 4, 4, 8),
    "mmacs_r8_i4_c16": lambda k: _mmacs(k, 8, 4, 16),
    # tiles of pixels, with channels in fours: what a GPU's groups compute
    "mmacs_t16x8": lambda k: (
        k.batch * _up(k.out_px, 16) * _up(k.out_px, 8) * _fan_in(k, 4) * _up(k.c_out, 4) / 1e6
    ),
    "mmacs_pow2": _mmacs_pow2,
    **{
        f"mmacs_i{i}_c{c}": partial(_mmacs, in_tile=i, out_tile=c)
        for i, c in ((8, 32), (16, 16), (16, 64), (32, 32), (32, 64), (64, 128), (64, 256))
    },
    "mmacs_r14_i16_c16": lambda k: _mmacs(k, 14, 16, 16),
    "mmacs_r28_i16_c64": lambda k: _mmacs(k, 28, 16, 64),
    **{f"mmacs_roof_{r}": _roof(r) for r in (32, 64, 128, 256, 512, 768, 1024)},
    "mmacs_k5": _from_kernel(5, _mmacs),
    "mmacs_k7": _from_kernel(7, _mmacs),
    "mmacs_k9": _from_kernel(9, _mmacs),
    **{f"mmacs_i{i}_c64_wide32": _wider(32, partial(_mmacs, in_tile=i, out_tile=64)) for i in (32, 64)},
    "mmacs_beyond_c512": lambda k: k.rows * _fan_in(k) * max(0, k.c_out - 512) / 1e6,
    "mmacs_row": lambda k: k.rows * k.kernel * _channels_in(k) * k.c_out / 1e6,
    # memory
    "kelements_in": _kin,
    "kelements_in_above_256": _above(256, _kin),
    "kelements_in_above_1024": _above(1024, _kin),
    "kelements_out": _kout,
    "kelements_out_above_128": _above(128, _kout),
    "kelements_out_above_1024": _above(1024, _kout),
    "kelements_out_k3": _from_kernel(3, _kout),
    "kelements_out_k5": _from_kernel(5, _kout),
    "kelements_out_k7": _from_kernel(7, _kout),
    "kelements_out_k9": _from_kernel(9, _kout),
    **{f"kelements_in_wide{width}": _wider(width, _kin) for width in (8, 16, 32)},
    "kelements_in_above_4096": _above(4096, _kin),
    "kelements_out_above_4096": _above(4096, _kout),
    "kweights": _kweights,
    "kweights_above_64": _above(64, _kweights),
    "kweights_above_256": _above(256, _kweights),
    "kweights_above_1024": _above(1024, _kweights),
    "kweights_above_4096": _above(4096, _kweights),
    "kcolumns": lambda k: k.rows * _fan_in(k) / 1e3,  # the matrix of im2col
    # loops
    "kfan_in": lambda k: _fan_in(k) / 1e3,  # the length of one sum
    "kpixels": lambda k: k.rows / 1e3,
    "klines": _klines,
    "klines_k3": _from_kernel(3, _klines),
    "klines_k5": _from_kernel(5, _klines),
    "kchannels_in": lambda k: k.c_in / 1e3,
    "kchannels_out": _kchannels,
    "kchannels_out_k3": _from_kernel(3, _kchannels),
    "kchannels_out_k5": _from_kernel(5, _kchannels),
    # strides
    "unstrided_kelements_in": lambda k: _kin(k) if k.stride == 1 else 0.0,
    "strided_mmacs": _strided(_mmacs),
    "strided_kelements_in": _strided(_kin),
    "strided_kelements_out": _strided(_kout),
    "strided_kelements_out_k3": _strided(_from_kernel(3, _kout)),
    "strided_kelements_out_k5": _strided(_from_kernel(5, _kout)),
    "strided_kchannels_out_k3": _strided(_from_kernel(3, _kchannels)),
    # the engines of a Myriad X
    "engine_mcycles": _tiled(lambda k, t: k.batch * t.groups * t.cycles * t.pixels / 1e6),
    "engine_ktiles": _tiled(lambda k, t: k.batch * (t.groups * t.tiles - 1) / 1e3),
    # elements that pass through software: partial sums of groups, and the ReLU after them
    "engine_ksums": _tiled(lambda k, t: (1.5 * (t.groups - 1) + 1) * _kout(k) if t.groups > 1 else 0.0),
    # elements that are copied out of tiles without their borders
    "engine_kborders": _tiled(lambda k, t: t.groups * _kout(k) if t.tiles > 1 else 0.0),
    # weights that are read, once for each tile of the map
    "engine_kweights": _tiled(lambda k, t: t.tiles * _fan_in(k) * _up(k.c_out, 8) / 1e3),
    "engine_missed_mmacs": _tiled(lambda k, t: 0.0 if t.on_engine else _mmacs(k)),
    "engine_1x1_mcycles": lambda k: k.rows * myriad.engine_cycles(k.c_in, k.c_out, 1) / 1e6,
    "engine_1x1_missed_mmacs": lambda k: 0.0 if myriad.on_engine_1x1(k.resolution_px, k.c_out) else _mmacs(k),
}
