import os
import signal
from pathlib import Path

import pytest

import qnas.deploy.measurement
import qnas.deploy.runtimes
from qnas.common.errors import CheckpointError, Interrupted, UsageError
from qnas.common.reading import read_json
from qnas.deploy.measurement import LOADS, Here, measure_sample, time_files
from qnas.deploy.timing import Call, host_stopwatch
from qnas.latency.fitting.measurements import Measured, read_measured, write_measured
from qnas.latency.onnx.networks import read_onnx
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

ARCH = Arch(("quadra_k3_e2", "identity", "quadra_k3_e2", "identity"))
OTHER_ARCH = Arch(("quadra_k3_e2", "identity", "identity", "identity"))
TIMES_MS = {"a": 0.3, "b": 1.2}


class Opened(list[str]):
    """The names of the files that were opened; optionally a Ctrl-C when so many were."""

    interrupt_at = -1


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Replace onnxruntime by calls that move a clock of their own."""
    names = Opened()
    now_ns = 0

    def session(path: Path, threads: int) -> Call:
        names.append(path.stem)
        if len(names) == names.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

        def call() -> None:
            nonlocal now_ns
            now_ns += round(TIMES_MS[path.stem] * 1e6)

        return call

    monkeypatch.setitem(qnas.deploy.runtimes.SESSIONS, "onnxruntime", session)
    monkeypatch.setattr(qnas.deploy.measurement, "host_stopwatch", lambda: host_stopwatch(lambda: now_ns))
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "latencies.csv"
    write_measured(path, [Measured(name, ARCH) for name in TIMES_MS])
    for name in TIMES_MS:
        (tmp_path / f"{name}.onnx").touch()
    return path


def measure(file: Path, space: SearchSpace, *, threads: int = 1, force: bool = False) -> int:
    here = Here("onnxruntime", threads)
    done = measure_sample(file, space, here, repeats=5, tolerance=1e3, force=force, quiet=True)
    return len(done.timings)


def test_the_times_of_all_networks_are_filled_in(file: Path, tiny_space: SearchSpace, opened: Opened) -> None:
    assert measure(file, tiny_space) == 2
    for row in read_measured(file, tiny_space):
        assert row.latency_ms is not None
        assert row.p95_ms is not None
        assert row.latency_ms == row.p95_ms == pytest.approx(TIMES_MS[row.name])
        assert row.runtime.startswith("onnxruntime ")
        assert "1 thread" in row.runtime
    assert {path.suffix for path in file.parent.iterdir()} == {".csv", ".onnx"}


def test_what_is_measured_is_not_measured_again(file: Path, tiny_space: SearchSpace, opened: Opened) -> None:
    measure(file, tiny_space)
    before = file.read_text(encoding="utf-8")
    opened.clear()
    assert measure(file, tiny_space) == 0
    assert opened == []
    assert file.read_text(encoding="utf-8") == before
    assert measure(file, tiny_space, force=True) == 2
    assert sorted(opened) == ["a"] * LOADS + ["b"] * LOADS


def test_files_are_timed_as_those_of_a_sample(file: Path, opened: Opened) -> None:
    files = {name: file.parent / f"{name}.onnx" for name in TIMES_MS}
    timings = time_files(files, repeats=10)
    assert all(opened.count(name) >= LOADS for name in TIMES_MS)
    for name, timing in timings.items():
        assert timing.repeats >= 10
        assert timing.median_ms == pytest.approx(TIMES_MS[name])
    with pytest.raises(UsageError, match=r"unknown runtime 'torch'.*known: onnxruntime, openvino"):
        time_files(files, runtime="torch")


def test_times_of_another_runtime_are_not_mixed_in(
    file: Path, tiny_space: SearchSpace, opened: Opened
) -> None:
    write_measured(file, [Measured("a", ARCH, 1.0, runtime="a board"), Measured("b", ARCH)])
    before = file.read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match="has times of 'a board', this is 'onnxruntime"):
        measure(file, tiny_space)
    assert file.read_text(encoding="utf-8") == before


def test_an_interrupted_measurement_goes_on_from_its_samples(
    file: Path, tiny_space: SearchSpace, opened: Opened
) -> None:
    before = file.read_text(encoding="utf-8")
    opened.interrupt_at = 5  # in the third load
    with pytest.raises(Interrupted, match="the same command goes on from them"):
        measure(file, tiny_space)
    assert file.read_text(encoding="utf-8") == before
    state = file.with_suffix(".samples.json")
    earlier = read_json(state, CheckpointError)["samples"]
    assert {name: len(loads) for name, loads in earlier.items()} == {"a": 2, "b": 2}
    # earlier samples count: with times of their own they show in the 95th percentile
    state.write_text(state.read_text().replace(str(earlier["a"][0][0]), "77.0"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot resume, .*runtime was .*1 thread.*: `force=True`"):
        measure(file, tiny_space, threads=2)
    measure(file, tiny_space)
    assert not state.exists()
    p95_ms = next(row.p95_ms for row in read_measured(file, tiny_space) if row.name == "a")
    assert p95_ms is not None
    assert p95_ms > 10


def test_samples_of_a_sample_that_was_replaced_are_refused(
    file: Path, tiny_space: SearchSpace, opened: Opened
) -> None:
    opened.interrupt_at = 3
    with pytest.raises(Interrupted):
        measure(file, tiny_space)
    write_measured(file, [Measured("a", ARCH), Measured("b", OTHER_ARCH)])
    with pytest.raises(CheckpointError, match=r"networks was .*: `force=True`"):
        measure(file, tiny_space)
    assert measure(file, tiny_space, force=True) == 2


def test_a_missing_file_is_written_and_no_other(file: Path, tiny_space: SearchSpace, opened: Opened) -> None:
    (file.parent / "b.onnx").unlink()
    assert measure(file, tiny_space) == 2
    assert read_onnx(file.parent / "b.onnx").height_px == tiny_space.input.resolution_px
    assert (file.parent / "a.onnx").read_bytes() == b""


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown runtime 'onnx': did you mean onnxruntime"):
        Here("onnx")
