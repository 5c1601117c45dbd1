"""The task with Archai's evolutionary search on the Pareto front of accuracy and MACs: peers.py runs it.

Archai has no supernet: it trains each candidate by itself, here for the epochs of a warm-up, and as many of
them as a search has epochs.
"""

# isort: off

from harness import Found, Task, Written, run

# user code
import torch
from archai.discrete_search.algos.evolution_pareto import EvolutionParetoSearch
from archai.discrete_search.api.archai_model import ArchaiModel
from archai.discrete_search.api.search_objectives import SearchObjectives
from archai.discrete_search.evaluators.functional import EvaluationFunction
from archai.discrete_search.evaluators.pt_profiler import TorchMacs
from archai.discrete_search.search_spaces.config import ArchConfig, ArchParamTree
from archai.discrete_search.search_spaces.config import ConfigSearchSpace, DiscreteChoice
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

STAGES = ((16, 2, 1), (32, 3, 2), (64, 3, 2))  # channels, positions, stride
POPULATION = 5


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


def positions():
    """Yield the channels, the stride and the names of the blocks of each position."""
    c_in = 16
    for c_out, count, stage_stride in STAGES:
        for i in range(count):
            stride = stage_stride if i == 0 else 1
            names = [f"mbconv_k{kernel}_e{expansion}" for kernel in (3, 5, 7) for expansion in (2, 4)]
            if stride == 1 and c_in == c_out:
                names.append("identity")
            yield c_in, c_out, stride, names
            c_in = c_out


class Network(nn.Module):
    def __init__(self, config: ArchConfig, channels: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = conv(channels, 16, 3, stem_stride)
        self.names, blocks = [], []
        for at, (c_in, c_out, stride, names) in enumerate(positions()):
            name = names[config.pick(f"position{at}")]
            self.names.append(name)
            if name != "identity":
                kernel, expansion = (int(part[1:]) for part in name.split("_")[1:])
                blocks.append(InvertedResidual(c_in, c_out, stride, kernel, expansion))
        self.blocks = nn.Sequential(*blocks)
        self.head = conv(64, 128, 1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def search(task: Task) -> Found:
    torch.manual_seed(task.seed)
    train = DataLoader(task.normalised("train"), task.batch_size, shuffle=True, drop_last=True)
    images, labels = task.normalised("heldout").tensors

    def accuracy(model: ArchaiModel, budget: float | None) -> float:
        network = model.arch.train()
        optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate, weight_decay=0.01)
        for _ in range(task.warmup_epochs):
            for x, y in train:
                optimizer.zero_grad()
                cross_entropy(network(x), y).backward()
                optimizer.step()
        with torch.no_grad():
            return float((network.eval()(images).argmax(1) == labels).float().mean())

    choices = [DiscreteChoice(list(range(len(names)))) for *_, names in positions()]
    space = ConfigSearchSpace(
        Network,
        ArchParamTree({f"position{at}": choice for at, choice in enumerate(choices)}),
        seed=task.seed,
        model_kwargs={"channels": task.channels, "stem_stride": task.stem_stride},
    )
    objectives = SearchObjectives()
    objectives.add_objective("accuracy", EvaluationFunction(accuracy), higher_is_better=True)
    dummy = torch.zeros(1, task.channels, task.px, task.px)
    objectives.add_objective(
        "macs",
        TorchMacs(dummy),
        higher_is_better=False,
        compute_intensive=False,
        constraint=(0, task.max_macs),
    )
    found = EvolutionParetoSearch(
        space,
        objectives,
        output_dir=str(task.folder),
        num_iters=max(1, task.search_epochs // POPULATION),
        init_num_models=POPULATION,
        num_random_mix=1,
        num_crossovers=2,
        max_unseen_population=POPULATION,
        clear_evaluated_models=False,
        save_pareto_model_weights=False,
        seed=task.seed,
    ).search()
    front = found.get_pareto_frontier()
    best = int(front["evaluation_results"]["accuracy"].argmax())
    network = front["models"][best].arch
    return Found(network.names, float(front["evaluation_results"]["macs"][best]), network)


def export(task: Task, found: Found) -> Written:
    network, path = found.keep.eval(), task.folder / "network.onnx"
    dummy = torch.zeros(1, task.channels, task.px, task.px)
    torch.onnx.export(network, (dummy,), path, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
    return Written(path, "torch.onnx.export", network)


# end of user code

if __name__ == "__main__":
    run(search, export)
