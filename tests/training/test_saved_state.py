"""States of other runs, and states that somebody made: refused before anything is trained with them."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.mutants import check_refusal, document_mutants
from helpers.tiny import TINY_SPACE
from torch import Tensor

from qnas.common.errors import CheckpointError, TrainingError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.subnet import build_subnet
from qnas.search.config import SearchConfig
from qnas.search.searcher import Searcher
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import make_arch
from qnas.spaces.space import parse_space
from qnas.training.loop import Stepper, _restore
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.saved_state import check_form
from qnas.training.subnet_trainer import SubnetTrainer

SPACE = parse_space(TINY_SPACE, "tiny.yaml")
CHOICES = ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2")
TRAIN = TrainConfig(
    recipe=Recipe(resolution_px=8, epochs=3, batch_size=512, learning_rate=5e-3, ema_decay=0.9)
)
SEARCH = SearchConfig(
    preset="test",
    resolution_px=8,
    warmup_epochs=1,
    search_epochs=2,
    batch_size=512,
    learning_rate=5e-3,
    arch_learning_rate=0.1,
    arch_every=1,
    random_networks=0,
)
STEPS = 3  # of the saved states: an epoch of the training has two, the warm-up of the search two


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


def trainer(data: ImageData) -> Stepper:
    torch.manual_seed(0)
    return SubnetTrainer(build_subnet(SPACE, make_arch(SPACE, CHOICES), 10), data, TRAIN)


def searcher(data: ImageData) -> Stepper:
    table = compute_table(load_device("vpu"), SPACE)
    return Searcher(SPACE, (latency_limit(table, (table.fastest_ms + table.slowest_ms) / 2),), data, SEARCH)


@pytest.fixture(scope="module", params=[trainer, searcher])
def made(request: pytest.FixtureRequest, digits: ImageData) -> tuple[Callable[[], Stepper], dict[str, Any]]:
    """What makes a stepper, and a state as a checkpoint has it."""
    stepper = request.param(digits)
    for _ in range(STEPS):
        stepper.step()
    random = {"cpu": torch.get_rng_state(), "cuda": []}
    saved = copy.deepcopy({"stepper": stepper.to_dict(), "metrics_bytes": 10, "random": random})
    return lambda: request.param(digits), saved


def go_on(make: Callable[[], Stepper], saved: Any) -> Stepper:
    """Restore a state, take a step with it, and describe it."""
    stepper = make()
    _restore(stepper, saved, Path("run"))
    if stepper.steps_done < stepper.total_steps:
        stepper.summary(stepper.step())
        stepper.phase  # noqa: B018  # must not fail
    return stepper


def test_a_state_of_this_run_is_taken(made: tuple[Callable[[], Stepper], dict[str, Any]]) -> None:
    make, saved = made
    assert go_on(make, copy.deepcopy(saved)).steps_done == STEPS + 1


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


def tensor_mutants(document: Any, count: int, seed: int) -> Iterator[Any]:
    """Yield states in which a tensor has another shape or type, or is none, or other values are tensors."""
    rng = Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(document)
        inside, key = rng.choice(list(places(changed)))
        value = inside[key] if isinstance(inside[key], Tensor) else torch.zeros(2, 3)
        changes: tuple[Callable[[Tensor], Any], ...] = (
            *(lambda t: t.double(), lambda t: t.flatten(), lambda t: t[None], lambda t: t.tolist()),
            *(lambda t: t.float() * math.nan, lambda t: t.bool(), lambda t: t.to(torch.complex64)),
            *(
                lambda t: torch.zeros(0),
                lambda t: torch.zeros(()),
                lambda t: t.to_sparse(),
                lambda t: t.int(),
            ),
        )
        inside[key] = rng.choice(changes)(value)
        yield changed


def attempts(make: Callable[[], Stepper], states: Iterator[Any]) -> tuple[int, int]:
    """Go on from each state; return how many were refused and how many taken."""
    refused = taken = 0
    for state in states:
        try:
            go_on(make, state)
            taken += 1
        except (CheckpointError, TrainingError) as error:
            if isinstance(error, CheckpointError):
                check_refusal(error)
            refused += 1
    return refused, taken


@pytest.mark.parametrize(
    "count", [pytest.param(25, id="some"), pytest.param(300, id="many", marks=pytest.mark.slow)]
)
def test_any_state_is_taken_or_refused_in_one_line(
    count: int, made: tuple[Callable[[], Stepper], dict[str, Any]]
) -> None:
    make, saved = made
    for mutants in (document_mutants, tensor_mutants):
        refused, taken = attempts(make, mutants(saved, count, seed=count))
        assert refused > taken


def refuse(make: Callable[[], Stepper], saved: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^run: the checkpoint is not of this run: .*{message}"):
        go_on(make, saved)


def test_of_the_optimiser_no_other_moments_and_no_other_options(digits: ImageData) -> None:
    stepper = trainer(digits)
    stepper.step()

    def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state(), "cuda": []}
        state = copy.deepcopy(stepper.to_dict())
        saved = {"stepper": state, "metrics_bytes": 0, "random": random}
        change(state)
        return saved

    def make() -> Stepper:
        return trainer(digits)

    refuse(
        make,
        changed(lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 2))),
        re.escape("optimizer.0.exp_avg: float32 (1, 2), expected float32"),
    )
    refuse(make, changed(lambda s: s["optimizer"]["state"].update({999: {}})), "weight 999 of")
    refuse(
        make, changed(lambda s: s["optimizer"]["param_groups"][0].update(eps=1.0)), "eps: 1.0, expected 1e-08"
    )
    refuse(make, changed(lambda s: s["schedule"].update(step=5)), "a mapping of")
    refuse(make, changed(lambda s: s["schedule"]["_schedulers"][0].update(total_iters=0)), "total_iters: 0")
    refuse(make, changed(lambda s: s.update(steps_done=-1)), "-1 of 6 steps")
    refuse(make, changed(lambda s: s.update(steps_done=7)), "7 of 6 steps")
    refuse(
        make, changed(lambda s: s.update(best={"epoch": 1})), "best: a mapping of 1, expected a mapping of 3"
    )
    refuse(make, changed(lambda s: s["network"].popitem()), "network: a mapping")


@pytest.mark.parametrize("saved", [{}, {"stepper": 5, "random": {}, "metrics_bytes": 0}, {"random": []}])
def test_what_is_no_state_at_all_is_refused(saved: Any, digits: ImageData) -> None:
    refuse(lambda: trainer(digits), saved, "")


@pytest.mark.parametrize(
    ("found", "fresh"),
    [
        (1, 1),
        (1, 0.5),
        (0.5, 2.0),
        (None, None),
        (0.5, None),
        ([1, 2.0, "x"], []),
        ((1, 2), (3, 4)),
        ({1: 2}, {}),
    ],
)
def test_forms_that_agree(found: object, fresh: object) -> None:
    check_form(found, fresh)


@pytest.mark.parametrize(
    ("found", "fresh"),
    [
        (1.0, 1),
        (True, 1),
        (1, True),
        ("1", 1),
        (1, None),
        ([None], []),
        ((1,), (3, 4)),
        ({1: 2}, {2: 2}),
        (5, {}),
    ],
)
def test_forms_that_do_not_agree(found: object, fresh: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_form(found, fresh)
