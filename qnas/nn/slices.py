"""Blocks without tensors of their own, which run with slices of those of a larger block.

A narrower channel count takes the leading channels, and a smaller kernel the centre (`subnet.take_slice`). So
candidates of one kind share the tensors of the largest, and narrow networks those of the widest.
"""

from collections.abc import Mapping, Sequence
from operator import gt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qnas.common.errors import UsageError
from qnas.nn.blocks import build_block
from qnas.nn.subnet import take_slice
from qnas.spaces.lower import BlockSpec

MODES = ("training", "track_running_stats")  # attributes of modules that say how they run


class Borrower(nn.Module):
    """A block that borrows its tensors from a larger one's module for each run, and runs in its mode.

    The mode is whether it is trained, and which statistics its batch norms use. `lender` may be None where
    the block has no layers. `name` is that of the block in messages. Raises UsageError where the tensors are
    not slices of the lender's.
    """

    def __init__(self, block: BlockSpec, lender: nn.Module | None, name: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.module = build_block(block)
        shapes = {key: tensor.shape for key, tensor in self.module.state_dict().items()}
        for part in self.module.modules():
            part._parameters = dict.fromkeys(part._parameters)
            part._buffers = dict.fromkeys(part._buffers)
        _check_slices(name, {} if lender is None else lender.state_dict(), shapes)
        self._loans = _Loans(self.module if lender is None else lender, self.module, shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: (B, C_in, H, W) -> (B, C_out, H, W)."""
        # torch.func.functional_call does the same, but takes 0.1 ms longer per block
        try:
            self._loans.lend()
            y: Tensor = self.module(x)
        finally:
            self._loans.take_back()
        return y


class _Loan(NamedTuple):
    """A borrowed tensor: its name, the lending and the borrowing submodule, and its shape there."""

    name: str
    lender: nn.Module
    borrower: nn.Module
    shape: torch.Size


class _Loans:
    """The tensors that a candidate borrows, set without setattr, which accepts only leaves as parameters."""

    def __init__(self, lender: nn.Module, borrower: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        lenders, borrowers = dict(lender.named_modules()), dict(borrower.named_modules())
        owners = ((*key.rpartition(".")[::2], shape) for key, shape in shapes.items())
        loans = [_Loan(name, lenders[owner], borrowers[owner], shape) for owner, name, shape in owners]
        self.parameters = [loan for loan in loans if loan.name in loan.lender._parameters]
        self.buffers = [loan for loan in loans if loan.name not in loan.lender._parameters]
        pairs = [(lenders[name], module) for name, module in borrowers.items() if name in lenders]
        self.modes = [(of, to, key) for of, to in pairs for key in MODES if key in of.__dict__]

    def lend(self) -> None:
        """Set the candidate's tensors to slices of the largest module's, and its mode to that one's."""
        for of, to, key in self.modes:
            to.__dict__[key] = of.__dict__[key]
        if self.parameters:
            whole = (loan.lender._parameters[loan.name] for loan in self.parameters)
            slices = _Slices.apply([loan.shape for loan in self.parameters], *whole)
            for loan, part in zip(self.parameters, slices, strict=True):
                loan.borrower._parameters[loan.name] = part
        for loan in self.buffers:
            tensor = loan.lender._buffers[loan.name]
            assert tensor is not None
            loan.borrower._buffers[loan.name] = take_slice(tensor, loan.shape)

    def take_back(self) -> None:
        """Remove the borrowed tensors from the candidate."""
        for loan in self.parameters:
            loan.borrower._parameters[loan.name] = None
        for loan in self.buffers:
            loan.borrower._buffers[loan.name] = None


class _Slices(torch.autograd.Function):
    """Slices of several tensors in one operation. A dozen of torch's operations take as long as a block."""

    @staticmethod
    def forward(ctx: Any, shapes: Sequence[torch.Size], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(take_slice(t, shape).contiguous() for t, shape in zip(tensors, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None]
        for grad, shape in zip(grads, ctx.shapes, strict=True):
            if grad is not None and grad.shape != shape:
                whole = grad.new_zeros(shape)
                take_slice(whole, grad.shape).copy_(grad)
                grad = whole
            found.append(grad)
        return tuple(found)


def _check_slices(block: str, whole: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise UsageError if a block's tensors are not slices of the larger module's."""
    for name, shape in shapes.items():
        largest = whole[name].shape if name in whole else None
        if largest is None or len(largest) != len(shape) or any(map(gt, shape, largest)):
            raise UsageError(
                f"{block}: {name}, {list(shape)}, is not a slice of that of the largest candidate, "
                f"{list(largest or [])}: search with `weights='independent'`"
            )
