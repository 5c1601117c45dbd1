"""AOTInductor: a torch.export program compiled to machine code for this kind of processor.

torch loads it without Python's compiler and without tracing: `torch._inductor.aoti_load_package(FILE)`. The
code is for the instructions of the processor that compiled it, and calls the libraries of its torch. The
package names the folders of that machine's torch and Python, in the compiler's debugging notes.
"""

import platform
from pathlib import Path

import torch
from torch import Tensor

from qnas.common.errors import UsageError
from qnas.deploy.export import torch_format
from qnas.deploy.export.product import Product, Run, Variant
from qnas.deploy.export.tracing import silence, told_as


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as an AOTInductor package. Raises ExportError."""
    from torch._inductor import aoti_compile_and_package  # here and below: it takes seconds to import

    program = torch_format.program_of(product, variant, where)
    metadata = dict(product.metadata)
    with told_as(f"{where}: torch cannot compile this network"), silence(), torch.no_grad():
        aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
        )


def load(path: Path) -> Run:
    """Return a package as a function."""
    from torch._inductor import aoti_load_package

    compiled = aoti_load_package(str(path))

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = compiled(images)
        return logits

    return run


def runtime() -> str:
    """Return the runtime of the file, with its version. Raises UsageError without a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        with silence():
            get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError("format aot: torch finds no C++ compiler: install g++, or set CXX") from error
    return f"{torch_format.runtime()}, AOTInductor"


def runs_on(_: Variant) -> str:
    """Return where the machine code of this machine runs."""
    from torch._inductor import cpu_vec_isa

    instructions = str(cpu_vec_isa.pick_vec_isa()).upper() or "no vector instructions"
    return (
        f"{platform.system()} on {platform.machine()} processors with {instructions} and all other "
        f"instructions of this one, by torch {torch.__version__} alone; not on a GPU"
    )
