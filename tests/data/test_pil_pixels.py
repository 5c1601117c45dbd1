import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from helpers.odd_images import COLOURS, drawn, encoded, exif_of, pixels_of, png16
from PIL import Image, ImageOps, features
from torch import Tensor

from qnas.common.errors import BrokenImageError, DataError
from qnas.data.datasets import Datasets
from qnas.data.decoding import Box
from qnas.data.lazy_images import DatasetReader

LOSSLESS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True}, "tiff": {}}


def channels_first(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", LOSSLESS)
def test_an_image_is_turned_as_its_exif_says(kind: str, tag: int) -> None:
    """Stored as a camera stores it, so that Pillow's own turn gives the upright image back."""
    stored = Image.fromarray(drawn(20, 33))
    content = encoded(stored, kind, exif=exif_of(tag), **LOSSLESS[kind])
    untold = stored.copy()
    untold.getexif()[0x0112] = tag
    assert torch.equal(pixels_of(content), channels_first(ImageOps.exif_transpose(untold)))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "avif"])
def test_a_turned_photograph_equals_the_turned_pixels(kind: str, tag: int) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stored = drawn(40, 66)
    plain, turned = (encoded(stored, kind, quality=90, exif=exif_of(n)) for n in (1, tag))
    image = Image.open(io.BytesIO(plain)).convert("RGB")
    image.info.clear()
    image.getexif()[0x0112] = tag
    assert torch.equal(pixels_of(turned), channels_first(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_box_is_drawn_in_the_upright_image(tag: int) -> None:
    """Also of a large JPEG, which is decoded at a fraction of its size."""
    upright = drawn(900, 600) // 2 * 2
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    same = {2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    flip = {5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE}
    image = Image.fromarray(upright)
    stored = image if tag == 1 else image.transpose((back | same | flip)[tag])
    content = encoded(stored, "jpeg", quality=95, exif=exif_of(tag))
    sizes: list[tuple[int, int]] = []

    def draw(height: int, width: int) -> Box:
        sizes.append((height, width))
        return Box(100, 40, 640, 320)

    cut = pixels_of(content, 24, draw=draw)
    assert set(sizes) == {(900, 600)}
    assert cut.shape[1] < 640, "at a fraction of its size"
    assert min(cut.shape[1] / 640, cut.shape[2] / 320) * 320 >= 48
    small = Image.fromarray(upright[100:740, 40:360]).resize((16, 32), Image.Resampling.BOX)
    found = Image.fromarray(cut.permute(1, 2, 0).numpy()).resize((16, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(found, float)).max() < 20


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0MM\0*"],
)
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_damaged_exif_does_not_break_whole_pixels(kind: str, exif: bytes) -> None:
    picture = drawn(9, 14)
    assert torch.equal(pixels_of(encoded(picture, kind, exif=exif)), pixels_of(encoded(picture, kind)))


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(tag: int) -> None:
    picture = drawn(9, 14)
    assert torch.equal(pixels_of(encoded(picture, exif=exif_of(tag))), channels_first(picture))


def transparent(kind: str, hidden: tuple[int, int, int]) -> bytes:
    """Return a red square on transparency, under which there is a hidden colour."""
    pixels = np.full((12, 12, 4), (*hidden, 0), np.uint8)
    pixels[4:8, 4:8] = (200, 30, 30, 255)
    image = Image.fromarray(pixels)
    match kind:
        case "RGBA":
            return encoded(image)
        case "webp":
            return encoded(image, "webp", lossless=True, exact=True)
        case "LA":
            return encoded(image.convert("LA"))
        case "palette":
            indices = Image.new("P", (12, 12), 0)
            indices.putpalette([*hidden, 200, 30, 30])
            indices.paste(1, (4, 4, 8, 8))
            return encoded(indices, transparency=0)
        case "gif":
            indices = Image.new("P", (12, 12), 0)
            indices.putpalette([*hidden, 200, 30, 30])
            indices.paste(1, (4, 4, 8, 8))
            return encoded(indices, "gif", transparency=0)
        case "key":
            return encoded(image.convert("RGB"), transparency=hidden)
        case "grey key":
            grey = image.convert("L")
            return encoded(grey, transparency=grey.getpixel((0, 0)))
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["RGBA", "webp", "LA", "palette", "gif", "key", "grey key"])
def test_transparent_images_stand_on_white(kind: str) -> None:
    found = [
        pixels_of(transparent(kind, hidden)) for hidden in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))
    ]
    assert all(torch.equal(each, found[0]) for each in found), "what nobody sees does not count"
    assert (found[0][:, 0, 0] == 255).all()
    red = found[0][:, 5, 5].tolist()
    assert red == ([200, 30, 30] if len(red) == 3 else [81])


