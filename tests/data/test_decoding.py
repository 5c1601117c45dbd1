import hashlib
import io
import math
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mutants import MUTANTS, SECONDS, attack, bounded, byte_mutants, check_refusal, mutated_bytes
from helpers.odd_images import COLOURS, all_kinds, chunk, drawn, in_memory, pixels_of, png16
from helpers.odd_images import encoded as written
from helpers.pictures import PX, load, numbered
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from qnas.common.errors import BrokenImageError
from qnas.data import decoding
from qnas.data.augmentation import Augmentation
from qnas.data.batches import batches
from qnas.data.decoding import PIXELS_LIMIT, Box, decode, in_threads, pixel_digest
from qnas.data.image_data import ImageData
from qnas.data.image_files import OriginalFile
from qnas.data.lazy_images import LazyImages
from qnas.data.pil_pixels import pil_pixels

CROPS = Augmentation(2, random_resized_crop=0.2)


def gradient(height: int, width: int) -> Tensor:
    """Return an image whose colours say where they are: (3, H, W)."""
    rows, columns = torch.meshgrid(
        torch.linspace(0, 250, height), torch.linspace(0, 250, width), indexing="ij"
    )
    return torch.stack([rows, columns, 250 - rows]).round().to(torch.uint8)


def encoded(image: Tensor, kind: str) -> OriginalFile:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind, quality=95)
    return OriginalFile("x", "x", memoryview(file.getvalue()))


def lazy(original: Any, **changes: Any) -> LazyImages:
    return LazyImages(original, np.arange(1), **{"resolution_px": 24, "channels": 3, "pads": False} | changes)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (60, 160), (200, 40), (7, 900), (1, 1)])
@pytest.mark.parametrize("least", [0.08, 0.5, 1.0])
def test_boxes_are_drawn_as_torchvision_draws_them(height: int, width: int, least: float) -> None:
    augmentation = Augmentation(2, random_resized_crop=least)
    ours = np.array([augmentation.draw_box(seed, height, width) for seed in range(2000)])
    tops, lefts, heights, widths = ours.T
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (tops + heights <= height).all()
    assert (lefts + widths <= width).all()
    assert (heights > 0).all()
    assert (widths > 0).all()
    transform = v2.RandomResizedCrop(8, scale=(least, 1.0))
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    drawn = [transform.make_params([image]) for _ in range(2000)]
    theirs = np.array([[each[key] for key in ("top", "left", "height", "width")] for each in drawn])
    for a, b, size in zip(ours.T, theirs.T, (height, width) * 2, strict=True):
        assert a.mean() == pytest.approx(b.mean(), abs=0.03 * size)
        assert a.std() == pytest.approx(b.std(), abs=0.03 * size)
    shapes = [np.log(places[:, 3] / places[:, 2]) for places in (ours, theirs)]
    assert shapes[0].mean() == pytest.approx(shapes[1].mean(), abs=0.02)
    assert shapes[0].std() == pytest.approx(shapes[1].std(), abs=0.02)


def test_a_seed_is_a_box() -> None:
    boxes = {CROPS.draw_box(seed, 50, 60) for seed in range(50)}
    assert len(boxes) > 45
    assert boxes == {CROPS.draw_box(seed, 50, 60) for seed in range(50)}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_cut_is_the_box_resized(channels: int) -> None:
    image, box = gradient(90, 120), Box(11, 40, 50, 60)
    expected = tv.resized_crop(image, *box, [24, 24], antialias=True)
    if channels == 1:
        expected = tv.rgb_to_grayscale(expected)
    for original in (image[None], [encoded(image, "png")]):
        found = lazy(original, channels=channels).cut(0, lambda height, width: box)
        assert found.dtype == torch.uint8
        assert (found.float() - expected.float()).abs().max() <= 1  # grey before or after the resize


