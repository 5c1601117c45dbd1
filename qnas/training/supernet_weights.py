"""Networks with saved weights: from the supernet of their search, as a finalist, or from their training."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qnas.common.errors import CheckpointError, one_line
from qnas.common.reading import read_json
from qnas.nn.subnet import build_subnet, subnet_state
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import FINALISTS_FOLDER, RESULT_FILE, SUPERNET_FILE, WEIGHTS_FILE
from qnas.runs.tensor_files import read_tensor_file
from qnas.runs.tensors import load_supernet, load_tensors
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

CLASSIFIER = "head.classifier.weight"  # (classes, C)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Load a network's weights. Raises CheckpointError if they belong to another network."""
    known, needed = (_classes(w.get(CLASSIFIER)) for w in (state, network.state_dict()))
    if known and needed and known != needed:
        raise CheckpointError(f"{where}: the weights are for {known} classes, the data have {needed}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: not the weights of this network: {one_line(error)}") from error


def _classes(weight: Tensor | None) -> int:
    """Return the number of classes of a classifier's weight, 0 if it is none."""
    return len(weight) if weight is not None and weight.ndim == 2 else 0


def supernet_file(source: FoundArch) -> Path:
    """Return the file of the supernet's weights: beside the architecture, or where its document points."""
    return source.folder / str(source.document.get("supernet", SUPERNET_FILE))


def supernet_state(source: FoundArch) -> dict[str, Tensor]:
    """Return the supernet's state; its SHA-256 must be that which the architecture's document names, if any.

    Raises CheckpointError.
    """
    named = source.document.get("supernet_sha256")
    return load_supernet(supernet_file(source), named if isinstance(named, str) else None)


def load_inherited(
    network: nn.Module, state: Mapping[str, Tensor], space: SearchSpace, arch: Arch, where: Path
) -> None:
    """Load the weights that a supernet has for an architecture. Raises CheckpointError if it has others."""
    try:
        chosen = subnet_state(state, space, arch)
    except (RuntimeError, ValueError) as error:  # tensors that are too small, or lack dimensions
        problem = one_line(error)
        raise CheckpointError(f"{where}: not the weights of space {space.name}: {problem}") from error
    load_weights(network, chosen, where)


def inherit(network: nn.Module, source: FoundArch) -> None:
    """Load the supernet's weights of the chosen candidates. Raises CheckpointError."""
    file = supernet_file(source)
    state = supernet_state(source)
    try:
        load_inherited(network, state, source.space, source.arch, file)
    except CheckpointError as error:  # most likely, the data have other classes than the search had
        raise CheckpointError(f"{error}; `weights='scratch'` does without them") from error


def finalist_file(source: FoundArch) -> Path:
    """Return the file of the weights that a search's network has as its best finalist, if it is one."""
    return source.folder / FINALISTS_FOLDER / WEIGHTS_FILE


def is_finalist(source: FoundArch) -> bool:
    """Whether an architecture was chosen as a finalist and the weights of that training are there."""
    return "finalist" in source.document and finalist_file(source).is_file()


def inherit_finalist(network: nn.Module, source: FoundArch) -> None:
    """Load the weights of a finalist's training.

    Raises CheckpointError if they are missing, damaged, of another network, or not those of its document.
    """
    file, named = finalist_file(source), source.document["finalist"]["weights_sha256"]
    try:
        load_weights(network, load_tensors(file, named), file)
    except CheckpointError as error:  # most likely, the data have other classes than the search had
        raise CheckpointError(
            f"{error}; `weights='supernet'` or `weights='scratch'` do without them"
        ) from error


def build_inherited(source: FoundArch) -> nn.Module:
    """Return a network in evaluation mode with the supernet's weights, for the classes of the search.

    Raises CheckpointError where the supernet's weights are missing or of another space.
    """
    file = supernet_file(source)
    state = supernet_state(source)
    heads = (_classes(w) for name, w in state.items() if name.endswith(CLASSIFIER))
    network = build_subnet(source.space, source.arch, next(heads, 0) or source.space.head.classes)
    load_inherited(network, state, source.space, source.arch, file)
    return network.eval()


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights in the folder of a trained network. Raises CheckpointError."""
    return read_tensor_file(folder / WEIGHTS_FILE, _named_digest(folder)).sha256


def build_trained(source: FoundArch, classes: int, weights_sha256: str | None = None) -> nn.Module:
    """Return a trained network in evaluation mode, with the weights in its folder.

    Their SHA-256 must be the given one, or else that which result.json names. Raises CheckpointError.
    """
    file = source.folder / WEIGHTS_FILE
    network = build_subnet(source.space, source.arch, classes)
    load_weights(network, load_tensors(file, weights_sha256 or _named_digest(source.folder)), file)
    return network.eval()


def _named_digest(folder: Path) -> str | None:
    """Return the digest of the weights that result.json names; None in folders of earlier versions."""
    path = folder / RESULT_FILE
    named = read_json(path, CheckpointError).get("weights_sha256") if path.is_file() else None
    if not isinstance(named, str | None):
        raise CheckpointError(f"{path}: weights_sha256: expected a SHA-256")
    return named
