"""ExecuTorch: a torch.export program for phones and boards, with XNNPACK's kernels where it has some.

Layer norms and the mean of all pixels stay with ExecuTorch's portable kernels. The product's metadata are
methods of the program without arguments, each of which returns a string.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnas.common.errors import UsageError
from qnas.deploy.export.product import Product, Run, Variant
from qnas.deploy.export.tracing import silence, told_as

_RUN = "forward"  # the method that classifies


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as a .pte for single images. Raises ExportError, UsageError."""
    runtime()
    given = torch.zeros(1, *product.shape)
    with told_as(f"{where}: ExecuTorch cannot export this network"), silence(), torch.no_grad():
        lower: Any = import_module("executorch.exir").to_edge_transform_and_lower
        partitioners: Any = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        program = lower(
            # not decomposed: XNNPACK has kernels for whole activations
            torch.export.export(product.deployed(variant.precision), (given,)),
            partitioner=[partitioners.XnnpackPartitioner()],
            constant_methods=dict(product.metadata),
        )
        path.write_bytes(program.to_executorch().buffer)


def load(path: Path) -> Run:
    """Return a program as a function of single images."""
    with silence():  # it warns that its interface may change
        program: Any = import_module("executorch.runtime").Runtime.get().load_program(path)
        method = program.load_method(_RUN)

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = method.execute([images])[0].clone()  # the next ones come to the same place
        return logits

    return run


def runtime() -> str:
    """Return `ExecuTorch 1.5.1`, without importing it. Raises UsageError if it is not installed."""
    if find_spec("executorch") is None:
        raise UsageError("format executorch: executorch is not installed: pip install executorch")
    return f"ExecuTorch {version('executorch')}"