def test_half_transparent_is_half_white() -> None:
    image = np.full((3, 3, 4), (100, 0, 200, 128), np.uint8)
    expected = [255 - (255 - value) * 128 / 255 for value in (100, 0, 200)]
    assert pixels_of(encoded(image))[:, 1, 1].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("CMYK", 3), ("RGB", 3), ("F", 1)]
)
def test_every_mode_becomes_grey_or_colours(mode: str, channels: int) -> None:
    image = Image.fromarray(drawn(10, 12))
    kind = "tiff" if mode in ("CMYK", "F") else "png"
    converted = image.convert(mode) if mode != "F" else Image.fromarray(np.full((10, 12), 0.5, np.float32))
    found = pixels_of(encoded(converted, kind))
    assert found.shape == (channels, 10, 12)
    assert found.dtype == torch.uint8
    if mode == "F":
        assert (found == 128).all()


@pytest.mark.parametrize("values", [(0.0, 1.5), (-0.5, 1.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_floats_outside_0_to_1_are_refused(values: tuple[float, float]) -> None:
    content = encoded(np.array([values], np.float32), "tiff")
    with pytest.raises(BrokenImageError, match=r"floating-point pixels from .*, expected 0 to 1"):
        pixels_of(content)


@pytest.mark.parametrize("value", [-1, 70_000])
def test_more_than_sixteen_bits_are_refused(value: int) -> None:
    with pytest.raises(BrokenImageError, match="more than 16 bits a pixel"):
        pixels_of(encoded(np.array([[0, value]], np.int32), "tiff"))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_an_animated_image_the_first_frame_is_read(kind: str) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert pixels_of(content)[:, 4, 4].tolist() == [255, 0, 0]


def test_a_clear_value_of_16_bits_is_white() -> None:
    values = np.array([[0x1234, 0x4000]], np.uint16)
    found = pixels_of(png16(values, 0, (b"tRNS", struct.pack(">H", 0x1234))))
    assert found.tolist() == [[[255, 0x40]]]


@pytest.mark.parametrize("kind", ["grey", "colours"])
def test_a_dataset_of_fewer_than_16_bits_says_how_many(kind: str) -> None:
    values = np.array([[60, 4000]], np.uint16)
    content = png16(values) if kind == "grey" else png16(np.stack([values] * 3, 2), COLOURS)

    def read(bits: int | None) -> Tensor:
        return DatasetReader([(Image.open(io.BytesIO(content)), 0)], "data", bits=bits).read(0)[0]

    with pytest.raises(
        DataError, match=r"^data\[0\]: 16 bits, .* `bits` says how many are significant, 8 to 16$"
    ):
        read(None)
    assert read(16)[0].tolist() == [[0, 15]]
    if kind == "grey":
        assert read(12)[0].tolist() == [[3, 250]]
    else:
        with pytest.raises(BrokenImageError, match="of which 12 are significant"):
            read(12)


@pytest.mark.parametrize("bits", [7, 17, "12", 12.0])
def test_significant_bits_are_8_to_16(bits: Any) -> None:
    with pytest.raises(DataError, match=rf"^`bits={bits}`: expected 8 to 16$"):
        Datasets([(1, 0)], bits=bits)


def test_the_images_of_a_dataset_are_decoded_alike() -> None:
    contents = [
        encoded(drawn(20, 33), "jpeg", exif=exif_of(6)),
        transparent("RGBA", (0, 255, 0)),
        encoded(drawn(8, 9).astype(np.uint16)[..., 0] << 8, "png"),
    ]
    dataset = [(Image.open(io.BytesIO(content)), 0) for content in contents]
    reader = DatasetReader(dataset, "data")
    for number, content in enumerate(contents):
        assert torch.equal(reader.read(number)[0], pixels_of(content))
