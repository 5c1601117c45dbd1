import copy
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pretrained import tiny_network
from helpers.searches import QUICK
from helpers.tiny import TINY_SPACE, TWO_KINDS
from torch import Tensor

from qnas.common.errors import Interrupted, UsageError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.mixed_block import Route
from qnas.nn.pretrained.derivation import derived_space, own_arch
from qnas.nn.supernet import Supernet, probabilities
from qnas.runs.names import ARCH_FILE, METRICS_FILE, SEARCH_FILE, SUPERNET_FILE
from qnas.search.config import SearchConfig
from qnas.search.search_result import run_search
from qnas.search.searcher import Searcher
from qnas.search.weight_steps import WeightSteps
from qnas.solver.limits import latency_limit
from qnas.spaces.lower import smallest_and_largest
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.head_first import is_classifier
from qnas.training.losses import cross_entropy, mean_loss
from qnas.training.optimizer import GRADIENT_CLIP, PathAdamW, Teacher, divergence

SANDWICH = QUICK.override({"weight_steps": "sandwich", "step_paths": 2, "threads": 1})
PRETRAINED_RATE = 0.125


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture
def batch(digits: ImageData) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(digits.mean)[:, None, None]
    images = digits.train.read(torch.arange(32)).float() / 255 - mean
    return images.contiguous(memory_format=torch.channels_last), digits.train.labels[:32]


def searcher_of(
    data: ImageData, config: SearchConfig, space: SearchSpace | None = None, share: float = 0.5
) -> Searcher:
    space = space or parse_space(TINY_SPACE, "tiny.yaml")
    table = compute_table(load_device("vpu"), space)
    budget_ms = table.fastest_ms + share * (table.slowest_ms - table.fastest_ms)
    return Searcher(space, (latency_limit(table, budget_ms),), data, config)


class Watched:
    """What the weight steps of a search do: the paths they run, and the gradients before the clip."""

    def __init__(self, searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[tuple[Route, ...]] = []
        self.gradients: dict[str, Tensor] = {}
        supernet = searcher.state.supernet
        forward, step = supernet.forward, PathAdamW.step

        def run(x: Tensor, routes: Any, channels: Any = None) -> Tensor:
            self.paths.append(tuple(routes))
            return forward(x, routes, channels)

        def clip(weights: list[Tensor], most: float) -> None:
            assert most == GRADIENT_CLIP
            named = {id(weight): name for name, weight in supernet.named_parameters()}
            self.gradients = {named[id(w)]: w.grad.clone() for w in weights if w.grad is not None}

        monkeypatch.setattr(supernet, "forward", run)
        monkeypatch.setattr("qnas.training.optimizer.nn.utils.clip_grad_norm_", clip)
        monkeypatch.setattr(PathAdamW, "step", lambda optimizer: step(optimizer))


def gradients_by_hand(
    searcher: Searcher, paths: list[tuple[Route, ...]], images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], list[float]]:
    """The mean of the gradients of each path alone: the first of the labels, the others of its answers."""
    supernet = searcher.state.supernet.train()
    total: dict[str, Tensor] = {}
    answers = supernet(images, paths[0]).detach()
    found = []
    for number, path in enumerate(paths):
        supernet.zero_grad()
        logits = supernet(images, path)
        if number == 0:
            loss = mean_loss(cross_entropy, logits, labels, searcher.problem.config.label_smoothing)
        else:  # no label enters: the divergence by its definition
            p, q = answers.softmax(1), logits.softmax(1)
            loss = (p * (p.log() - q.log())).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        found.append(loss.item())
        for name, weight in supernet.named_parameters():
            if weight.grad is not None and weight.grad.abs().sum() > 0:
                total[name] = total.get(name, torch.zeros_like(weight)) + weight.grad / len(paths)
    supernet.zero_grad()
    return total, found


