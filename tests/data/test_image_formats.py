import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from helpers.odd_images import drawn, encoded, pixels_of
from PIL import EpsImagePlugin, Image, features

from qnas.common.errors import BrokenImageError
from qnas.data import image_formats
from qnas.data.image_files import readable_suffixes, unreadable_suffixes

CACHED = (image_formats.readable_formats, image_formats.readable_suffixes, image_formats.unreadable_suffixes)


@pytest.fixture
def _fresh() -> Iterator[None]:
    known = dict(Image.OPEN)
    for function in CACHED:
        function.cache_clear()
    yield
    Image.OPEN.clear()
    Image.OPEN.update(known)
    for function in CACHED:
        function.cache_clear()


def test_the_usual_suffixes_are_read() -> None:
    usual = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
    assert usual <= readable_suffixes()
    assert not readable_suffixes() & set(unreadable_suffixes())
    assert (".avif" in readable_suffixes()) == features.check("avif")


@pytest.mark.usefixtures("_fresh")
def test_what_a_plugin_would_read_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.OPEN.pop("HEIF", None)
    assert unreadable_suffixes()[".heic"] == "pillow-heif"
    assert ".heic" not in readable_suffixes()


@pytest.mark.usefixtures("_fresh")
def test_a_plugin_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its opener stands in for the real one: it takes any file that starts with HEIC for red."""
    plugin = ModuleType("pillow_heif")

    def open_red(*_: object) -> Any:
        return Image.new("RGB", (3, 2), "red")

    def register() -> None:
        Image.register_open("HEIF", open_red, lambda start: start[:4] == b"HEIC")

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert {".heic", ".heif", ".hif"} <= readable_suffixes()
    assert ".heic" not in unreadable_suffixes()
    assert pixels_of(b"HEIC" + bytes(20)).shape == (3, 2, 3)


def test_other_formats_are_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads PostScript by running a program on it."""
    Image.init()
    content = encoded(drawn(8, 8), "eps")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(BrokenImageError, match="cannot identify its format"):
        pixels_of(content)
