import math
from itertools import product

import pytest

from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel

CONVS = [
    Kernel("conv", px, c_in, c_out, kernel, stride)
    for px, (c_in, c_out), kernel, stride in product(
        (7, 14, 56), ((3, 16), (24, 40), (160, 320)), (3, 5), (1, 2)
    )
]


def padded(value: int, tile: int) -> int:
    return math.ceil(value / tile) * tile


@pytest.mark.parametrize(
    ("name", "row_tile", "in_tile", "out_tile"),
    [
        ("mmacs", 1, 1, 1),
        ("mmacs_c8", 1, 8, 8),
        ("mmacs_r4_c8", 4, 1, 8),
        ("mmacs_c32", 1, 1, 32),
        ("mmacs_i4_c4", 1, 4, 4),
        ("mmacs_r4_i4_c8", 4, 4, 8),
        ("mmacs_r8_i4_c16", 8, 4, 16),
    ],
)
def test_padded_counts_are_those_of_whole_tiles(
    name: str, row_tile: int, in_tile: int, out_tile: int
) -> None:
    for k in CONVS:
        rows, c_in, c_out = (
            padded(k.out_px**2, row_tile),
            padded(k.c_in, in_tile),
            padded(k.c_out, out_tile),
        )
        assert FEATURES[name](k) == pytest.approx(rows * k.kernel**2 * c_in * c_out / 1e6)
        assert FEATURES[name](k) >= FEATURES["mmacs"](k)


def test_tiles_of_pixels_cover_the_output() -> None:
    # 14 x 14 in tiles of 16 x 8 is 16 x 16; channels in fours
    kernel = Kernel("conv", 14, 3, 10, 3)
    assert FEATURES["mmacs_t16x8"](kernel) == pytest.approx(16 * 16 * 9 * 4 * 12 / 1e6)


def test_depthwise_kernels_pad_no_input_channels() -> None:
    kernel = Kernel("dwconv", 14, 30, 30, 5)
    assert FEATURES["mmacs_c8"](kernel) == pytest.approx(14 * 14 * 25 * 32 / 1e6)


def test_steps_begin_where_their_name_says() -> None:
    small, large = Kernel("conv1x1", 8, 4000, 8), Kernel("conv1x1", 8, 4001, 8)  # 256000 and 256064 inputs
    assert FEATURES["kelements_in_above_256"](small) == 0
    assert FEATURES["kelements_in_above_256"](large) == pytest.approx(0.064)
    assert FEATURES["kelements_out_k5"](Kernel("dwconv", 14, 8, 8, 3)) == 0
    assert FEATURES["kelements_out_k5"](Kernel("dwconv", 14, 8, 8, 5)) == FEATURES["kelements_out"](
        Kernel("dwconv", 14, 8, 8, 5)
    )
    assert FEATURES["strided_kelements_in"](Kernel("conv", 14, 8, 8, 3)) == 0


def test_engine_counts_are_those_of_one_tile_where_one_will_do() -> None:
    # 14 px, 64 -> 64 channels, k3: 4 blocks of 16 channels, all 64 outputs in a pass: 16 * 9 + 11 cycles
    kernel = Kernel("conv", 14, 64, 64, 3)
    assert FEATURES["engine_mcycles"](kernel) == pytest.approx((16 * 9 + 11) * 196 / 1e6)
    for name in ("engine_ktiles", "engine_ksums", "engine_kborders", "engine_missed_mmacs"):
        assert FEATURES[name](kernel) == 0
    assert FEATURES["engine_kweights"](kernel) == FEATURES["kweights"](kernel)


def test_engine_counts_grow_with_groups_of_input_channels() -> None:
    # k7 has room for 5 channels in each of 16 blocks, 80 at once: 160 take two groups, one sum, one ReLU
    kernel = Kernel("conv", 14, 160, 64, 7)
    assert FEATURES["engine_ksums"](kernel) == pytest.approx(2.5 * FEATURES["kelements_out"](kernel))
    assert FEATURES["engine_mcycles"](kernel) == pytest.approx(2 * 4 * (5 * 49 + 31) * 196 / 1e6)


@pytest.mark.parametrize("name", [n for n in FEATURES if n != "launch"])
def test_features_are_linear_in_the_batch_or_do_not_fall_with_it(name: str) -> None:
    for k in CONVS[::5]:
        one = FEATURES[name](k)
        eight = FEATURES[name](Kernel(k.kind, k.resolution_px, k.c_in, k.c_out, k.kernel, k.stride, 8))
        assert one <= eight


def test_wide_groups_count_where_their_name_says() -> None:
    narrow, wide = (Kernel("gconv", 14, 8 * width, 8 * width, 3, groups=8) for width in (16, 24))
    assert FEATURES["kelements_in_wide16"](narrow) == 0
    assert FEATURES["kelements_in_wide16"](wide) == pytest.approx(14 * 14 * 192 / 1e3)
    assert FEATURES["mmacs_i64_c64_wide32"](wide) == 0
    wider = Kernel("gconv", 14, 320, 320, 3, groups=8)  # 40 channels in a group, computed as 64
    assert FEATURES["mmacs_i64_c64_wide32"](wider) == pytest.approx(14 * 14 * 9 * 64 * 512 / 1e6)


def test_a_pooling_of_stride_1_reads_its_input_once_more() -> None:
    assert FEATURES["unstrided_kelements_in"](Kernel("avgpool", 14, 8, 8)) == pytest.approx(14 * 14 * 8 / 1e3)
    assert FEATURES["unstrided_kelements_in"](Kernel("avgpool", 14, 8, 8, 1, 2)) == 0
