"""torch.export: a program of torch's own operators that loads without the code it came from."""

from pathlib import Path

import torch
from torch import Tensor

from qnas.common.files import json_text
from qnas.deploy.export.product import Product, Run, Variant
from qnas.deploy.export.tracing import BATCH, silence, told_as

METADATA = "metadata.json"  # among the file's extra files
_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")
_EXPORTED_BATCH = 3  # of the example images if the batch size is free


def program_of(product: Product, variant: Variant, where: str) -> torch.export.ExportedProgram:
    """Return a product as a program of torch's operators, without notes. Raises ExportError."""
    shapes = ({0: torch.export.Dim(BATCH)},) if product.batch is None else None
    given = torch.zeros(product.batch or _EXPORTED_BATCH, *product.shape)
    with told_as(f"{where}: torch cannot export this network"), silence(), torch.no_grad():
        traced = torch.export.export(product.deployed(variant.precision), (given,), dynamic_shapes=shapes)
        program: torch.export.ExportedProgram = traced.run_decompositions()
    _strip(program)
    return program


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as a .pt2. Raises ExportError."""
    program = program_of(product, variant, where)
    with told_as(f"{where}: torch cannot save this network"), silence():
        torch.export.save(program, path, extra_files={METADATA: json_text(dict(product.metadata))})


def load(path: Path) -> Run:
    """Return a program as a function."""
    program = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = program(images)
        return logits

    return run


def runtime() -> str:
    """Return the runtime of the file, with its version."""
    return f"torch {torch.__version__}"


def _strip(program: torch.export.ExportedProgram) -> None:
    """Remove the exporter's notes: stack traces that name folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)
