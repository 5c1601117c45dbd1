"""The finalists of a made-up search.json in words."""

from typing import Any

import pytest
from helpers.tiny import TWO_KINDS

from qnas.common.units import format_ms
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.finalists_text import by_rung, chosen_line, corrections_text, finalist_lines
from qnas.solver.limits import latency_limit
from qnas.spaces.space import parse_space

SPACE = parse_space(TWO_KINDS, "two-kinds.yaml")
RUNGS = [{"networks": 2, "epochs": 2}, {"networks": 1, "epochs": 4}]


def entry(number: int, accuracies: list[float], *choices: str, **others: Any) -> dict[str, Any]:
    blocks = {"quadra": sum(name != "identity" for name in choices)}
    known = {
        "number": number,
        "round": 1,
        "choices": list(choices),
        "blocks": {k: v for k, v in blocks.items() if v},
    }
    return {**known, "heldout_accuracies": accuracies, **others}


def document(**changes: Any) -> dict[str, Any]:
    networks = [
        entry(1, [0.1, 0.2], "quadra_k3_e2", "identity", "identity", "identity"),
        entry(2, [0.15, 0.25, 0.3, 0.45], "quadra_k3_e2", "quadra_k5_e2", "identity", "identity"),
    ]
    found = {"from": "supernet", "epochs": 4, "resolution_px": 32, "rounds": [{"biases": {}, "rungs": RUNGS}]}
    return {**found, "networks": networks, "winner": 2, "biases": {}, "explained": None, **changes}


def test_each_finalist_has_a_line_with_its_blocks_latency_and_accuracies() -> None:
    table = compute_table(load_device("vpu"), SPACE)
    lines = " ".join(" ".join(finalist_lines(document(), (latency_limit(table, 9.0),), SPACE)).split())
    assert "chosen finalist 2 of 2, each trained by itself from the supernet's weights, at 32 px" in lines
    assert "held-out accuracy 45.0% after 4 epochs" in lines
    assert "finalist 2 2 quadra; " in lines
    assert "held-out 20.0% (2) finalist 2" in lines
    assert "held-out 25.0% (2), 45.0% (4) corrected" in lines
    first, second = SPACE.positions[:2]
    none = second.names.index("identity")
    indices = (first.names.index("quadra_k3_e2"), none, none, none)
    interval = table.interval(indices, 0.9)
    assert interval is not None
    took, low, high = (
        format_ms(ms, round_up=up)
        for ms, up in ((table.latency_ms(indices), True), (interval.low_ms, False), (interval.high_ms, True))
    )
    assert f"finalist 1 1 quadra; {took} ({low} to {high}); held-out 20.0% (2)" in lines
    assert lines.count(" ms (") == 2


def test_the_accuracies_are_those_at_the_ends_of_rungs() -> None:
    found = document()
    assert [by_rung(found, each) for each in found["networks"]] == [[(2, 0.2)], [(2, 0.25), (4, 0.45)]]


def test_a_training_that_ended_early_says_why() -> None:
    table = compute_table(load_device("vpu"), SPACE)
    failed = entry(1, [], "identity", "identity", "identity", "identity", problem="step 3: the loss is nan")
    found = document(networks=[failed, document()["networks"][1]])
    lines = " ".join(" ".join(finalist_lines(found, (latency_limit(table, 9.0),), SPACE)).split())
    assert "finalist 1 no blocks; " in lines
    assert "ended early: step 3: the loss is nan" in lines


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"explained": None}, "not the effects: none were measured, or there are too few finalists"),
        ({"explained": -0.1}, "not the effects: no number for each kind of block predicts"),
        (
            {"explained": 0.4, "biases": {"mbconv": 0.05, "quadra": -0.02}},
            "mbconv +0.050, quadra -0.020 nats",
        ),
        ({"explained": 0.4, "biases": {"mbconv": 0.05}}, "explains 40% of what the effects leave"),
    ],
)
def test_what_the_finalists_correct_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in corrections_text(document(**changes))


def test_the_only_finalist_is_called_so() -> None:
    found = document(networks=document()["networks"][1:], winner=1, epochs=1)
    found["networks"][0] |= {"number": 1, "heldout_accuracies": [0.5]}
    assert chosen_line(found | {"from": "scratch"}) == (
        "the only finalist, trained by itself from scratch, at 32 px; held-out accuracy 50.0% after 1 epoch"
    )
