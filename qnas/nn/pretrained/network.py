"""A network with weights from elsewhere, in the names of qnas."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import only_arch
from qnas.spaces.space import SearchSpace


@dataclass(frozen=True, eq=False)
class PretrainedNetwork:
    """A network as a fixed space, with the state of its module (`subnet.build_subnet`)."""

    name: str
    space: SearchSpace
    state: Mapping[str, Tensor]
    sha256: str  # of the file of its weights, or of the tensors where they are no file

    def __post_init__(self) -> None:
        with torch.device("meta"):  # neither memory nor random numbers
            network = build_subnet(self.space, only_arch(self.space), self.space.head.classes)
        needed = {name: tensor.shape for name, tensor in network.state_dict().items()}
        found = {name: tensor.shape for name, tensor in self.state.items()}
        assert needed == found, sorted(set(needed.items()) ^ set(found.items()))[:4]

    def record(self) -> dict[str, Any]:
        """Return what a run keeps of it."""
        return {"name": self.name, "sha256": self.sha256}


def digest_of_tensors(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, whatever file they came from."""
    found = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
