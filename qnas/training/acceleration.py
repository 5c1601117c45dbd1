"""The device and precision of training: a GPU if there is one, the CPU otherwise.

On a GPU torch's autocast runs matrix products and convolutions in bfloat16 where the GPU supports it.
Weights and their gradients stay in float32, architecture parameters in float64. float16 needs a loss scale.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from qnas.common.errors import UsageError
from qnas.nn.blocks import Chain, QuadraBlock
from qnas.nn.wired_blocks import MBConvBlock, StarBlock
from qnas.training.settings import Precision, TorchDevice

_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Acceleration:
    """A device, and the type of its matrix products and convolutions."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a weight step's forward pass."""
        return self._autocast(self.dtype)

    def autocast_unscaled(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass without a loss scale, such as that of an architecture step.

        It uses float32 where weight steps use float16, whose range unscaled gradients would leave.
        """
        return self._autocast(torch.float32 if self.dtype == torch.float16 else self.dtype)

    def _autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def scaler(self) -> GradScaler:
        """Return a loss scale, which has an effect in float16 only."""
        return GradScaler(self.device.type, enabled=self.dtype == torch.float16)


PLAIN = Acceleration(torch.device("cpu"), torch.float32)
UNSCALED = PLAIN.scaler()


def choose_acceleration(torch_device: TorchDevice, precision: Precision, local_rank: int = 0) -> Acceleration:
    """Return the device and precision: `auto` is a GPU in bfloat16 if there is one, else the CPU in float32.

    `local_rank` is the number of the GPU. Raises UsageError where a GPU is missing or has no bfloat16.
    """
    has_gpu = torch.cuda.is_available()
    if torch_device == "cuda" and not has_gpu:
        raise UsageError(
            "`torch_device='cuda'`: torch finds no CUDA device here; `torch_device='auto'` takes the CPU"
        )
    if torch_device == "cpu" or not has_gpu:
        return Acceleration(torch.device("cpu"), _DTYPES["fp32" if precision == "auto" else precision])
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {local_rank} of this machine has no GPU, as there are {torch.cuda.device_count()}: "
            "start as many processes as GPUs, or choose `torch_device='cpu'`"
        )
    device = torch.device("cuda", local_rank)
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
    if precision == "bf16" and not has_bf16:
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16: choose `precision='fp16'` or "
            "`precision='fp32'`"
        )
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp16"
    return Acceleration(device, _DTYPES[precision])


def compile_blocks(module: nn.Module) -> None:
    """Let torch.compile compile each block on its first run, in place; weights keep their names.

    Networks are not compiled as a whole: each path of a supernet is a new combination of blocks. Blocks of
    one shape share a program. On a CPU this does not pay off: a block is no faster than with
    `qnas.nn.kernels`, and each shape takes tens of seconds to compile. On a GPU it has not been measured.
    """
    kinds = QuadraBlock | StarBlock | MBConvBlock | Chain
    blocks = [block for block in module.modules() if isinstance(block, kinds)]
    # torch stops compiling a function after 8 programs, and all these blocks share one `forward`. Each has up
    # to 4: for training, for architecture steps, without gradients and for evaluation
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()
