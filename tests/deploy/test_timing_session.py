"""A timing session: its visits, the samples saved on Ctrl-C, and refusals to resume."""

import json
import math
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest

from qnas.common.errors import CheckpointError, Interrupted
from qnas.deploy.timing import MOST_REPEATS, Call, Maker, Timing, host_stopwatch, pool, time_all

LOADS = 2


class Bench:
    """Calls on a clock of their own; optionally a Ctrl-C at a given call."""

    def __init__(self, interrupt_at: int = -1) -> None:
        self.now_ns = 0
        self.calls = 0
        self.made: list[str] = []
        self.most_alive = 0
        self._alive: weakref.WeakSet[Call] = weakref.WeakSet()
        self._interrupt_at = interrupt_at

    def maker(self, name: str, *costs_ms: float) -> Maker:
        """Return what makes an instance of each cost in turn."""

        def make() -> Call:
            cost_ms = costs_ms[self.made.count(name) % len(costs_ms)]
            self.made.append(name)

            def run() -> None:
                self.calls += 1
                self.now_ns += round(cost_ms * 1e6)
                if self.calls == self._interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)

            self._alive.add(run)
            self.most_alive = max(self.most_alive, len(self._alive))
            return run

        return make

    def time(self, makers: dict[str, Maker], folder: Path, **changes: Any) -> dict[str, Timing]:
        options: dict[str, Any] = {
            "loads": LOADS,
            "repeats": 6,
            "tolerance": 0.01,
            "request": {"machine": "this"},
            "quiet": True,
            "state_file": folder / "state.json",
            "stopwatch": host_stopwatch(lambda: self.now_ns),
        }
        return time_all(makers, **options | changes)


def two(bench: Bench) -> dict[str, Maker]:
    return {"a": bench.maker("a", 2.0), "b": bench.maker("b", 3.0)}


def test_everything_is_timed_and_nothing_is_left_behind(tmp_path: Path) -> None:
    bench = Bench()
    timings = bench.time(two(bench), tmp_path)
    assert {name: (t.median_ms, t.repeats) for name, t in timings.items()} == {"a": (2.0, 6), "b": (3.0, 6)}
    assert list(timings) == ["a", "b"]
    assert not any(tmp_path.iterdir())
    assert bench.time({}, tmp_path) == {}


def test_every_load_makes_all_anew_and_drops_them_before_the_next(tmp_path: Path) -> None:
    bench = Bench()
    names = "abcdef"
    timings = bench.time({name: bench.maker(name, 1.0) for name in names}, tmp_path, loads=4)
    assert bench.most_alive == len(names)
    orders = [tuple(bench.made[i : i + len(names)]) for i in range(0, len(bench.made), len(names))]
    assert [sorted(order) for order in orders] == [list(names)] * 4
    assert len(set(orders)) > 1
    assert {timing.repeats for timing in timings.values()} == {8}  # shares of 6 in 4 loads, rounded up


def test_instances_that_disagree_are_noise_and_the_median_follows_most() -> None:
    timing = pool([[1.0] * 10, [1.0] * 10, [1.1] * 10, [1.1] * 10, [1.0] * 10])
    assert timing.median_ms == 1.0
    # quartiles 1.0 and 1.1 of five medians and of fifty samples; sqrt(pi / 2) / 1.349 of that over root n
    error = (math.pi / 2) ** 0.5 / 1.349 * 0.1
    assert timing.spread == pytest.approx(error * (1 / 5 + 1 / 50) ** 0.5)
    assert pool([[1.0] * 10] * 3).spread == 0
    assert pool([[1.0, 1.1, 0.9]]).repeats == 3


def test_a_load_in_a_slow_spell_is_no_noise() -> None:
    assert pool([[1.0] * 10] * 4 + [[1.5] * 10]).spread == 0


def test_what_is_noisy_gets_further_loads_up_to_the_bound(tmp_path: Path) -> None:
    bench = Bench()
    timings = bench.time({"a": bench.maker("a", 1.0), "b": bench.maker("b", 1.0, 2.0)}, tmp_path)
    assert timings["a"].repeats == 6
    assert timings["b"].repeats == 6 * MOST_REPEATS
    assert (bench.made.count("a"), bench.made.count("b")) == (LOADS, LOADS * MOST_REPEATS)


