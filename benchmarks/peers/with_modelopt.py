"""The task with NVIDIA ModelOpt: AutoNAS, which slices the largest network's weights: peers.py runs it."""

# isort: off

from harness import Found, Task, Written, run

# user code
import random

import modelopt.torch.nas as mtn
import modelopt.torch.opt as mto
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

STAGES = ((16, 2, 1), (32, 3, 2), (64, 3, 2))  # channels, positions, stride
FIXED, HALVED = (1.0,), (0.5, 1.0)  # of the largest: the widths of stages, and expansions of 2 and 4
RULES = {
    "nn.Conv2d": {
        "stem": {"channels_ratio": FIXED, "kernel_size": (), "channel_divisor": 1},
        "expand_head": {"channels_ratio": FIXED, "kernel_size": (), "channel_divisor": 1},
        "*.expand": {"channels_ratio": HALVED, "kernel_size": (), "channel_divisor": 1},
        "*.depthwise": {"channels_ratio": HALVED, "kernel_size": (3, 5, 7), "channel_divisor": 1},
        "*.project": {"channels_ratio": HALVED, "kernel_size": (), "channel_divisor": 1},
    },
    "nn.BatchNorm2d": {
        "*.norm[12]": {"features_ratio": HALVED, "feature_divisor": 1},
        "*norm3": {"features_ratio": FIXED, "feature_divisor": 1},
        "*_norm": {"features_ratio": FIXED, "feature_divisor": 1},
    },
    "nn.Linear": {"*": {"features_ratio": FIXED, "feature_divisor": 1}},
    "nn.Sequential": {"*": {"min_depth": 0}},
}


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * c_in
        self.expand = nn.Conv2d(c_in, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 7, stride, 3, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, c_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(c_out)
        self.act = nn.ReLU6()
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.expand(x)))
        y = self.act(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.is_residual else y


class Network(nn.Module):
    def __init__(self, channels: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, stem_stride, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU6()
        self.first, self.rest, c_in = nn.ModuleList(), nn.ModuleList(), 16
        for c_out, count, stride in STAGES:
            changes = stride > 1 or c_in != c_out
            self.first.append(InvertedResidual(c_in, c_out, stride) if changes else nn.Identity())
            kept = [InvertedResidual(c_out, c_out, 1) for _ in range(count - changes)]
            self.rest.append(nn.Sequential(*kept))
            c_in = c_out
        self.expand_head = nn.Conv2d(c_in, 128, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(128)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        for first, rest in zip(self.first, self.rest, strict=True):
            x = rest(first(x))
        x = self.act(self.head_norm(self.expand_head(x)))
        return self.classifier(x.mean((2, 3)))


def choice(block: InvertedResidual) -> str:
    conv = block.depthwise
    return f"mbconv_k{conv.kernel_size[0]}_e{conv.out_channels // block.expand.in_channels}"


def choices(network: Network) -> list[str]:
    found = []
    for first, rest, (_, count, _) in zip(network.first, network.rest, STAGES, strict=True):
        own = [choice(first)] if isinstance(first, InvertedResidual) else []
        own += [choice(block) for block in rest if isinstance(block, InvertedResidual)]
        found += own + ["identity"] * (count - len(own))
    return found


def accuracy(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    with torch.no_grad():
        hits = [(network(images).argmax(1) == labels).float() for images, labels in loader]
    return float(torch.cat(hits).mean())


def search(task: Task) -> Found:
    random.seed(task.seed)
    np.random.seed(task.seed)
    torch.manual_seed(task.seed)
    train = DataLoader(task.normalised("train"), task.batch_size, shuffle=True, drop_last=True)
    heldout = DataLoader(task.normalised("heldout"), 256)
    weights, rest = task.folder / "supernet.pth", task.folder / "training.pth"
    network, epoch = Network(task.channels, task.stem_stride), 0
    is_resumed = task.resume and weights.exists() and rest.exists()
    made = mto.restore if is_resumed else mtn.convert
    network = made(network, weights if is_resumed else [("autonas", RULES)])
    optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs)
    if is_resumed:
        state = torch.load(rest, weights_only=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        epoch = state["epoch"]
    loss = nn.CrossEntropyLoss()
    while epoch < task.epochs:
        network.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss(network(images), labels).backward()
            optimizer.step()
        schedule.step()
        epoch += 1
        mto.save(network, weights)
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": epoch}
        torch.save(state | {"torch": torch.get_rng_state(), "python": random.getstate()}, rest)
    network, stats = mtn.search(
        network,
        constraints={"flops": 2 * task.max_macs},  # two for a multiply-add
        dummy_input=torch.zeros(1, task.channels, task.px, task.px),
        config={
            "num_iters": task.evaluations,
            "population_size": 40,
            "candidate_size": 10,
            "max_iter_data_loader": 5,
            "data_loader": train,
            "collect_func": lambda batch: batch[0],
            "score_func": lambda each: accuracy(each, heldout),
            "checkpoint": str(task.folder / "search.pth"),
            "verbose": False,
        },
    )
    # the search has made the network that it found of the supernet
    return Found(choices(network), stats["best"]["constraints"]["flops"] / 2, network)


def export(task: Task, found: Found) -> Written:
    path = task.folder / "network.onnx"
    dummy = torch.zeros(1, task.channels, task.px, task.px)
    network = found.keep.eval()
    torch.onnx.export(network, (dummy,), path, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
    return Written(path, "torch.onnx.export", network)


# end of user code

if __name__ == "__main__":
    run(search, export)