@pytest.mark.parametrize("weights", ["shared", "independent", "nested"])
def test_a_sandwich_has_the_mean_of_the_gradients_of_its_paths_alone(
    weights: str, digits: ImageData, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = searcher_of(digits, SANDWICH.override({"weights": weights}))
    with monkeypatch.context() as patch:
        watched = Watched(searcher, patch)
        before = copy.deepcopy(searcher.state.supernet.state_dict())
        figures = WeightSteps(searcher.state).take(*batch)
    searcher.state.supernet.load_state_dict(before)
    expected, losses = gradients_by_hand(searcher, watched.paths, *batch)
    assert len(watched.paths) == 4, "the largest, two drawn ones, the smallest"
    assert figures["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert figures["distilled_loss"] == pytest.approx(sum(losses[1:]) / 3, rel=1e-4)
    reached = {name for name, grad in watched.gradients.items() if grad.abs().sum() > 0}
    assert reached == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(watched.gradients[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_labels_reach_the_largest_network_only(
    digits: ImageData, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With independent weights, a weight of a drawn path alone has the same gradient whatever the labels."""
    images, labels = batch
    found = []
    for answer in (labels, (labels + 3) % 10):
        searcher = searcher_of(digits, SANDWICH.override({"weights": "independent", "seed": 2}))
        with monkeypatch.context() as patch:
            watched = Watched(searcher, patch)
            WeightSteps(searcher.state).take(images, answer)
        found.append(watched.gradients)
    space, (largest, *_) = searcher.problem.space, watched.paths
    positions = [f"parts.{p.name.replace('.', '_')}." for p in space.positions]
    of_largest = tuple(
        f"{prefix}{p.names[int(route)]}."  # type: ignore[arg-type]  # a path
        for prefix, p, route in zip(positions, space.positions, largest, strict=True)
    )
    candidates = [name for name in found[0] if name.startswith(tuple(positions))]
    alone = [name for name in candidates if not name.startswith(of_largest)]
    assert alone, "a drawn path has candidates that the largest network has not"
    for name in alone:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0, msg=name)
    assert all(
        not torch.equal(found[0][name], found[1][name]) for name in candidates if name.startswith(of_largest)
    )


def test_the_divergence_is_that_of_a_teacher(batch: tuple[Tensor, Tensor]) -> None:
    """A sandwich's loss is that of a recipe's teacher of weight 1 at temperature 1."""
    logits, answers = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(lambda images: answers, 1.0, 1.0)
    assert divergence(logits, answers) == teacher.loss(batch[0], logits)
    assert float(divergence(logits, logits)) == pytest.approx(0, abs=1e-6)


def test_several_paths_learn_the_labels_together(
    digits: ImageData, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = searcher_of(digits, QUICK.override({"step_paths": 3}))
    with monkeypatch.context() as patch:
        watched = Watched(searcher, patch)
        before = copy.deepcopy(searcher.state.supernet.state_dict())
        figures = WeightSteps(searcher.state).take(*batch)
    assert set(figures) == {"loss"}
    assert len(watched.paths) == 3
    searcher.state.supernet.load_state_dict(before)
    parts = [gradients_by_hand(searcher, [path], *batch) for path in watched.paths]
    assert figures["loss"] == pytest.approx(sum(losses[0] for _, losses in parts) / 3, rel=1e-5)
    for name, grad in watched.gradients.items():
        mean = sum((own.get(name, torch.zeros_like(grad)) for own, _ in parts), torch.zeros_like(grad)) / 3
        torch.testing.assert_close(grad, mean, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_steps": "sandwich"},
        {"weight_steps": "sandwich", "step_paths": 1, "paths": "fair", "weights": "independent"},
        {"paths": "fair", "norm": "batchnorm"},
    ],
    ids=["sandwich", "fair-sandwich", "fair"],
)
def test_a_stopped_search_goes_on_to_the_byte(
    changes: dict[str, Any], digits: ImageData, tmp_path: Path
) -> None:
    space = parse_space(TWO_KINDS, "two-kinds.yaml").with_norm(changes.pop("norm", "layernorm"))
    config = QUICK.override({**changes, "random_networks": 1, "effect_networks": 0, "k_best": 2})
    run_search(searcher_of(digits, config, space), tmp_path / "whole", {"data": "digits"})
    folder = tmp_path / "stopped"
    searcher = searcher_of(digits, config, space)
    step = searcher.step

    def step_and_stop() -> dict[str, Any]:
        row = step()
        if searcher.steps_done == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    searcher.step = step_and_stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run_search(searcher, folder, {"data": "digits"})
    run_search(searcher_of(digits, config, space), folder, {"data": "digits"}, resume=True)
    for name in (ARCH_FILE, METRICS_FILE, SUPERNET_FILE, SEARCH_FILE):
        assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes(), name
    assert ("distilled_loss" in (folder / METRICS_FILE).read_text()) == ("weight_steps" in changes)


def test_a_state_with_impossible_turns_is_refused(digits: ImageData) -> None:
    space = parse_space(TWO_KINDS, "two-kinds.yaml")
    searcher = searcher_of(digits, QUICK.override({"paths": "fair"}), space)
    for _ in range(3):
        searcher.step()
    saved = searcher.to_dict()
    assert sum(saved["fair_counts"]) > 0
    with pytest.raises(ValueError, match="fair_counts: -1"):
        searcher.load({**saved, "fair_counts": [-1, *saved["fair_counts"][1:]]})
    assert "fair_counts" not in searcher_of(digits, QUICK).to_dict()


# ---- the whole network


def test_the_whole_is_the_largest_network_alone(
    digits: ImageData, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = searcher_of(digits, QUICK.override({"weight_steps": "whole"}))
    space = searcher.problem.space
    watched, steps = Watched(searcher, monkeypatch), WeightSteps(searcher.state)
    for _ in range(3):
        assert "distilled_loss" not in steps.take(*batch)
    _, largest = smallest_and_largest(space)
    assert watched.paths == [largest.indices(space)] * 3


def test_the_whole_is_the_pretrained_network_where_there_is_one(
    digits: ImageData, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network()
    space = derived_space(network.space)
    table = compute_table(load_device("cpu"), space)
    limits = (latency_limit(table, (table.fastest_ms + table.slowest_ms) / 2),)
    images, labels = batch
    images = images.expand(-1, 3, -1, -1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for changes in ({"weight_steps": "whole"}, {"head_epochs": 1, "warmup_epochs": 2}):
        searcher = Searcher(space, limits, digits, QUICK.override(changes), pretrained=network)
        with monkeypatch.context() as patch:
            watched = Watched(searcher, patch)
            WeightSteps(searcher.state).take(images.contiguous(), labels)
        assert watched.paths == [own_arch(space, network.space).indices(space)]
    # it is as probable as all others together
    supernet = searcher.state.supernet
    shares = probabilities(supernet.logits().detach(), supernet.mask)
    for row, place, position in zip(shares, watched.paths[0], space.positions, strict=True):
        share = 1.0 if len(position.candidates) == 1 else 0.5
        assert float(row[int(place)]) == pytest.approx(share, abs=0.01)  # type: ignore[arg-type]


def test_the_whole_takes_no_number_of_paths() -> None:
    with pytest.raises(UsageError, match="`step_paths=2`: `weight_steps='whole'` draws no paths"):
        QUICK.override({"weight_steps": "whole", "step_paths": 2})


# ---- pretrained weights


def with_pretrained(
    data: ImageData, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], classifier: bool = False
) -> Searcher:
    """Return a search whose weights all count as pretrained but the classifier's and those of one block."""
    build = Supernet.__init__

    def build_pretrained(supernet: Supernet, *arguments: Any) -> None:
        build(supernet, *arguments)
        supernet.pretrained = frozenset(
            name
            for name, weight in supernet.named_parameters()
            if weight is not supernet.alpha and not is_classifier(name) and ".2_1." not in name
        )

    monkeypatch.setattr(Supernet, "__init__", build_pretrained)
    space = parse_space(TINY_SPACE, "tiny.yaml").with_norm("batchnorm")
    return searcher_of(data, QUICK.override({"batch_size": 32, **changes}), space)


def test_the_classifier_is_trained_alone_at_first(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = with_pretrained(digits, monkeypatch, {"head_epochs": 1, "warmup_epochs": 2})
    supernet = searcher.state.supernet
    ran: list[tuple[Route, ...]] = []
    forward = supernet.forward

    def run(x: Tensor, routes: Any, channels: Any = None) -> Tensor:
        ran.append(tuple(routes))
        return forward(x, routes, channels)

    monkeypatch.setattr(supernet, "forward", run)
    before = copy.deepcopy(supernet.state_dict())
    steps = searcher.schedule.steps_per_epoch
    rates = []
    for _ in range(steps):
        searcher.step()
        rates.append(searcher.state.weight_optimizer.param_groups[0]["lr"])
    for name, tensor in supernet.state_dict().items():  # batch norms' statistics are among them
        assert torch.equal(tensor, before[name]) != is_classifier(name), name
    assert all(weight.requires_grad for weight in searcher.state.weights)
    assert set(ran) == {smallest_and_largest(searcher.problem.space)[1].indices(searcher.problem.space)}
    # the whole rate, then a warm-up for all weights
    config = searcher.problem.config
    assert rates == pytest.approx([config.learning_rate] * (steps - 1) + [0.1 * config.learning_rate])
    searcher.step()
    after = supernet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name in changed for name in supernet.pretrained)
    assert any(name.endswith("running_mean") for name in changed)
    while searcher.is_warming_up:
        searcher.step()
    assert len(set(ran)) > 1


def test_pretrained_weights_move_by_their_share_of_the_rate(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's first step moves a weight by its rate, whatever the gradient, where there is no decay."""
    changes = {"pretrained_rate": PRETRAINED_RATE, "weight_decay": 0.0, "weight_steps": "sandwich"}
    searcher = with_pretrained(digits, monkeypatch, changes)
    supernet = searcher.state.supernet
    before = copy.deepcopy(supernet.state_dict())
    rate = searcher.state.weight_optimizer.param_groups[0]["lr"]
    searcher.step()
    moved = {True: 0, False: 0}
    for name, weight in supernet.named_parameters():
        by = (weight.detach() - before[name]).abs()
        # a bias before a batch norm has rounding as its gradient
        if name == "alpha" or weight.ndim == 1 or float(by.max()) == 0:
            continue
        is_slow = name in supernet.pretrained
        moved[is_slow] += 1
        assert float(by.max()) == pytest.approx(rate * (PRETRAINED_RATE if is_slow else 1), rel=1e-2), name
    assert min(moved.values()) > 2, moved


def test_settings_for_pretrained_weights_are_refused_without_any(digits: ImageData) -> None:
    for changes, asked in (
        ({"head_epochs": 1}, "`head_epochs=1`: "),
        ({"pretrained_rate": 0.5, "head_epochs": 1}, "`head_epochs=1` and `pretrained_rate=0.5`: "),
    ):
        with pytest.raises(UsageError, match=f"^{asked}the supernet has no pretrained weights"):
            searcher_of(digits, QUICK.override(changes))


def test_a_pretrained_search_goes_on_to_the_bit(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"head_epochs": 1, "pretrained_rate": 0.1, "warmup_epochs": 2, "paths": "fair"}
    searcher = with_pretrained(digits, monkeypatch, changes)
    steps = searcher.schedule.steps_per_epoch
    for _ in range(steps - 2):
        searcher.step()
    saved = copy.deepcopy(searcher.to_dict())
    expected = [searcher.step()["loss"] for _ in range(5)]
    twin = with_pretrained(digits, monkeypatch, changes)
    twin.load(saved)
    assert [twin.step()["loss"] for _ in range(5)] == expected
    assert all(math.isfinite(loss) for loss in expected)
    for name, tensor in searcher.state.supernet.state_dict().items():
        assert torch.equal(tensor, twin.state.supernet.state_dict()[name]), name


def test_steps_train_a_supernet_that_was_last_evaluated(
    digits: ImageData, batch: tuple[Tensor, Tensor]
) -> None:
    searcher = searcher_of(digits, QUICK.override({"threads": 1}))
    supernet = searcher.state.supernet
    for step in (searcher._weight_step, searcher._arch_step):
        supernet.eval()
        step(*batch)
        assert all(module.training for module in supernet.modules())
