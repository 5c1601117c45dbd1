import time
from pathlib import Path

import pytest

import qnas.measurement
from qnas.arch import Arch
from qnas.errors import CheckpointError, Interrupted, UsageError
from qnas.files import read_json
from qnas.latency.measured import Measured, read_measured, write_measured
from qnas.latency.timing import Call
from qnas.measurement import LOADS, measure_sample, time_files, warm
from qnas.space import SearchSpace

ARCH = Arch(("quadra_k3_e2", "identity", "quadra_k3_e2", "identity"))
TIMES_MS = {"a": 0.3, "b": 1.2}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace onnxruntime by calls that wait; the names of the files that were opened."""
    names: list[str] = []

    def session(path: Path, threads: int) -> Call:
        names.append(path.stem)

        def call() -> None:
            end = time.perf_counter() + TIMES_MS[path.stem] / 1e3
            while time.perf_counter() < end:
                pass

        return call

    monkeypatch.setitem(qnas.measurement.SESSIONS, "onnxruntime", session)
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "latencies.csv"
    write_measured(path, [Measured(name, ARCH) for name in TIMES_MS])
    for name in TIMES_MS:
        (tmp_path / f"{name}.onnx").touch()
    return path


def measure(file: Path, space: SearchSpace, *, threads: int = 1, force: bool = False) -> int:
    done = measure_sample(
        file, space, runtime="onnxruntime", threads=threads, repeats=5, tolerance=1.0, force=force, quiet=True
    )
    return len(done.timings)


def test_the_times_of_all_networks_are_filled_in(
    file: Path, tiny_space: SearchSpace, opened: list[str]
) -> None:
    assert measure(file, tiny_space) == 2
    for row in read_measured(file, tiny_space):
        assert row.latency_ms is not None
        assert row.p95_ms is not None
        assert TIMES_MS[row.name] <= row.latency_ms <= row.p95_ms
        assert row.latency_ms < 2 * TIMES_MS[row.name]
        assert row.runtime.startswith("onnxruntime ")
        assert "1 thread" in row.runtime
    assert {path.suffix for path in file.parent.iterdir()} == {".csv", ".onnx"}


def test_what_is_measured_is_not_measured_again(
    file: Path, tiny_space: SearchSpace, opened: list[str]
) -> None:
    measure(file, tiny_space)
    before = file.read_text(encoding="utf-8")
    opened.clear()
    assert measure(file, tiny_space) == 0
    assert opened == []
    assert file.read_text(encoding="utf-8") == before
    assert measure(file, tiny_space, force=True) == 2
    assert opened == ["a", "b"] * LOADS


def test_every_load_has_its_share_of_the_visits(file: Path, opened: list[str]) -> None:
    files = {name: file.parent / f"{name}.onnx" for name in TIMES_MS}
    timings = time_files(files, repeats=10)
    assert opened[: 2 * LOADS] == ["a", "b"] * LOADS
    for name, timing in timings.items():
        assert timing.repeats >= 10
        assert TIMES_MS[name] <= timing.median_ms < 2 * TIMES_MS[name]


def test_times_of_another_runtime_are_not_mixed_in(
    file: Path, tiny_space: SearchSpace, opened: list[str]
) -> None:
    write_measured(file, [Measured("a", ARCH, 1.0, runtime="a board"), Measured("b", ARCH)])
    before = file.read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match="has times of 'a board', this is 'onnxruntime"):
        measure(file, tiny_space)
    assert file.read_text(encoding="utf-8") == before


def test_an_interrupted_measurement_goes_on_from_its_samples(
    file: Path, tiny_space: SearchSpace, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping:
        def __init__(self) -> None:
            self.asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked > 6  # two files loaded, a round, and the same once more

    class Signals:
        def __enter__(self) -> Stopping:
            return Stopping()

        def __exit__(self, *_: object) -> None:
            pass

    before = file.read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(qnas.measurement, "interruptible", Signals)
        with pytest.raises(Interrupted, match="the same command goes on from them"):
            measure(file, tiny_space)
    assert file.read_text(encoding="utf-8") == before
    state = file.with_suffix(".samples.json")
    earlier = read_json(state, CheckpointError)["samples"]
    assert {name: len(samples) for name, samples in earlier.items()} == {"a": 2, "b": 2}
    # earlier samples count: with times of their own they show in the median
    state.write_text(state.read_text().replace(str(earlier["a"][0]), "77.0"), encoding="utf-8")
    measure(file, tiny_space)
    assert not state.exists()
    p95_ms = next(row.p95_ms for row in read_measured(file, tiny_space) if row.name == "a")
    assert p95_ms is not None
    assert p95_ms > 10
    measure(file, tiny_space)
    state.write_text('{"schema": "qnas.samples/1", "runtime": "another", "samples": {}}', encoding="utf-8")
    write_measured(file, [Measured(name, ARCH) for name in TIMES_MS])
    with pytest.raises(CheckpointError, match="samples of 'another'"):
        measure(file, tiny_space)


def test_a_missing_file_and_an_unknown_runtime_are_refused(file: Path, tiny_space: SearchSpace) -> None:
    (file.parent / "b.onnx").unlink()
    with pytest.raises(UsageError, match=r"b\.onnx: no such file"):
        measure(file, tiny_space)
    with pytest.raises(UsageError, match="unknown runtime 'onnx': did you mean onnxruntime"):
        measure_sample(file, tiny_space, runtime="onnx", threads=1)


def test_a_warm_stopwatch_does_not_time_the_first_run() -> None:
    runs: list[str] = []

    def stopwatch(call: Call, loops: int) -> float:
        runs.append("start")
        for _ in range(loops):
            call()
        runs.append("stop")
        return 1.0

    assert warm(stopwatch)(lambda: runs.append("run"), 2) == 1.0
    assert runs == ["run", "start", "run", "run", "stop"]
