"""Mutants of the headers of tars, with checksums that are right, so that tarfile believes them."""

from collections.abc import Iterator
from random import Random

_BLOCK = 512
_CHECKSUM = slice(148, 156)
# the places of a header's fields, with their lengths: name, mode, size, time, type, ...
_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (257, 8), (345, 155), (386, 24), (482, 1))
_VALUES = (
    *(b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(10) + b"\x01", bytes(12)),
    *(b"77777777777\0", b"99999999999\0", b"-1\0", b"/" * 100, b"../" * 30, b"\xe4" * 20),
    *(bytes((kind,)) for kind in b"0123457xgLKSDVM"),
)


def reheaded(tar: bytes, at: int, field: int, value: bytes) -> bytes:
    """Return a tar with another value at a place of the header at byte `at`."""
    header = bytearray(tar[at : at + _BLOCK])
    header[field : field + len(value)] = value
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + _BLOCK :]


def header_mutants(tar: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants with one to three values replaced in any blocks, as if these were headers."""
    rng = Random(seed)
    for _ in range(count):
        changed = tar
        for _ in range(rng.choice((1, 1, 2, 3))):
            field, length = rng.choice(_FIELDS)
            at = _BLOCK * rng.randrange(len(tar) // _BLOCK)
            changed = reheaded(changed, at, field, rng.choice(_VALUES)[:length])
        yield changed
