"""Safetensors files with a digest of their own content, checked whenever they are read. Imports no torch.

The file's metadata have one entry, `qnas: SCHEMA sha256:DIGEST`. The digest is that of the whole file with
zeros in the digest's place. There is one entry only, since safetensors writes several in any order, and the
same tensors must give the same bytes.
"""

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from qnas.common.errors import CheckpointError, QnasWarning
from qnas.common.reading import parse_json, read_bytes

TENSORS_SCHEMA = "qnas.tensors/1"
# version 2: a block's weights belong to its rank among the blocks of the stage, not to a position
SUPERNET_SCHEMA = "qnas.supernet/2"

MOST_BYTES = 64_000_000_000  # of a file: more than any network of ours
_HEADER_BYTES = 100_000_000  # of the names and shapes of the tensors: safetensors' own limit
_BLANK = b"0" * 64
_KEY = "qnas"
_SEAL = re.compile(rb'\{"__metadata__":\{"qnas":"(qnas\.[a-z]+/\d{1,9}) sha256:([0-9a-f]{64})"\}')


@dataclass(frozen=True)
class TensorFile:
    """The bytes of a safetensors file that were checked, and what they are."""

    content: bytes
    schema: str | None  # None in files of earlier versions, other than supernets
    sha256: str  # of the file


def blank_metadata(schema: str) -> dict[str, str]:
    """Return the metadata with which a file is made before it is sealed."""
    return {_KEY: f"{schema} sha256:{_BLANK.decode()}"}


def seal(content: bytes) -> bytes:
    """Return a file made with blank metadata with its digest written in."""
    match = _SEAL.match(content, 8)
    assert match is not None, "made with blank metadata"
    digest = hashlib.sha256(content).hexdigest().encode()
    return b"".join((content[: match.start(2)], digest, content[match.end(2) :]))


def read_tensor_file(path: Path, sha256: str | None = None) -> TensorFile:
    """Read a file and check its digest, and the one that another file gives for it, if any.

    Files of earlier versions have no digest; a warning says so. Raises CheckpointError for a file that is
    missing or damaged, or is another than was expected.
    """
    content = read_bytes(path, CheckpointError, "weights", limit=MOST_BYTES)
    found = hashlib.sha256(content).hexdigest()
    match = _SEAL.match(content, 8)
    if match is None:
        schema = _unsealed_schema(path, content)
        if sha256 is None:
            text = f"{path}: written by an earlier version of qnas, without a digest: not checked for damage"
            warnings.warn(text, QnasWarning, stacklevel=2)
    else:
        schema = match[1].decode()
        blank = hashlib.sha256(memoryview(content)[: match.start(2)])
        blank.update(_BLANK)
        blank.update(memoryview(content)[match.end(2) :])
        if blank.hexdigest() != match[2].decode():
            raise CheckpointError(f"{path}: damaged: its SHA-256 does not match its content")
    if sha256 is not None and found != sha256:
        raise CheckpointError(
            f"{path}: SHA-256 {found[:12]}..., expected {sha256[:12]}...: not the file that was written with "
            "the documents beside it"
        )
    return TensorFile(content, schema, found)


def _unsealed_schema(path: Path, content: bytes) -> str | None:
    """Return the schema of a file of an earlier version. Raises CheckpointError for anything else."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= size <= min(_HEADER_BYTES, len(content) - 8):
        raise CheckpointError(f"{path}: damaged: not a safetensors file")
    try:
        text = content[8 : 8 + size].decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: damaged: not a safetensors file") from error
    metadata = parse_json(text, f"{path}: damaged", CheckpointError).get("__metadata__")
    if metadata is None:
        return None
    # one whose digest was damaged must not pass for one without
    if not isinstance(metadata, dict) or set(metadata) != {"schema"}:
        raise CheckpointError(f"{path}: damaged: its metadata are not those of qnas")
    return str(metadata["schema"])
