"""What an npz file says of itself is checked before memory is taken for it."""

import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qnas.common.arrays import DAMAGE, MEMBERS, WrongArrayError, open_arrays, open_zip

MOST = 100_000_000


def read(path: Path, kinds: str = "f", dimensions: int = 1, *, most: int = MOST) -> Any:
    with open_arrays(path, most) as arrays:
        return arrays.read("a", kinds, dimensions)


def refused(path: Path, *form: Any, most: int = MOST) -> str:
    with pytest.raises(DAMAGE) as error:
        read(path, *form, most=most)
    return str(error.value)


def member(header: bytes, content: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    form = "<H" if version == (1, 0) else "<I"
    return b"\x93NUMPY" + bytes(version) + struct.pack(form, len(header)) + header + content


def written(path: Path, content: bytes, packing: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("a.npy", content)
    return path


HEADER = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("array", "kinds"),
    [
        (np.array([1.5, np.nan, np.inf]), "f"),
        (np.array([1, -2], dtype=">i4"), "iu"),
        (np.asfortranarray(np.arange(6.0).reshape(2, 3)), "f"),
        (np.array("a text"), "U"),
        (np.array(["a", "\U0010ffff", ""]), "U"),
        (np.zeros((0, 3)), "f"),
        (np.array([""]), "U"),
        (np.array(7), "i"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_read_back_as_numpy_wrote_them(
    array: Any, kinds: str, save: Callable[..., None], tmp_path: Path
) -> None:
    save(tmp_path / "x.npz", a=array)
    found = read(tmp_path / "x.npz", kinds, array.ndim)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


def test_both_versions_of_the_header_are_read(tmp_path: Path) -> None:
    content = struct.pack("<2d", 1.0, 2.0)
    for version in ((1, 0), (2, 0)):
        path = written(tmp_path / "x.npz", member(HEADER, content, version))
        np.testing.assert_array_equal(read(path), [1.0, 2.0])
    assert "version 3.0" in refused(written(tmp_path / "x.npz", member(HEADER, content, (3, 0))))


@pytest.mark.parametrize(
    ("array", "form", "problem"),
    [
        (np.array([1, 2]), ("f", 1), "expected numbers in 1 dimension, got int64 of shape (2,)"),
        (np.ones((2, 2)), ("f", 1), "expected numbers in 1 dimension, got float64 of shape (2, 2)"),
        (np.array([1.0]), ("U", 1), "expected text in 1 dimension, got float64"),
        (np.array([1], dtype=object), ("U", 1), "expected text in 1 dimension, got object"),
        (np.zeros(2, [("x", "i4")]), ("iu", 2), "expected integers in 2 dimensions, got [('x', '<i4')]"),
    ],
)
def test_an_array_of_another_form_is_refused(
    array: Any, form: tuple[str, int], problem: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", a=array)
    with pytest.raises(WrongArrayError) as error:
        read(tmp_path / "x.npz", *form)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "EOF"),
        (b"junk" * 9, "magic string"),
        (member(HEADER.replace(b"(2,)", b"(3,)"), b"x" * 16), "float64 of shape (3,) in "),
        (member(HEADER.replace(b"(2,)", b"(-2,)"), b"x" * 16), "which no array has"),
        (member(HEADER.replace(b"(2,)", b"(2**62,)"), b"x" * 16), ""),
        (member(HEADER.replace(b"(2,)", b"(1000000000000,)"), b"x" * 16), "more than such a file has"),
        (member(HEADER.replace(b"(2,)", b"(4611686018427387904,)"), b"x" * 16), "which no array has"),
        (member(HEADER.replace(b"<f8", b"zz"), b"x" * 16), "descr"),
        (member(HEADER.replace(b"<f8", b"<f8" * 3), b"x" * 16), "descr"),
        (member(b"(" * 9000, b"x" * 16), ""),
        (member(b"{" + b"-" * 5000 + b"1}", b"x" * 16), ""),
        (member(b"[1,", b"x" * 16), ""),
        (member(b"{'a':\n (", b"x" * 16), ""),
        (member(b"\x00" * 20, b"x" * 16), ""),
        (member(b" " * 20_000, b"x" * 16), "EOF"),
    ],
)
def test_a_damaged_header_is_one_error(content: bytes, problem: str, tmp_path: Path) -> None:
    assert problem in refused(written(tmp_path / "x.npz", content))


def test_numbers_that_are_no_characters_are_refused(tmp_path: Path) -> None:
    for code in (0x110000, 0xFFFFFFFF, 0xD800):
        header = HEADER.replace(b"<f8", b"<U1")
        path = written(tmp_path / "x.npz", member(header, struct.pack("<2I", 65, code)))
        assert "no characters" in refused(path, "U", 1)


def test_a_small_file_that_unpacks_to_a_large_array_takes_no_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(10_000_000))
    assert (tmp_path / "x.npz").stat().st_size < 100_000
    tracemalloc.start()
    assert "packed in" in refused(tmp_path / "x.npz")
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


def test_the_arrays_of_a_file_are_bounded_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(1000))
    assert len(read(tmp_path / "x.npz", most=8000)) == 1000
    assert "more than such a file has" in refused(tmp_path / "x.npz", most=7999)
    with open_arrays(tmp_path / "x.npz", 15_999) as arrays:
        arrays.read("a", "f", 1)
        with pytest.raises(ValueError, match="more than such a file has"):
            arrays.read("a", "f", 1)


def test_a_missing_array_is_a_key_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", b=np.zeros(1))
    with open_arrays(tmp_path / "x.npz", MOST) as arrays:
        assert "b" in arrays
        with pytest.raises(KeyError):
            arrays.read("a", "f", 1)


def test_members_that_are_encrypted_or_packed_in_another_way_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npz", member(HEADER, b"x" * 16))
    content = path.read_bytes()
    flags = content.index(b"PK\x01\x02") + 8
    for bits, problem in ((0x01, "encrypted"), (0x20, "unusual way")):
        path.write_bytes(content[:flags] + bytes([bits]) + content[flags + 1 :])
        assert problem in refused(path)
    for packing in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        assert "unusual way" in refused(written(path, member(HEADER, b"x" * 16), packing))


def test_the_members_of_an_archive_are_counted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(MEMBERS + 1):
            archive.writestr(str(i), b"")
    message = "1001 members, expected at most 1000"
    with pytest.raises(zipfile.BadZipFile, match=message), open_zip(tmp_path / "x.zip"):
        pass


def test_a_directory_without_end_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(12_000):
            archive.writestr(f"{i}{'x' * 60}", b"")
    with pytest.raises(zipfile.BadZipFile, match="directory"), open_zip(tmp_path / "x.zip"):
        pass


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"")
        archive.writestr("a", b"")
    with pytest.raises(ValueError, match="two members 'a'"), open_arrays(tmp_path / "x.npz", MOST):
        pass


def test_a_checksum_that_differs_is_damage(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npz", member(HEADER, struct.pack("<2d", 1.0, 2.0)))
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<d", 2.0)) + 7] ^= 1
    path.write_bytes(content)
    assert "CRC" in refused(path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"), open_zip(tmp_path / "pipe"):
        pass
