"""A sitting: what is visited, what is saved on Ctrl-C, and what is refused when going on."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qnas.errors import CheckpointError, Interrupted
from qnas.latency.timing import MOST_REPEATS, Call, Timing, host_stopwatch
from qnas.rounds import pool, time_all


class Bench:
    """Calls on a clock of their own; optionally a Ctrl-C at a given call."""

    def __init__(self, interrupt_at: int = -1) -> None:
        self.now_ns = 0
        self.calls = 0
        self.made: list[str] = []
        self._interrupt_at = interrupt_at

    def maker(self, name: str, *costs_ms: float) -> Callable[[], Sequence[Call]]:
        def instance(cost_ms: float) -> Call:
            def run() -> None:
                self.calls += 1
                self.now_ns += round(cost_ms * 1e6)
                if self.calls == self._interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)

            return run

        def make() -> Sequence[Call]:
            self.made.append(name)
            return [instance(cost_ms) for cost_ms in costs_ms]

        return make

    def time(
        self, makers: dict[str, Callable[[], Sequence[Call]]], folder: Path, **changes: Any
    ) -> dict[str, Timing]:
        options: dict[str, Any] = {
            "repeats": 6,
            "tolerance": 0.01,
            "request": {"machine": "this"},
            "resume": False,
            "quiet": True,
            "state_file": folder / "state.json",
            "stopwatch": host_stopwatch(lambda: self.now_ns),
        }
        return time_all(makers, **options | changes)


def test_everything_is_timed_and_nothing_is_left_behind(tmp_path: Path) -> None:
    bench = Bench()
    timings = bench.time({"a": bench.maker("a", 2.0, 2.0), "b": bench.maker("b", 3.0, 3.0)}, tmp_path)
    assert {name: (t.median_ms, t.repeats) for name, t in timings.items()} == {"a": (2.0, 6), "b": (3.0, 6)}
    assert list(timings) == ["a", "b"]
    assert not any(tmp_path.iterdir())


def test_instances_that_disagree_are_noise_and_the_median_follows_most() -> None:
    timing = pool([[1.0] * 10, [1.0] * 10, [1.3] * 10])
    assert timing.median_ms == 1.0
    # standard deviation of the medians 1, 1, 1.3 by hand, over the root of three
    assert timing.spread >= 0.3 / 3**0.5 / 3**0.5
    assert pool([[1.0] * 10] * 3).spread == 0
    assert pool([[1.0, 1.1, 0.9]]).repeats == 3


def test_noisy_things_are_visited_up_to_the_bound(tmp_path: Path) -> None:
    bench = Bench()
    timings = bench.time({"a": bench.maker("a", 1.0, 1.0), "b": bench.maker("b", 1.0, 2.0)}, tmp_path)
    assert timings["a"].repeats == 6
    assert timings["b"].repeats == 6 * MOST_REPEATS


def test_an_interrupted_sitting_goes_on_where_it_was(tmp_path: Path) -> None:
    def makers(bench: Bench) -> dict[str, Callable[[], Sequence[Call]]]:
        return {"a": bench.maker("a", 2.0, 2.0), "b": bench.maker("b", 3.0, 3.0)}

    whole = Bench()
    expected = whole.time(makers(whole), tmp_path)
    first = Bench(interrupt_at=whole.calls - 10)
    with pytest.raises(Interrupted, match=r"state\.json: --resume goes on"):
        first.time(makers(first), tmp_path)
    saved = json.loads((tmp_path / "state.json").read_text())["samples"]
    assert 0 < sum(len(values) for one in saved.values() for values in one) < 12
    second = Bench()
    assert second.time(makers(second), tmp_path, resume=True) == expected
    assert second.calls < whole.calls
    assert not (tmp_path / "state.json").exists()


def test_a_sitting_can_be_interrupted_while_it_prepares(tmp_path: Path) -> None:
    bench = Bench()

    def make() -> Sequence[Call]:
        os.kill(os.getpid(), signal.SIGTERM)
        return bench.maker("a", 1.0)()

    with pytest.raises(Interrupted):
        bench.time({"a": make, "b": bench.maker("b", 1.0)}, tmp_path)
    assert bench.made == ["a"]
    bench.time({"a": bench.maker("a", 1.0), "b": bench.maker("b", 1.0)}, tmp_path, resume=True)


def test_samples_of_another_request_are_refused(tmp_path: Path) -> None:
    bench = Bench(interrupt_at=20)
    with pytest.raises(Interrupted):
        bench.time({"a": bench.maker("a", 1.0)}, tmp_path, repeats=50)
    with pytest.raises(CheckpointError, match="machine was 'this', is 'that'"):
        bench.time({"a": bench.maker("a", 1.0)}, tmp_path, resume=True, request={"machine": "that"})


def test_missing_and_damaged_samples_are_refused(tmp_path: Path) -> None:
    bench = Bench()
    makers = {"a": bench.maker("a", 1.0)}
    with pytest.raises(CheckpointError, match="nothing to resume"):
        bench.time(makers, tmp_path, resume=True)
    request = {"machine": "this"}
    damaged: list[object] = [{"a": [1.0]}, {"a": [[-1.0]]}, {"a": [["fast"]]}, []]
    for samples in damaged:
        state = {"schema": "qnas.samples/1", "request": request, "samples": samples}
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="damaged"):
            bench.time(makers, tmp_path, resume=True)
    assert not bench.made
