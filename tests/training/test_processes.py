"""Two gloo processes on this machine, forked for speed; torchrun itself in the slow test."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import load, write_digits
from torch import Tensor, nn

from qnas.common.errors import Interrupted, ProcessError, UsageError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.blocks import BatchNorm2d
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import ARCH_FILE, FINALISTS_FOLDER, METRICS_FILE, SEARCH_FILE, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors
from qnas.search.config import SearchConfig
from qnas.search.finalists import FinalistTrainer, finalist_training
from qnas.search.search_result import follow_search, run_search
from qnas.search.searcher import Searcher
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import arch_document, make_arch
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training import processes as distributed
from qnas.training.loop import run_to_end
from qnas.training.processes import ALONE, World, digest, joined, world_of_environment
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import SubnetTrainer, train_subnet

forks = pytest.mark.skipif(torch.cuda.is_available(), reason="torch does not fork once it has seen a GPU")

CONFIG = SearchConfig(
    preset="test",
    resolution_px=8,
    warmup_epochs=0,
    search_epochs=2,
    batch_size=128,
    learning_rate=2e-3,
    arch_learning_rate=0.05,
    arch_every=2,
    random_networks=0,
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


def searcher_of(
    space: SearchSpace, data: ImageData, config: SearchConfig = CONFIG, world: World = ALONE
) -> Searcher:
    table = compute_table(load_device("cpu"), space)
    limits = (latency_limit(table, 0.6 * table.fastest_ms + 0.4 * table.slowest_ms),)
    return Searcher(space, limits, data, config, world)


def in_two_processes(work: Callable[[World], Any], *, timeout_s: float = 60) -> list[Any]:
    """Return what `work` returns or raises in each of two processes; None of one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)

        def serve(rank: int = rank, sender: Any = sender) -> None:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            try:
                found = work(world_of_environment())
            except Exception as error:
                found = error
            sender.send(found)

        process = context.Process(target=serve)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    found = []
    try:
        for receiver in pipes:
            assert receiver.poll(timeout_s), "a process hangs"
            try:
                found.append(receiver.recv())
            except EOFError:
                found.append(None)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def state_of(searcher: Searcher) -> dict[str, Any]:
    """Return the state that must agree, as numpy arrays, which pass through a pipe."""
    state = searcher.state
    tensors = {f"supernet.{k}": v for k, v in state.supernet.state_dict().items()}
    return {
        "digest": digest(searcher.to_dict()),
        "tensors": {name: tensor.double().numpy() for name, tensor in tensors.items()},
        "multiplier": state.multiplier.value,
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


@forks
@pytest.mark.parametrize(
    ("norm", "changes"),
    [
        ("layernorm", {"weights": "independent"}),
        ("layernorm", {"weights": "shared", "gradient": "all-paths"}),
        ("layernorm", {"weights": "nested"}),
        ("layernorm", {"sampler": "balanced"}),
        ("batchnorm", {"class_weights": "balanced"}),
        ("layernorm", {"weight_steps": "sandwich"}),
        ("layernorm", {"weight_steps": "sandwich", "step_paths": 1, "paths": "fair"}),
    ],
    ids=["independent", "shared", "nested", "sampler", "batchnorm", "sandwich", "fair"],
)
def test_two_processes_are_one_to_rounding_and_equal_to_the_bit(
    norm: str, changes: dict[str, Any], tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    space = parse_space(tiny_space.to_yaml().replace("layernorm", norm), "tiny.yaml")
    config = CONFIG.override({**changes})

    def search(world: World) -> dict[str, Any]:
        searcher = searcher_of(space, digits, config, world)
        folder = tmp_path / f"of-{world.size}"
        folder.mkdir(exist_ok=True)
        run_to_end(searcher, folder, seed=0, resume=False, world=world)
        return state_of(searcher)

    alone = search(ALONE)
    both = in_two_processes(search)
    assert both[0]["digest"] == both[1]["digest"]
    # a bias that a batch norm takes away again has rounding as its gradient, which Adam scales up
    near = 5e-3 if norm == "batchnorm" else 1e-3
    for name, expected in alone["tensors"].items():
        found = torch.from_numpy(both[0]["tensors"][name])
        assert torch.allclose(found, torch.from_numpy(expected), rtol=1e-3, atol=near), name
    assert both[0]["multiplier"] == pytest.approx(alone["multiplier"], rel=1e-2, abs=1e-3)
    one, two = (rows_of(tmp_path / f"of-{size}") for size in (1, 2))
    for row, expected in zip(two, one, strict=True):
        assert row.pop("warnings", None) == expected.pop("warnings", None)
        ours, theirs = (each.pop("probabilities", []) for each in (row, expected))
        for shares, others in zip(ours, theirs, strict=True):
            assert shares == pytest.approx(others, rel=1e-3, abs=1e-3)
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """The digits as shards, decoded as they are asked for."""
    folder = write_digits(tmp_path_factory.mktemp("shards"))
    return load(folder, "shards", resolution_px=8, memory_limit_bytes=0, max_broken=None)


@forks
@pytest.mark.parametrize(
    ("source_of_data", "changes"),
    [
        ("digits", {}),
        ("digits", {"randaugment": 5.0, "mixup": 0.4, "cutmix": 1.0, "random_erasing": 0.5}),
        ("digits", {"accumulation": 4, "ema_decay": 0.9, "linear_start": True, "quadratic_gamma": 0.1}),
        ("shards", {"random_resized_crop": 0.3, "mixup": 0.4}),
        ("shards", {"random_resized_crop": 0.3, "mixup": 0.4, "sampler": "balanced"}),
        ("digits", {"mixup": 0.4, "class_weights": "balanced"}),
    ],
    ids=["plain", "augmented", "accumulated", "shards", "sampler", "weighted"],
)
def test_a_network_on_its_own_trains_alike_in_two_processes(
    source_of_data: str,
    changes: dict[str, Any],
    tiny_space: SearchSpace,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    data = request.getfixturevalue(source_of_data)
    arch = make_arch(tiny_space, ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2"))
    source = FoundArch(tiny_space, arch, arch_document(tiny_space, arch, {}), tmp_path)
    recipe = Recipe(resolution_px=8, epochs=1, batch_size=128, learning_rate=5e-3)
    of_recipe = {name: value for name, value in changes.items() if name in Recipe.model_fields}
    others = {name: value for name, value in changes.items() if name not in of_recipe}
    config = TrainConfig(recipe=recipe.override(of_recipe), **others)

    def train(world: World) -> tuple[float, float]:
        score = train_subnet(
            source,
            data,
            config,
            tmp_path / f"of-{world.size}",
            {"data": "digits"},
            from_supernet=False,
            world=world,
        )
        return score.loss, score.accuracy

    alone = train(ALONE)
    both = in_two_processes(train)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, rel=1e-3, abs=3e-3)
    for row, expected in zip(rows_of(tmp_path / "of-2"), rows_of(tmp_path / "of-1"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    one, two = (load_tensors(tmp_path / f"of-{size}" / WEIGHTS_FILE) for size in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)  # found: 1e-7


@forks
def test_a_classifier_is_trained_alone_alike_in_two_processes(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    """All weights are averaged from the second epoch on, and the classifier's alone in the first."""
    space = tiny_space.with_norm("batchnorm")
    arch = make_arch(space, ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2"))
    recipe = Recipe(resolution_px=8, epochs=2, batch_size=128, learning_rate=5e-3, head_epochs=1)
    config = TrainConfig(recipe=recipe.override({"backbone_rate": 0.1}))

    def train(world: World) -> tuple[str, dict[str, Any]]:
        torch.manual_seed(0)
        trainer = SubnetTrainer(build_subnet(space, arch, 10), digits, config, world)
        folder = tmp_path / f"of-{world.size}"
        folder.mkdir(exist_ok=True)
        run_to_end(trainer, folder, seed=0, resume=False, world=world)
        state = trainer.network.state_dict()
        return digest(state), {name: tensor.double().numpy() for name, tensor in state.items()}

    _, alone = train(ALONE)
    first, second = in_two_processes(train)
    assert first[0] == second[0]
    for name, expected in alone.items():
        found = torch.from_numpy(first[1][name])
        # as above: some biases have rounding as their gradient
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-3, atol=5e-3, msg=name)


@forks
def test_finalists_are_chosen_and_trained_alike_in_two_processes(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    config = CONFIG.override({"finalists": 3, "finalist_epochs": 1, "search_epochs": 1, "threads": 1})
    recipe = Recipe(epochs=1, batch_size=288, resolution_px=8, learning_rate=5e-3)
    training = finalist_training(config, recipe, tiny_space, len(digits.train), ALONE)

    def search(world: World) -> Any:
        searcher = searcher_of(tiny_space, digits, config, world)
        folder = tmp_path / f"of-{world.size}"
        if not world.is_main:
            return follow_search(searcher, finalists=training)
        run_search(searcher, folder, {"data": "digits"}, finalists=training)
        return json.loads((folder / SEARCH_FILE).read_text())["finalists"]

    alone = search(ALONE)
    both, other = in_two_processes(search)
    assert other is None
    assert [entry["choices"] for entry in both["networks"]] == [e["choices"] for e in alone["networks"]]
    for found, expected in zip(both["networks"], alone["networks"], strict=True):
        assert found["heldout_losses"] == pytest.approx(expected["heldout_losses"], rel=1e-2)
    one, two = (load_tensors(tmp_path / f"of-{n}" / FINALISTS_FOLDER / WEIGHTS_FILE) for n in (1, 2))
    if both["winner"] == alone["winner"]:
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=5e-3, msg=name)


@forks
def test_a_finalist_that_is_killed_in_one_process_stops_the_other(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    config = CONFIG.override({"finalists": 2, "finalist_epochs": 1, "search_epochs": 1, "threads": 1})
    recipe = Recipe(epochs=1, batch_size=128, resolution_px=8, learning_rate=5e-3)
    training = finalist_training(config, recipe, tiny_space, len(digits.train), ALONE)

    def search(world: World) -> None:
        searcher = searcher_of(tiny_space, digits, config, world)
        if world.is_main:
            run_search(searcher, tmp_path / "run", {"data": "digits"}, finalists=training)
            return
        step = FinalistTrainer.step

        def step_and_die(self: FinalistTrainer) -> dict[str, float]:
            if self.steps_done == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        FinalistTrainer.step = step_and_die  # type: ignore[method-assign]
        follow_search(searcher, finalists=training)

    left, killed = in_two_processes(search)
    assert killed is None
    assert isinstance(left, ProcessError), left
    assert "process 0 of 2 waited for another one" in str(left)


@forks
def test_the_others_stop_at_once_when_a_process_is_killed(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    def search(world: World) -> None:
        searcher = searcher_of(tiny_space, digits, CONFIG, world)
        step = searcher.step

        def step_and_die() -> dict[str, float]:
            if world.rank == 1 and searcher.steps_done == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        searcher.step = step_and_die  # type: ignore[method-assign]
        run_to_end(searcher, tmp_path, seed=0, resume=False, world=world)

    start = time.monotonic()
    left, killed = in_two_processes(search)
    assert killed is None
    assert isinstance(left, ProcessError), left
    assert "process 0 of 2 waited for another one" in str(left)
    assert "`resume=True` goes on from the last checkpoint" in str(left)
    assert time.monotonic() - start < 30


@forks
def test_the_others_stop_after_the_timeout_when_a_process_hangs(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))

    def search(world: World) -> float:
        searcher = searcher_of(tiny_space, digits, CONFIG, world)
        step = searcher.step

        def step_and_hang() -> dict[str, float]:
            if world.rank == 1 and searcher.steps_done == 5:
                time.sleep(4)
            return step()

        searcher.step = step_and_hang  # type: ignore[method-assign]
        start = time.monotonic()
        with pytest.raises(ProcessError, match="was stopped or does not answer"):
            run_to_end(searcher, tmp_path, seed=0, resume=False, world=world)
        return time.monotonic() - start

    waited_s, hung_s = in_two_processes(search)
    assert waited_s < hung_s


@forks
def test_all_processes_stop_after_the_same_step_and_go_on_as_if_they_had_not(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    """The signal reaches one process alone, and not the main one."""

    def search(world: World, folder: Path, *, stops: bool, resume: bool) -> dict[str, Any]:
        searcher = searcher_of(tiny_space, digits, CONFIG, world)
        step = searcher.step

        def step_and_stop() -> dict[str, float]:
            if stops and world.rank == 1 and searcher.steps_done == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        searcher.step = step_and_stop  # type: ignore[method-assign]
        folder.mkdir(exist_ok=True)
        try:
            run_to_end(searcher, folder, seed=0, resume=resume, world=world)
        except Interrupted:
            return {"stopped after": searcher.steps_done}
        return state_of(searcher)

    whole, part = tmp_path / "whole", tmp_path / "part"
    undisturbed = in_two_processes(lambda world: search(world, whole, stops=False, resume=False))
    stopped = in_two_processes(lambda world: search(world, part, stops=True, resume=False))
    assert stopped == [{"stopped after": 8}] * 2
    resumed = in_two_processes(lambda world: search(world, part, stops=False, resume=True))
    assert [found["digest"] for found in resumed] == [found["digest"] for found in undisturbed]
    assert (part / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()


@forks
def test_processes_that_drift_apart_are_found_out() -> None:
    def look(world: World) -> None:
        with joined(world):
            world.check_same({"weights": [torch.ones(3), 1.0]})
            world.check_same({"weights": [torch.ones(3) * (1 + world.rank * 1e-6), 1.0]})

    for found in in_two_processes(look):
        assert isinstance(found, ProcessError)
        assert "processes 1 hold other weights than process 0" in str(found)


@forks
def test_what_the_main_process_says_holds_and_any_flag_counts() -> None:
    def talk(world: World) -> tuple[Any, ...]:
        with joined(world):
            mean = torch.tensor([1.0, 3.0]) * (1 + 2 * world.rank)
            strided = torch.arange(4.0).view(2, 2).t() * (1 + world.rank)
            world.average([mean, strided])
            flags = world.any(world.rank == 1), world.any(False)
            return world.from_main({"rank": world.rank}), flags, mean.tolist(), strided.tolist()

    for found in in_two_processes(talk):
        assert found == ({"rank": 0}, (True, False), [2.0, 6.0], [[0.0, 3.0], [1.5, 4.5]])


@forks
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(momentum: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    images, pull = (torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))

    def run_norm(norm: nn.BatchNorm2d, x: Tensor, grad: Tensor) -> list[Any]:
        norm = norm.double().train()
        x = x.clone().requires_grad_()
        y = norm(x)
        y.backward(grad)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values = (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)
        return [value.detach().numpy() for value in values if value is not None]

    def halves(world: World) -> list[Any]:
        with joined(world):
            part = slice(2 * world.rank, 2 * world.rank + 2)
            return run_norm(BatchNorm2d(3, momentum=momentum), images[part], pull[part])

    y, grad, weight, bias, mean, variance = map(
        torch.from_numpy, run_norm(nn.BatchNorm2d(3, momentum=momentum), images, pull)
    )
    for rank, found in enumerate(in_two_processes(halves)):
        part = slice(2 * rank, 2 * rank + 2)
        values = [torch.from_numpy(value) for value in found]
        for value, expected in zip(values, (y[part], grad[part]), strict=False):
            torch.testing.assert_close(value, expected)
        torch.testing.assert_close(values[4], mean)
        torch.testing.assert_close(values[5], variance)
        assert weight.shape == values[2].shape == bias.shape == values[3].shape


def test_alone_nothing_is_averaged_or_refused() -> None:
    values = torch.tensor([1.0, 2.0])
    ALONE.average([values])
    ALONE.check_batch(7)
    assert values.tolist() == [1.0, 2.0]
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert world_of_environment() == ALONE


def test_a_batch_that_cannot_be_split_is_refused(tiny_space: SearchSpace, digits: ImageData) -> None:
    with pytest.raises(UsageError, match=r"128 images cannot be split over 3 processes: `batch_size=126`"):
        searcher_of(tiny_space, digits, CONFIG, World(rank=0, size=3))
    network = nn.Linear(2, 2)
    config = TrainConfig(recipe=Recipe(resolution_px=8, epochs=1, batch_size=9, learning_rate=5e-3))
    with pytest.raises(UsageError, match="9 images cannot be split over 2"):
        SubnetTrainer(network, digits, config, World(rank=0, size=2))


@pytest.mark.slow
def test_torchrun_searches_is_killed_and_resumes(tiny_yaml: Path, tmp_path: Path) -> None:
    """The command line: a process is killed with -9, the run ends with a message, and goes on."""
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "qnas.commands", "search", "--device", "cpu", "--budget", "250us", "--space", str(tiny_yaml)),
        *("--resolution", "8", "--epochs", "40", "--warmup-epochs", "1", "--out", str(out)),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (out / METRICS_FILE).is_file() or len(rows_of(out)) < 30:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(worker_of(process.pid, rank=1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "qnas: error: process 0 of 2 waited for another one that was stopped" in errors
    assert not (out / ARCH_FILE).exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\naccuracy ") == 1, "the main process alone prints"
    document = json.loads((out / ARCH_FILE).read_text())
    assert document["latency_ms"] <= 0.25
    steps = [row["step"] for row in rows_of(out)]
    assert steps == list(range(1, len(steps) + 1))


def worker_of(parent: int, rank: int) -> int:
    """Return the process that torchrun started with this rank."""
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return child
    raise AssertionError(f"no process of rank {rank} under {parent}")
