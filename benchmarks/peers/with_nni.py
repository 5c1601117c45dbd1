"""The task with NNI's one-shot Proxyless, with its penalty on expected multiply-adds: peers.py runs it."""

# isort: off

from harness import Found, Task, Written, run

# user code
import os

import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.profiler.pytorch.flops import FlopsProfiler
from nni.nas.profiler.pytorch.utils import register_shape_inference_formula
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import Proxyless
from torch import Tensor, nn

# this Lightning reads its checkpoints as torch did by default before 2.6
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
# its count of multiply-adds follows shapes through the modules that it knows
register_shape_inference_formula(nn.ReLU6, lambda module, x: x.real_shape)

STAGES = ((16, 2, 1), (32, 3, 2), (64, 3, 2))  # channels, positions, stride


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True):
    layers = [
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * c_in
        self.body = nn.Sequential(
            conv(c_in, hidden, 1),
            conv(hidden, hidden, kernel, stride, groups=hidden),
            conv(hidden, c_out, 1, act=False),
        )
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)


class Space(ModelSpace):
    def __init__(self, channels: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = conv(channels, 16, 3, stem_stride)
        positions, c_in = [], 16
        for c_out, count, stage_stride in STAGES:
            for i in range(count):
                stride = stage_stride if i == 0 else 1
                blocks: dict[str, nn.Module] = {
                    f"mbconv_k{kernel}_e{expansion}": InvertedResidual(c_in, c_out, stride, kernel, expansion)
                    for kernel in (3, 5, 7)
                    for expansion in (2, 4)
                }
                if stride == 1 and c_in == c_out:
                    blocks["identity"] = nn.Identity()
                positions.append(LayerChoice(blocks, label=f"position{len(positions)}"))
                c_in = c_out
        self.positions = nn.Sequential(*positions)
        self.head = conv(c_in, 128, 1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.positions(self.stem(x))).mean((2, 3)))


def search(task: Task) -> Found:
    pl.seed_everything(task.seed)
    space = Space(task.channels, task.stem_stride)
    labels = [position.label for position in space.positions]
    dummy = torch.zeros(1, task.channels, task.px, task.px)
    profiler = FlopsProfiler(
        space, dummy, count_bias=False, count_normalization=False, count_activation=False
    )
    last = task.folder / "last.ckpt"
    evaluator = Classification(
        learning_rate=task.learning_rate,
        weight_decay=0.01,
        optimizer=torch.optim.AdamW,
        train_dataloaders=DataLoader(task.normalised("train"), task.batch_size, shuffle=True, drop_last=True),
        val_dataloaders=DataLoader(task.normalised("heldout"), task.batch_size, shuffle=True, drop_last=True),
        num_classes=10,
        max_epochs=task.epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[pl.callbacks.ModelCheckpoint(task.folder, save_last=True, save_top_k=0)],
    )
    if task.resume and last.exists():
        evaluator.fit_kwargs["ckpt_path"] = str(last)
    strategy = Proxyless(
        arc_learning_rate=task.arch_learning_rate,
        warmup_epochs=task.warmup_epochs,
        penalty={"profiler": profiler, "baseline": task.max_macs, "scale": 1.0, "nonlinear": "positive"},
    )
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    best = next(strategy.list_models()).sample
    return Found([best[label] for label in labels], float(profiler.profile(best)), best)


def export(task: Task, found: Found) -> Written:
    network = Space(task.channels, task.stem_stride).freeze(found.keep).eval()
    path = task.folder / "network.onnx"
    dummy = torch.zeros(1, task.channels, task.px, task.px)
    torch.onnx.export(network, (dummy,), path, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
    return Written(path, "torch.onnx.export", network)


# end of user code

if __name__ == "__main__":
    run(search, export)
