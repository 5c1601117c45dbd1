"""Mutants of YAML texts and npz files, and the shared inputs that once ended in a traceback."""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import yaml
from helpers.mutants import DEEP, byte_mutants, document_mutants
from helpers.places import SHARED

_HEAD = 128  # bytes of a member that hold the header of its array


def yaml_mutants(texts: Sequence[str], count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of YAML or JSON texts in turn: of the bytes, and of the document, written as JSON."""
    for number in range(seed, seed + count):
        text = texts[number // 2 % len(texts)]
        if number % 2:
            yield from byte_mutants(text.encode(), 1, seed=number)
        else:
            yield _document_mutant(text, number)


def _document_mutant(text: str, seed: int) -> bytes:
    for changed in document_mutants(yaml.safe_load(text), 1, seed=seed):
        try:  # YAML takes JSON
            return json.dumps(changed).encode(errors="surrogatepass")
        except RecursionError:  # of what is nested twice
            break
    return b"[" * DEEP


def npz_mutants(content: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of a ZIP archive: half of its bytes, half of one member, packed again."""
    of_bytes = (count + seed % 2) // 2
    yield from byte_mutants(content, of_bytes, seed=seed)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    rng = Random(seed)
    for _ in range(count - of_bytes):
        changed = dict(members)
        _change(changed, rng)
        packed = io.BytesIO()
        packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        with zipfile.ZipFile(packed, "w", packing) as archive:
            for name, member in changed.items():
                archive.writestr(name, member)
        yield packed.getvalue()


def _change(members: dict[str, bytes], rng: Random) -> None:
    name = rng.choice(list(members))
    content = members[name]
    mutant_seed = rng.randrange(2**31)
    match rng.randrange(5):
        case 0:
            del members[name]
        case 1:
            members[name] = members[rng.choice(list(members))]
        case 2:
            members[name] = next(byte_mutants(content[:_HEAD], 1, seed=mutant_seed)) + content[_HEAD:]
        case 3 if len(content) > _HEAD:
            numbers = bytearray(content)
            for _ in range(rng.choice((1, 4))):
                numbers[rng.randrange(_HEAD, len(numbers))] = rng.choice((0, 0x7F, 0x80, 0xFF))
            members[name] = bytes(numbers)
        case _:
            members[name] = next(byte_mutants(content, 1, seed=mutant_seed))


def faults(loader: str) -> list[Path]:
    """Return the shared inputs of a loader that once ended in a traceback; none without shared data."""
    return sorted((SHARED / "faults").glob(f"{loader}__*"))
