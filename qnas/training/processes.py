"""Runs on several processes, each with a part of every batch: torchrun starts them, `joined` connects them.

    torchrun --nproc-per-node 2 -m qnas.commands search --device vpu --budget 30ms

All processes hold the same weights, architecture parameters and random states, and so draw the same paths.
Each computes its part of the batch of a single process. Gradients are averaged, so the copies of the weights
stay equal to the last bit (`World.check_same`), and equal to a single process's up to the order of additions.

DistributedDataParallel averages the gradients of a single network (`World.parallel`). It does not suit the
sampled paths of a supernet, since it would send the gradients of all candidates, mostly zeros. On two gloo
processes and two cores, it made a weight step of 32 images 25% longer for quadranet-small and 99% longer for
quadranet-mobile; one message with the gradients of the path (`World.average`) costs 2% and 14%.

If a process dies or hangs, the others end as well: at once if its connection breaks, otherwise after TIMEOUT.
"""

import hashlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qnas.common.errors import ProcessError, UsageError

TIMEOUT = timedelta(minutes=5)  # waiting for another process: longer than evaluations and checkpoints

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and the rank of this one. With a single process, all methods cost nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank on this machine: the number of its GPU

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """This process's part of a batch and the number of parts, for `data.batches`."""
        return self.rank, self.size

    def check_batch(self, batch_size: int) -> None:
        """Raise UsageError where a batch cannot be split evenly."""
        if batch_size % self.size:
            fits = batch_size // self.size * self.size or self.size
            raise UsageError(
                f"batches of {batch_size} images cannot be split over {self.size} processes: "
                f"`batch_size={fits}`, for instance"
            )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type and device by their means over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def from_main(self, value: T) -> T:
        """Return the main process's value in all processes. It must be picklable."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def parallel(self, network: nn.Module) -> nn.Module:
        """Wrap a network whose parameters are all used at every step, so that gradients are averaged."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def averaging(self, network: object, *, now: bool) -> AbstractContextManager[None]:
        """Return the context of a forward and backward pass of a network from `parallel`.

        Unless `now`, gradients are accumulated in this process and averaged in a later pass.
        """
        if now or not isinstance(network, DistributedDataParallel):
            return nullcontext()
        return network.no_sync()

    def check_same(self, state: object) -> None:
        """Raise ProcessError where the processes hold different states."""
        if self.size == 1:
            return
        digests: list[Any] = [None] * self.size
        dist.all_gather_object(digests, digest(state))
        others = [rank for rank, found in enumerate(digests) if found != digests[0]]
        if others:
            raise ProcessError(
                f"processes {', '.join(map(str, others))} hold other weights than process 0: "
                "all machines must be alike, with the same versions of torch and qnas"
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the error that torch raises when another process has ended into a ProcessError.

        SIGTERM is blocked from then on: torchrun sends it to the remaining processes a moment later, which
        would replace this message by "interrupted".
        """
        try:
            yield
        except RuntimeError as error:
            # gloo's own errors are plain RuntimeErrors that begin with the place in its source
            is_lost = isinstance(error, dist.DistError) or "gloo/" in str(error)
            if self.size == 1 or not is_lost:
                raise
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            raise ProcessError(
                f"process {self.rank} of {self.size} waited for another one that was stopped or does "
                f"not answer ({' '.join(str(error).split())[:120]}): `resume=True` goes on from the "
                "last checkpoint"
            ) from error


ALONE = World()


def world_of_environment() -> World:
    """Return the world that torchrun set in the environment, or ALONE. Opens no connection."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    return World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Connect the processes of a run for the duration of the block: gloo for CPUs, NCCL for GPUs.

    Within such a block, another one changes nothing. Raises ProcessError where the others do not connect
    within TIMEOUT.
    """
    if world.size == 1 or dist.is_initialized():
        yield
        return
    has_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if has_gpu and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    with world.watched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def digest(state: object) -> str:
    """Return a digest of nested mappings and sequences of tensors and plain values, bit for bit."""
    found = hashlib.sha256()
    _feed(found, state)
    return found.hexdigest()


def _feed(found: "hashlib._Hash", value: object) -> None:
    if isinstance(value, Tensor):
        found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            found.update(repr(key).encode())
            _feed(found, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(found, item)
    else:
        found.update(repr(value).encode())
