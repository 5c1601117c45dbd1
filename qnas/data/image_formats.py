"""The image formats that are read, and those that need another package.

A file is read by its content, and only as one of these formats: Pillow knows others, of which some run a
program of their own.
"""

from collections.abc import Mapping
from functools import cache

from PIL import Image

# Pillow's name of each format, with the suffixes of its files in lower case.
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (),  # JPEGs of some telephones, with a second image behind the first
    "PNG": (".png",),
    "BMP": (".bmp",),
    "DIB": (),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
# What to install for a format that may be missing.
_PACKAGES = {"AVIF": "pillow>=11.3", "HEIF": "pillow-heif", "WEBP": "pillow with WebP"}


@cache
def readable_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that can be read here; HEIF with the package pillow-heif."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    Image.init()
    return tuple(name for name in _SUFFIXES if name in Image.OPEN)


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that can be read here, in lower case: `.jpg`, `.png`, ..."""
    return frozenset(suffix for name in readable_formats() for suffix in _SUFFIXES[name])


@cache
def unreadable_suffixes() -> Mapping[str, str]:
    """Return the suffixes of images that cannot be read here, each with the package to install for it."""
    missing = (name for name in _SUFFIXES if name not in readable_formats())
    return {suffix: _PACKAGES.get(name, "pillow") for name in missing for suffix in _SUFFIXES[name]}
