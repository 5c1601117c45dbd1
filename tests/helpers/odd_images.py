"""Images of the kinds that people have: turned, transparent, of 12 and 16 bits, of odd sizes."""

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from torch import Tensor

from qnas.data.decoding import decode
from qnas.data.image_files import OriginalFile

Pixels = np.ndarray[Any, Any]
GREY, COLOURS = 0, 2  # kinds of PNG


def in_memory(content: bytes) -> OriginalFile:
    return OriginalFile("x", "x", memoryview(content))


def pixels_of(content: bytes, resolution_px: int | None = None, **options: Any) -> Tensor:
    return decode(in_memory(content), resolution_px, **options)


def encoded(image: Image.Image | Pixels, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png16(values: Pixels, kind: int = GREY, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of 16 bits, (H, W) or (H, W, C), with further chunks; Pillow writes grey ones alone."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff16(values: Pixels) -> bytes:
    """Return an uncompressed TIFF of 16-bit colours (H, W, 3)."""
    height, width, channels = values.shape
    data = values.astype("<u2").tobytes()
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 8), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, 14), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))),
    ]
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    bits = struct.pack("<HHH", 16, 16, 16)
    return (
        struct.pack("<2sHI", b"II", 42, 14 + len(data))
        + bits
        + data
        + struct.pack("<H", len(entries))
        + fields
        + struct.pack("<I", 0)
    )


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def drawn(height: int, width: int, seed: int = 0) -> Pixels:
    """Return a picture of smooth colours with noise, (H, W, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([rows * 255 / height, columns * 255 / width, 255 - rows * 255 / height], 2)
    return (base + rng.integers(-40, 40, base.shape)).clip(0, 255).astype(np.uint8)


SIZES = ((1, 1), (3, 2), (5, 9), (24, 24), (31, 64), (64, 31), (33, 50), (97, 40), (130, 257), (431, 300))


@cache
def all_kinds(bits: int = 16) -> dict[str, bytes]:
    """Return images of every kind and of odd sizes, each an encoded file by its name."""
    files: dict[str, bytes] = {}
    for seed, (height, width) in enumerate(SIZES):
        name, picture = f"{height}x{width}", drawn(height, width, seed)
        image = Image.fromarray(picture)
        alpha = np.random.default_rng(seed).integers(0, 256, (height, width, 1)).astype(np.uint8)
        clear = Image.fromarray(np.concatenate([picture, alpha], 2))
        palette = image.quantize(16, Image.Quantize.FASTOCTREE)
        turned = exif_of(seed % 8 + 1)
        files |= {
            f"{name}.png": encoded(image),
            f"{name}-grey.png": encoded(image.convert("L")),
            f"{name}.jpg": encoded(image, "jpeg", quality=90),
            f"{name}-grey.jpg": encoded(image.convert("L"), "jpeg"),
            f"{name}-cmyk.jpg": encoded(image.convert("CMYK"), "jpeg"),
            f"{name}-turned.jfif": encoded(image, "jpeg", exif=turned),
            f"{name}-turned.png": encoded(image, exif=turned),
            f"{name}-turned.webp": encoded(image, "webp", exif=turned, lossless=True, method=0),
            f"{name}-turned.tif": encoded(image, "tiff", exif=turned),
            f"{name}-clear.png": encoded(clear),
            f"{name}-clear.webp": encoded(clear, "webp", lossless=True, method=0),
            f"{name}-clear-grey.png": encoded(clear.convert("LA")),
            f"{name}-palette.gif": encoded(palette, "gif", transparency=3),
            f"{name}-palette.png": encoded(palette, transparency=bytes(range(0, 256, 16))),
            f"{name}-key.png": encoded(image, transparency=tuple(int(v) for v in picture[0, 0])),
            f"{name}-grey-key.png": encoded(image.convert("L"), transparency=int(picture[0, 0, 0])),
            f"{name}-one.png": encoded(image.convert("1")),
            f"{name}-frames.gif": encoded(
                palette,
                "gif",
                save_all=True,
                append_images=[palette.rotate(90)],
            ),
            f"{name}.bmp": encoded(image, "bmp"),
            f"{name}.ppm": encoded(image, "ppm"),
            f"{name}-deep.png": png16(picture[..., 0].astype(np.uint16) << (bits - 8)),
            f"{name}-deep-key.png": png16(
                picture[..., 0].astype(np.uint16) << (bits - 8),
                GREY,
                (b"tRNS", struct.pack(">H", int(picture[0, 0, 0]) << (bits - 8))),
            ),
            f"{name}-deep.tif": encoded(picture[..., 0].astype(np.uint16) << (bits - 8), "tiff"),
            f"{name}-float.tif": encoded((picture[..., 0] / 255).astype(np.float32), "tiff"),
        }
        if features.check("avif") and min(height, width) > 1:
            files[f"{name}-turned.avif"] = encoded(image, "avif", exif=turned, quality=80, speed=10)
        if bits == 16:  # colours of fewer bits are not to be had from Pillow
            files[f"{name}-colours.png"] = png16(picture.astype(np.uint16) * 257, COLOURS)
    return files


def write_all_kinds(folder: Path, bits: int = 16) -> list[Path]:
    """Write them, half into each of the classes a and b, and return their paths."""
    paths = []
    for number, (name, content) in enumerate(all_kinds(bits).items()):
        path = folder / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths.append(path)
    return paths
