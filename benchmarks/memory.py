"""The memory that a training step needs between its forward and its backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass of what a call returns, without parameters.

    Each storage counts once and as a whole, whatever part of it is kept. What a backward pass allocates
    itself is not counted, nor are gradients.
    """
    apart = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # kept alive until all are counted, so that no two storages share an address
    del result
    return sum(kept.values())
