"""What every peer's program is given, and what it answers: the same for all tools, and no user code.

The program runs in the peer's environment, so this file needs numpy and torch alone. Its argument is a JSON
file, the task. It prints one line for the network that it found, and one for the file that it wrote.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CHECKED_IMAGES = 16  # images on which an exported file is compared with its network


@dataclass(frozen=True)
class Task:
    """A task: images as bytes (B, C, H, W), a limit on multiply-adds, and the length of the search."""

    data: Path  # npz: images and labels of train, heldout and test
    folder: Path  # of the run: what is in it after a kill is what the tool goes on from
    mean: float
    std: float
    px: int
    channels: int  # of the images
    stem_stride: int
    max_macs: int
    warmup_epochs: int  # the weights alone
    search_epochs: int
    batch_size: int
    learning_rate: float  # of the weights, AdamW
    arch_learning_rate: float
    evaluations: int  # of networks, for tools that evaluate them one by one
    seed: int
    resume: bool

    @property
    def epochs(self) -> int:
        return self.warmup_epochs + self.search_epochs

    def images(self, split: str) -> TensorDataset:
        """Return the images of a split as bytes, with their labels."""
        with np.load(self.data) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))

    def normalised(self, split: str) -> TensorDataset:
        """Return the images of a split as floats of mean 0 and deviation 1, with their labels."""
        images, labels = self.images(split).tensors
        return TensorDataset((images.float() / 255 - self.mean) / self.std, labels)


@dataclass(frozen=True)
class Found:
    """What a tool found: the block of each position (`mbconv_k3_e2` or `identity`), and its count of MACs."""

    blocks: list[str]
    macs: float | None
    keep: Any = None  # what the export needs


@dataclass(frozen=True)
class Written:
    """An ONNX file, by which function it was written, and the network that it should equal."""

    path: Path
    by: str
    network: nn.Module


def read_task(path: Path) -> Task:
    """Read a task that peers.py wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Task(**values | {"data": Path(values["data"]), "folder": Path(values["folder"])})


def run(search: Callable[[Task], Found], export: Callable[[Task, Found], Written]) -> None:
    """Search and export, on one thread; print what was found and what was written as JSON lines."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    task = read_task(Path(sys.argv[1]))
    task.folder.mkdir(parents=True, exist_ok=True)
    found = search(task)
    say(
        found={"blocks": found.blocks, "macs": found.macs},
        seconds=time.process_time(),  # one thread, which other programs change little; includes the imports
        wall_s=time.perf_counter() - start,
    )
    written = export(task, found)
    save_outputs(written.network.eval(), task, written.path.with_suffix(".npz"))
    say(written={"path": str(written.path), "by": written.by})


def save_outputs(network: nn.Module, task: Task, path: Path) -> None:
    """Write the outputs of a network on some test images, normalised, with these images."""
    images: Tensor = task.normalised("test").tensors[0][:CHECKED_IMAGES].contiguous()
    with torch.no_grad():
        np.savez(path, images=images.numpy(), outputs=network(images).numpy())


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)