def test_further_loads_end_once_instances_agree_well_enough(tmp_path: Path) -> None:
    bench = Bench()
    timing = bench.time({"a": bench.maker("a", 1.0, 1.02)}, tmp_path, tolerance=0.0085)["a"]
    assert 6 < timing.repeats < 6 * MOST_REPEATS
    assert timing.spread <= 0.0085


@pytest.mark.parametrize("before_the_end", [10, 40])  # in the second load, and in the first
def test_an_interrupted_sitting_goes_on_where_it_was(tmp_path: Path, before_the_end: int) -> None:
    whole = Bench()
    expected = whole.time(two(whole), tmp_path)
    first = Bench(interrupt_at=whole.calls - before_the_end)
    with pytest.raises(Interrupted, match=r"state\.json: `resume=True` goes on"):
        first.time(two(first), tmp_path)
    saved = json.loads((tmp_path / "state.json").read_text())["samples"]
    assert 0 < sum(len(values) for one in saved.values() for values in one) < 12
    second = Bench()
    assert second.time(two(second), tmp_path, resume=True) == expected
    assert second.calls < whole.calls
    assert len(second.made) == 2 * (LOADS - (len(first.made) - 2) // 2)  # not what is done
    assert not (tmp_path / "state.json").exists()


def test_samples_count_when_going_on_and_stay_in_their_loads(tmp_path: Path) -> None:
    state = {
        "schema": "qnas.samples/1",
        "request": {"machine": "this", "loads": LOADS},
        "samples": {"a": [[7.0], [7.0, 7.0, 7.0]], "gone": [[1.0]]},
    }
    (tmp_path / "state.json").write_text(json.dumps(state))
    bench = Bench()
    timings = bench.time(two(bench), tmp_path, resume=True, tolerance=1.0)
    assert timings["a"] == pool([[7.0, 2.0, 2.0], [7.0, 7.0, 7.0]])
    assert timings["b"] == pool([[3.0] * 3] * 2)
    assert sorted(bench.made) == ["a", "b", "b"]


def test_a_sitting_can_be_interrupted_while_it_prepares(tmp_path: Path) -> None:
    bench = Bench()

    def stopping(name: str) -> Maker:
        def make() -> Call:
            os.kill(os.getpid(), signal.SIGTERM)
            return bench.maker(name, 1.0)()

        return make

    with pytest.raises(Interrupted):
        bench.time({"a": stopping("a"), "b": stopping("b")}, tmp_path)
    assert len(bench.made) == 1
    bench.time(two(bench), tmp_path, resume=True)


def test_without_a_file_nothing_is_saved_and_that_is_said(tmp_path: Path) -> None:
    bench = Bench(interrupt_at=20)
    with pytest.raises(Interrupted, match="nothing is saved"):
        bench.time(two(bench), tmp_path, state_file=None)
    assert not any(tmp_path.iterdir())


def test_samples_of_another_request_are_refused(tmp_path: Path) -> None:
    bench = Bench(interrupt_at=20)
    with pytest.raises(Interrupted):
        bench.time({"a": bench.maker("a", 1.0)}, tmp_path, repeats=50)
    with pytest.raises(CheckpointError, match=r"machine was 'this', is 'that': `force=True`"):
        bench.time({"a": bench.maker("a", 1.0)}, tmp_path, resume=True, request={"machine": "that"})
    with pytest.raises(CheckpointError, match="loads was 2, is 3"):
        bench.time({"a": bench.maker("a", 1.0)}, tmp_path, resume=True, loads=3)


def test_missing_and_damaged_samples_are_refused(tmp_path: Path) -> None:
    bench = Bench()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        bench.time(two(bench), tmp_path, resume=True)
    request = {"machine": "this", "loads": LOADS}
    damaged: list[object] = [{"a": [1.0]}, {"a": [[-1.0]]}, {"a": [["fast"]]}, {"a": [[]]}, []]
    for samples in damaged:
        state = {"schema": "qnas.samples/1", "request": request, "samples": samples}
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="damaged"):
            bench.time(two(bench), tmp_path, resume=True)
    assert not bench.made
