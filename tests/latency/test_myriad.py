import itertools
import math

import pytest

from qnas.latency.myriad import engine_cycles, on_engine_1x1, tile

SHAPES = list(
    itertools.product((7, 14, 28, 56, 112), (3, 24, 80, 192, 320), (24, 192, 512), (3, 5, 7), (1, 2))
)


def test_a_convolution_that_fits_is_one_tile() -> None:
    found = tile(14, 64, 64, 3, 1)
    assert (found.groups, found.tiles, found.pixels, found.on_engine) == (1, 1, 14 * 14, True)


def test_cycles_are_those_of_the_best_mode() -> None:
    # by hand: blocks -> passes * (channels of a block * 9 + overhead)
    expected = min(
        math.ceil(64 / min(256 // blocks, 64)) * (math.ceil(64 / blocks) * 9 + overhead)
        for blocks, overhead in ((1, 0), (2, 5), (4, 11), (8, 19), (16, 31))
    )
    assert engine_cycles(64, 64, 3) == expected


@pytest.mark.parametrize(("kernel", "most"), [(3, 16 * 28), (5, 16 * 10), (7, 16 * 5)])
def test_groups_hold_as_many_channels_as_a_block_has_weights_for(kernel: int, most: int) -> None:
    # 256 weights in each of 16 blocks; small maps, so that lines are no limit
    assert tile(7, most, 16, kernel, 1).groups == 1
    assert tile(7, most + 1, 16, kernel, 1).groups == 2
    assert tile(7, 3 * most, 16, kernel, 1).groups == 3


def test_a_large_output_is_cut_into_bands_whose_borders_are_computed_twice() -> None:
    # 56 px, 128 channels: a line of 112 bytes; the buffer of 589824 bytes holds 41 lines
    found = tile(56, 64, 128, 7, 1)
    assert found.tiles > 1
    assert found.pixels > 56 * 56
    lines = 589824 // (112 * 128)
    assert found.tiles >= math.ceil(56 / lines)
    # no more than each band's borders, 3 lines on either side
    assert found.pixels <= 56 * (56 + 6 * (found.tiles - 1))


def test_bands_are_those_that_can_be_counted_by_hand() -> None:
    # 460 outputs of 28 px do not fit, bands of 14 lines do. k7 has 3 lines of border: 14 computed lines
    # give 11 at the top, 8 in the middle, and at the bottom 12 give the other 9
    found = tile(28, 64, 460, 7, 1)
    assert (found.groups, found.tiles, found.pixels) == (1, 3, 28 * (14 + 14 + 12))


def test_sums_in_software_are_dearer_than_tiles() -> None:
    # two groups would do with fewer tiles, but the compiler counts each element of a partial sum
    found = tile(56, 153, 76, 5, 1)
    assert (found.groups, found.tiles > 10) == (1, True)


def test_channels_cut_only_as_much_as_they_must() -> None:
    assert tile(56, 64, 40, 7, 1).tiles == 1
    assert tile(56, 64, 96, 7, 1).tiles > 1


def test_what_the_engine_computes_is_never_less_than_the_output() -> None:
    for px, c_in, c_out, kernel, stride in SHAPES:
        found = tile(px, c_in, c_out, kernel, stride)
        assert found.pixels >= math.ceil(px / stride) ** 2
        assert found.groups >= 1
        # 256 multiply-adds a cycle at most
        least = c_in * kernel**2 * c_out / 256
        assert found.groups * found.cycles >= least


def test_more_output_channels_never_take_fewer_cycles_in_all() -> None:
    for px, c_in, _, kernel, stride in SHAPES:
        tiles = [tile(px, c_in, c_out, kernel, stride) for c_out in (16, 32, 64, 128, 256)]
        cycles = [t.groups * t.cycles * t.pixels for t in tiles]
        assert cycles == sorted(cycles)


def test_a_convolution_that_fits_no_bands_runs_in_software() -> None:
    assert tile(224, 3, 64, 3, 1).on_engine
    assert not tile(224, 64, 4096, 7, 1).on_engine
    # 112 px in 15 bands: 8 lines of 224 bytes
    assert on_engine_1x1(112, 589824 // (8 * 224))
    assert not on_engine_1x1(112, 589824 // (8 * 224) + 1)
