"""Named tensors as safetensors files: weights of supernets and of trained networks."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qnas.common.errors import CheckpointError, one_line
from qnas.common.files import write_bytes
from qnas.runs.tensor_files import (
    SUPERNET_SCHEMA,
    TENSORS_SCHEMA,
    TensorFile,
    blank_metadata,
    read_tensor_file,
    seal,
)

# beside its own: for types that torch lacks, and for shapes that do not fit the bytes
_ERRORS = (SafetensorError, AssertionError, LookupError, TypeError, ValueError, RuntimeError, OverflowError)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], schema: str = TENSORS_SCHEMA) -> str:
    """Write named tensors as safetensors; return the SHA-256 of the file."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = seal(save(whole, metadata=blank_metadata(schema)))
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, whose SHA-256 must be the given one if there is one.

    Raises CheckpointError if it is missing, damaged or another.
    """
    return _tensors(path, read_tensor_file(path, sha256))


def save_supernet(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write a supernet's state; return the SHA-256 of the file."""
    return save_tensors(path, state, SUPERNET_SCHEMA)


def load_supernet(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a supernet's state. Raises CheckpointError as `load_tensors`, and for one of an older version."""
    file = read_tensor_file(path, sha256)
    if file.schema != SUPERNET_SCHEMA:
        raise CheckpointError(
            f"{path}: from another version of qnas ({one_line(file.schema or 'an early one', 50)}, expected "
            f"{SUPERNET_SCHEMA}), which stores a block's weights elsewhere: search again"
        )
    return _tensors(path, file)


def _tensors(path: Path, file: TensorFile) -> dict[str, Tensor]:
    try:
        return load(file.content)
    except _ERRORS as error:
        raise CheckpointError(f"{path}: damaged: {one_line(error)}") from error
