"""Batch normalisation for one or several training processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are those of the whole batch over all processes.

    It computes what torch's SyncBatchNorm computes, which does not run on a CPU. In a single process it
    behaves as torch's own module.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        places = (0, 2, 3)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean: Tensor = _Mean.apply(values.mean(places))
        centred = values - mean[:, None, None]
        variance: Tensor = _Mean.apply(centred.square().mean(places))
        self._track(mean.detach(), variance.detach(), values.numel() // len(mean) * dist.get_world_size())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


class _Mean(torch.autograd.Function):
    """The mean over the processes. Its gradient, of the sum of all processes' losses, is a mean too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _mean(grad)


def _mean(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
