"""The tiles into which a Myriad X VPU cuts a convolution for its convolution engines.

A tile's input must fit into 128 KiB of the engine's memory, and its weights into 256 words per block. Large
kernels and large numbers of input channels therefore force groups of input channels, whose partial sums are
added in software. A tile's output must fit a buffer, so large maps are cut into bands whose borders are
computed twice. These steps, not multiply-adds, explain the latencies of VGG-like networks.

The limits, the engine's modes and the order in which cuts are preferred are those of the compiler of
OpenVINO 2019R2 (vpu/graph_transformer: hw/tiling, passes hwConvTiling; Apache-2.0). The size of the
buffer is not given there; half of 9 slices of 128 KiB fits the measured networks best.
"""

from dataclasses import dataclass
from functools import cache

# Blocks -> extra cycles. A mode splits the input channels over its blocks and computes 256 / blocks
# outputs at once; the compiler counts the extra cycles for each pass over a pixel.
_MODES = {1: 0, 2: 5, 4: 11, 8: 19, 16: 31}
_OUTPUTS = 256
_WEIGHTS = 256  # of a block, for one output
_INPUT_BYTES = 128 * 1024
_OUTPUT_BYTES = 9 * 128 * 1024 // 2
_MOST_GROUPS = 15
_MOST_BANDS = 15
_LEAST_WIDTH_PX = 64  # of a tile, where the width is cut


@dataclass(frozen=True)
class Tiling:
    """A convolution in tiles: `groups` of input channels, times `tiles` of the map."""

    groups: int
    tiles: int
    cycles: int  # of the engine, for a pixel and a group
    pixels: int  # computed, including borders that are computed twice
    on_engine: bool = True  # False: more bands than the compiler tries, so it runs in software


@dataclass(frozen=True)
class _Cut:
    """One side of the map in tiles: their number, all computed pixels, and the longest output and input."""

    tiles: int
    computed_px: int
    longest_out_px: int
    longest_in_px: int


@cache
def tile(px: int, c_in: int, c_out: int, kernel: int, stride: int) -> Tiling:
    """Return the cut that the compiler prefers, the one of least cost."""
    out_px = -(-px // stride)
    best, best_cost = None, 0
    for groups in range(1, _MOST_GROUPS + 1):
        channels = -(-c_in // groups)
        for columns in range(1, 5):
            if columns > 1 and -(-px // columns) < _LEAST_WIDTH_PX:
                break
            wide = _cut(px, -(-px // columns), kernel, stride, aligned=True)
            if wide is None:
                break
            for rows in range(1, _MOST_BANDS + 1):
                if rows > 1 and -(-px // rows) < kernel:
                    break
                high = _cut(px, -(-px // rows), kernel, stride, aligned=False)
                if high is None:
                    continue
                cycles = _tile_cycles(wide.longest_in_px, high.longest_in_px, channels, c_out, kernel, stride)
                out_bytes = _line_bytes(wide.longest_out_px) * high.longest_out_px * c_out
                if cycles is None or out_bytes > _OUTPUT_BYTES:
                    continue
                tiles, pixels = wide.tiles * high.tiles, wide.computed_px * high.computed_px
                # the compiler's cost: an element added in software costs as much as a cycle of a tile
                cost = tiles * cycles * groups + (groups - 1) * pixels * c_out
                if best is None or cost < best_cost:
                    best, best_cost = Tiling(groups, tiles, cycles, pixels), cost
                break
        if best is not None and groups * out_px**2 * c_out > best_cost:
            break  # more groups cannot cost less
    # without a cut, the compiler gives up and the convolution runs in software: counted as one tile
    return best or Tiling(1, 1, engine_cycles(c_in, c_out, kernel), out_px**2, on_engine=False)


def engine_cycles(c_in: int, c_out: int, kernel: int) -> int:
    """Return the engine's cycles for a pixel of a convolution that needs no tiles."""
    return min(_cycles(c_in, c_out, kernel, blocks) for blocks in _MODES)


def on_engine_1x1(px: int, c_out: int) -> bool:
    """Return whether the output of a 1x1 convolution fits the buffer in the bands that are tried."""
    return _line_bytes(px) * -(-px // _MOST_BANDS) * c_out <= _OUTPUT_BYTES


@cache
def _cut(px: int, window_px: int, kernel: int, stride: int, *, aligned: bool) -> _Cut | None:
    """Cut a side so that no tile reads more than about `window_px`; None where the borders fill it."""
    padding = 0 if kernel == stride else (kernel - 1) // 2
    out_px = (px - kernel + 2 * padding) // stride + 1
    most = min(out_px, (window_px - kernel + 2 * padding) // stride + 1)
    if most >= out_px:
        return _Cut(1, out_px, out_px, px)
    lengths: list[int] = []  # of the tiles' outputs and inputs
    inputs: list[int] = []
    start = 0
    while start < out_px:
        first = start * stride - padding
        if first < 0:
            first, lead, before = 0, 0, start  # `before`: unused outputs before the tile
        else:
            lead = first % stride
            if aligned:
                lead = min(first, lead + (first - lead) % 8)
            before = (lead + padding) // stride
        end = min(out_px, start + most)
        while end > start and before + end - start + _after(end, px, kernel, stride, padding) > most:
            end -= 1
        if end <= start:
            return None
        lengths.append(before + end - start + _after(end, px, kernel, stride, padding))
        inputs.append(min(px, (end - 1) * stride + kernel - padding) - first + lead)
        start = end
    return _Cut(len(lengths), sum(lengths), max(lengths), max(inputs))


def _after(end: int, px: int, kernel: int, stride: int, padding: int) -> int:
    """Return the number of unused outputs that the engine computes after a tile, since it always pads."""
    used = max(0, (end - 1) * stride + kernel - padding - px)
    return max(0, padding - used) // stride


def _tile_cycles(width: int, height: int, c_in: int, c_out: int, kernel: int, stride: int) -> int | None:
    """Return the cycles for a pixel of a tile in the best mode; None where the tile fits in no mode."""
    lines = min(kernel + stride + 2 + (width <= 8), height)  # that must be in memory at once
    channels = {blocks: -(-c_in // blocks) for blocks in _MODES}
    costs = (
        _cycles(c_in, c_out, kernel, blocks)
        for blocks, n in channels.items()
        if n * kernel**2 <= _WEIGHTS and _INPUT_BYTES // blocks // n // _line_bytes(width) >= lines
    )
    return min(costs, default=None)


def _cycles(c_in: int, c_out: int, kernel: int, blocks: int) -> int:
    outputs = min(_OUTPUTS // blocks, -(-c_out // 8) * 8)
    return -(-c_out // outputs) * (-(-c_in // blocks) * kernel**2 + _MODES[blocks])


def _line_bytes(px: int) -> int:
    """A line of float16 pixels, in words of 16 bytes."""
    return -(-px // 8) * 16