def test_a_large_jpeg_is_cut_at_a_fraction_of_its_size() -> None:
    image, box = gradient(1200, 1600), Box(300, 200, 700, 900)
    expected = tv.resized_crop(image, *box, [24, 24], antialias=True).float()
    found = lazy([encoded(image, "jpeg")]).cut(0, lambda height, width: box).float()
    assert (found - expected).abs().max() < 6
    whole = lazy([encoded(image, "jpeg")])[0].float()
    assert (whole - tv.resize(tv.center_crop(image, [1200, 1200]), [24, 24]).float()).abs().max() < 6


@pytest.mark.parametrize(("height", "width"), [(1200, 1600), (333, 1111)])
def test_a_thin_box_of_a_large_jpeg_keeps_its_pixels(height: int, width: int) -> None:
    """The fraction goes by the box: no side of it is decoded to fewer pixels than are needed."""
    file = encoded(gradient(height, width), "jpeg")
    assert decode(file, 24, lambda *_: Box(5, 5, 64, 85)).shape == (3, 64, 85)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        path = root / ("ant", "bee")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(gradient(40 + i, 64 - i).permute(1, 2, 0).numpy()).save(path)
    return root


def epoch(data: ImageData, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    options: dict[str, Any] = {"seed": 1, "epoch": 2, "augment": True, "drop_last": True}
    return list(batches(data.train, 4, **options | {"augmentation": CROPS} | changes))


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])
def test_crops_depend_on_seed_epoch_and_image_alone(memory_limit_bytes: int, photos: Path) -> None:
    data = load(photos, keep_originals=True, memory_limit_bytes=memory_limit_bytes)
    whole = epoch(data)
    assert len(whole) > 2
    for other in (epoch(data), epoch(load(photos, keep_originals=True))):
        assert all(torch.equal(x, u) for (x, _), (u, _) in zip(whole, other, strict=True))
    resumed = epoch(data, start=1)
    parts = [epoch(data, part=(which, 2)) for which in range(2)]
    for i, (x, _) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[i][0] for part in parts]))
        assert i == 0 or torch.equal(x, resumed[i - 1][0])
    for change in ({"epoch": 3}, {"seed": 2}, {"augmentation": None}):
        assert not torch.equal(epoch(data, **change)[0][0], whole[0][0])


def test_a_crop_is_a_part_of_the_image_mirrored_or_not(photos: Path) -> None:
    """Colours grow from the top and from the left: a crop has a smaller range of them, in place."""
    data = load(photos, keep_originals=True)
    std, mean = (torch.tensor(values)[:, None, None] for values in (data.std, data.mean))
    shares, mirrored = [], 0
    for number in range(10):
        for images, _ in epoch(data, epoch=number):
            for image in (images * std + mean) * 255:
                down, across = image[0].mean(1), image[1].mean(0)
                assert (down.diff() > -1).all(), "no black border, upright"
                mirrored += bool(across[-1] < across[0])
                shares.append(float(down[-1] - down[0]) * float((across[-1] - across[0]).abs()) / 250**2)
    assert 0.3 < mirrored / len(shares) < 0.7
    assert min(shares) < 0.35
    assert max(shares) > 0.6
    # a side of PX pixels shows its range between the centres of the outer ones
    expected = (0.2 + 1) / 2 * ((PX - 1) / PX) ** 2
    assert math.isclose(sum(shares) / len(shares), expected, abs_tol=0.12)


def test_without_crops_originals_are_not_kept(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"ant": 5, "bee": 5})
    assert load(root).train.originals is None
    kept = load(root, keep_originals=True)
    assert kept.train_and_heldout.originals is not None
    assert len(kept.train_and_heldout.originals) == len(kept.train_and_heldout)


def test_what_threads_make_is_in_order_and_the_first_error_is_raised() -> None:
    assert list(in_threads(lambda x: 2 * x, [[1, 2], [3], []])) == [[2, 4], [6], []]

    def work(x: int) -> int:
        if x > 2:
            raise ValueError(x)
        return x

    found = in_threads(work, [[1], [2], [3], [4], [5]])
    assert [next(found), next(found)] == [[1], [2]]
    with pytest.raises(ValueError, match="3"):
        next(found)


