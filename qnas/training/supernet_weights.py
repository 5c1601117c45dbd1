"""Networks with saved weights, from the supernet of their search or from their training."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qnas.common.errors import CheckpointError
from qnas.nn.subnet import build_subnet, subnet_state
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import SUPERNET_FILE, WEIGHTS_FILE
from qnas.runs.tensors import load_supernet, load_tensors

CLASSIFIER = "head.classifier.weight"  # (classes, C)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Load a network's weights. Raises CheckpointError if they belong to another network."""
    known, needed = (len(w.get(CLASSIFIER, ())) for w in (state, network.state_dict()))
    if known and needed and known != needed:
        raise CheckpointError(f"{where}: the weights are for {known} classes, the data have {needed}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: not the weights of this network: {problem}") from error


def supernet_file(source: FoundArch) -> Path:
    """Return the file of the supernet's weights: beside the architecture, or where its document points."""
    return source.folder / str(source.document.get("supernet", SUPERNET_FILE))


def inherit(network: nn.Module, source: FoundArch) -> None:
    """Load the supernet's weights of the chosen candidates. Raises CheckpointError."""
    file = supernet_file(source)
    state = subnet_state(load_supernet(file), source.space, source.arch)
    try:
        load_weights(network, state, file)
    except CheckpointError as error:  # most likely, the data have other classes than the search had
        raise CheckpointError(f"{error}; `weights='scratch'` does without them") from error


def build_inherited(source: FoundArch) -> nn.Module:
    """Return a network in evaluation mode with the supernet's weights, for the classes of the search.

    Raises CheckpointError where the supernet's weights are missing or of another space.
    """
    file = supernet_file(source)
    state = load_supernet(file)
    heads = (len(w) for name, w in state.items() if name.endswith(CLASSIFIER))
    network = build_subnet(source.space, source.arch, next(heads, source.space.head.classes))
    load_weights(network, subnet_state(state, source.space, source.arch), file)
    return network.eval()


def build_trained(source: FoundArch, classes: int) -> nn.Module:
    """Return a trained network in evaluation mode, with the weights in its folder. Raises CheckpointError."""
    file = source.folder / WEIGHTS_FILE
    network = build_subnet(source.space, source.arch, classes)
    load_weights(network, load_tensors(file), file)
    return network.eval()
