"""Named tensors as safetensors files: weights of supernets and of trained networks."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from qnas.common.errors import CheckpointError, first_line
from qnas.common.files import write_bytes

# version 2: a block's weights belong to its rank among the blocks of the stage, not to a position
SUPERNET_SCHEMA = "qnas.supernet/2"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], schema: str | None = None) -> None:
    """Write named tensors as safetensors."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata=None if schema is None else {"schema": schema}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error


def save_supernet(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a supernet's state."""
    save_tensors(path, state, SUPERNET_SCHEMA)


def load_supernet(path: Path) -> dict[str, Tensor]:
    """Read a supernet's state. Raises CheckpointError if it is missing, damaged or of an older version."""
    state = load_tensors(path)
    with safe_open(path, "pt") as file:
        schema = (file.metadata() or {}).get("schema")
    if schema != SUPERNET_SCHEMA:
        raise CheckpointError(
            f"{path}: from another version of qnas ({schema or 'an early one'}, expected {SUPERNET_SCHEMA}), "
            "which stores a block's weights elsewhere: search again"
        )
    return state
