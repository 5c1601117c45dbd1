import gzip
import itertools
import json
from pathlib import Path

import pytest
from fitting.layernorm import fit_layernorm, read_blocks

from qnas.common.errors import TableError
from qnas.latency.kernels import Kernel


def write(path: Path, blocks: dict[str, float]) -> Path:
    path.write_bytes(gzip.compress(json.dumps(blocks).encode()))
    return path


def mmacs(kernel: Kernel) -> float:
    return kernel.out_px**2 * kernel.kernel**2 * kernel.c_in * kernel.c_out / 1e6


def depthwise_mmacs(px: int, channels: int, kernel: int) -> float:
    return px**2 * kernel**2 * channels / 1e6


def timed_blocks() -> dict[str, float]:
    """Make blocks of a runtime: 0.05 ms a million multiply-adds, 0.002 a thousand activations, ..."""
    blocks = {}
    for h, c, e in itertools.product((3, 5, 8, 12, 16, 24), (48, 96, 160, 240), (2, 3, 4, 5)):
        dense = 2 * h * h * c * c * e / 1e6
        norm = 0.01 + 0.004 * h * h * c / 1e3 + 0.1 * h * h / 1e3
        blocks[f"transffn_{h}_{c}_{e}_hard_swish_ln"] = (
            0.05 * dense + 0.002 * h * h * c * e / 1e3 + 0.001 * h * h * c / 1e3 + norm
        )
    for h, c, e, k in itertools.product((8, 16, 32), (16, 24, 48), (1, 2, 4), (3, 5)):
        dense = h * h * (c * c * e + (c * c * e if e > 1 else 0)) / 1e6
        activated = h * h * c * e * (2 if e > 1 else 1) / 1e3
        blocks[f"conv_{h}_{c}_{c}_{e}_1_hard_swish_{k}_nose"] = (
            0.05 * dense + 0.3 * depthwise_mmacs(h, c * e, k) + 0.002 * activated + 0.001 * h * h * c / 1e3
        )
    return blocks


def test_blocks_are_read_as_the_kernels_that_they_consist_of(tmp_path: Path) -> None:
    path = write(
        tmp_path / "blocks.json.gz",
        {
            "transffn_16_48_3_hard_swish_ln": 0.25,
            "conv_32_16_24_6_1_hard_swish_5_nose": 1.5,
            "conv_32_16_16_1_1_hard_swish_3_nose": 0.5,
            "conv_32_16_24_6_2_hard_swish_5_nose": 1.0,  # strided
            "conv_32_16_24_6_1_hard_swish_5_se": 1.0,  # squeeze and excite
            "firstconv_224_3_16_2_3": 1.0,
            "transattn_16_48_hard_swish_2_ln": 1.0,
        },
    )
    ffn, mb, plain = read_blocks(path)
    assert ffn.convolutions == (Kernel("conv1x1", 16, 48, 144), Kernel("conv1x1", 16, 144, 48))
    assert ffn.norm == Kernel("layernorm", 16, 48, 48)
    assert (ffn.kactivated, ffn.kadded, ffn.latency_ms) == (256 * 144 / 1e3, 256 * 48 / 1e3, 0.25)
    assert set(mb.convolutions) == {
        Kernel("conv1x1", 32, 16, 96),
        Kernel("dwconv", 32, 96, 96, 5),
        Kernel("conv1x1", 32, 96, 24),
        Kernel("conv1x1", 32, 16, 24),  # the shortcut
    }
    assert mb.norm is None
    assert mb.kactivated == 2 * 1024 * 96 / 1e3
    assert set(plain.convolutions) == {Kernel("dwconv", 32, 16, 16, 3), Kernel("conv1x1", 32, 16, 16)}


def test_layer_normalisation_is_found_and_scaled_by_the_convolutions(tmp_path: Path) -> None:
    blocks = read_blocks(write(tmp_path / "blocks.json.gz", timed_blocks()))
    # the model's runtime takes 0.1 ms a million multiply-adds: twice what the blocks' runtime takes
    found = fit_layernorm(blocks, lambda kernel: 0.1 * mmacs(kernel), {})
    assert found == pytest.approx({"launch": 0.02, "kelements_in": 0.008, "kpixels": 0.2}, rel=0.1)


def test_layer_normalisation_keeps_its_floor(tmp_path: Path) -> None:
    blocks = read_blocks(write(tmp_path / "blocks.json.gz", timed_blocks()))
    found = fit_layernorm(blocks, lambda kernel: 0.05 * mmacs(kernel), {"kelements_in": 0.01})
    assert found["kelements_in"] == pytest.approx(0.01, rel=0.05)


def test_blocks_without_normalisation_cannot_tell_it(tmp_path: Path) -> None:
    blocks = [b for b in read_blocks(write(tmp_path / "b.json.gz", timed_blocks())) if b.norm is None]
    with pytest.raises(TableError, match="expected blocks with layer normalisation"):
        fit_layernorm(blocks, mmacs, {})


def test_a_file_that_is_no_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file"):
        read_blocks(tmp_path / "absent.json.gz")
    (tmp_path / "text").write_bytes(b"{}")
    (tmp_path / "list").write_bytes(gzip.compress(b"[1]"))
    (tmp_path / "none").write_bytes(gzip.compress(b'{"a": null}'))
    for name in ("text", "list", "none"):
        with pytest.raises(TableError, match="not a file of measured blocks"):
            read_blocks(tmp_path / name)