def test_pixels_are_identified_by_their_shape_and_bytes() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(3, 2, 4)
    expected = hashlib.sha256(b"(3, 2, 4)" + bytes(range(24))).hexdigest()
    assert pixel_digest(pixels) == expected
    assert pixel_digest(pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)) == expected
    assert pixel_digest(pixels.view(3, 4, 2)) != expected


def header_of(width: int, height: int, kind: str) -> bytes:
    """Return an image that says its size but has hardly a pixel."""
    match kind:
        case "png":
            head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
        case "bmp":
            content = bytearray(written(drawn(2, 2), "bmp"))
            content[18:26] = struct.pack("<ii", width, height)
            return bytes(content)
        case "ppm":
            return b"P6 %d %d 255\n" % (width, height)
        case "gif":
            content = bytearray(written(Image.new("P", (2, 2)), "gif"))
            content[6:10] = struct.pack("<HH", width, height)
            return bytes(content)
        case "jpeg":
            content = bytearray(written(drawn(2, 2), "jpeg"))
            at = content.index(b"\xff\xc0")
            content[at + 5 : at + 9] = struct.pack(">HH", height, width)
            return bytes(content)
    raise AssertionError(kind)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "bmp", "ppm", "gif", "jpeg"])
@pytest.mark.parametrize("resolution_px", [None, 1, 224])
def test_too_large_images_are_refused_by_their_header(kind: str, resolution_px: int | None) -> None:
    for width, height in ((13_300, 13_300), (20_000, 20_000), (65_000, 65_000), (2, PIXELS_LIMIT)):
        if height > 65_535 and kind in ("gif", "jpeg"):
            continue
        start = time.perf_counter()
        with pytest.raises(BrokenImageError, match=r"pixels, expected at most 67,108,864$"):
            pixels_of(header_of(width, height, kind), resolution_px)
        assert time.perf_counter() - start < 1


def test_a_large_image_within_the_limit_is_decoded() -> None:
    size = (8192, 8192)
    assert math.prod(size) == PIXELS_LIMIT
    content = written(Image.new("1", size), "png")
    assert pixels_of(content).shape == (1, *size)


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_LARGE_PIXELS", 100)
    now: list[int] = []
    most: list[int] = []
    convert = pil_pixels

    def slow(image: Image.Image, bits: int) -> Tensor:
        now.append(1)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return convert(image, bits)

    monkeypatch.setattr(decoding, "pil_pixels", slow)
    for side, expected in ((20, 1), (5, 2)):
        file, most[:] = in_memory(written(drawn(side, side))), []
        list(in_threads(partial(decode, resolution_px=None), [[file] * 4]))
        assert min(max(most), 2) == min(expected, len(most))


def test_made_up_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BrokenImageError, match="LOAD_TRUNCATED_IMAGES is set"):
        pixels_of(written(drawn(3, 3)))


KINDS = {
    name.partition("31x64")[2]: content for name, content in all_kinds().items() if name.startswith("31x64")
} | {".16.png": png16(drawn(31, 64).astype(np.uint16) << 4, COLOURS)}


def read_or_break(path: Path) -> None:
    """Decode a file in all ways. What a decoder takes too long or too much memory for is no broken image."""
    start = time.perf_counter()
    for px, bits in ((None, 16), (8, 12)):
        try:
            decode(OriginalFile(path.name, str(path), path), px, bits=bits)
        except BrokenImageError as error:
            assert "MemoryError" not in str(error), error  # noqa: PT017
            if px is not None:
                raise
    assert time.perf_counter() - start < SECONDS


@bounded
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_a_mutant_is_an_image_or_broken(kind: str, data: st.DataObject) -> None:
    content = data.draw(mutated_bytes(KINDS[kind]))
    try:
        pixels = pixels_of(content, 8)
    except BrokenImageError as error:
        check_refusal(error)
    else:
        assert pixels.dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_mutant_of_an_image_does_harm(kind: str, tmp_path: Path) -> None:
    mutants = byte_mutants(KINDS[kind], MUTANTS, seed=len(kind))
    assert attack(read_or_break, tmp_path / f"x{kind}", mutants) == []
