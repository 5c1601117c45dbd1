"""Commands that run files elsewhere: a script plays the board, which is slow or noisy, or dies midway."""

import hashlib
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
from helpers import board
from helpers.command_line import commands
from helpers.command_line import qnas as run_qnas
from helpers.pages import BLOCK, PAGES
from helpers.played_programs import write_programs

import qnas
from qnas.common.errors import CheckpointError, Interrupted, MeasurementError, UsageError
from qnas.common.files import write_json
from qnas.common.reading import read_json
from qnas.deploy.elsewhere import Elsewhere
from qnas.latency.fitting.measurements import Measured, read_measured, write_measured
from qnas.runs.found_arch import find_arch
from qnas.spaces.arch import Arch, arch_document
from qnas.spaces.space import SearchSpace

PYTHON = shlex.quote(sys.executable)
SCRIPT = shlex.quote(str(Path(board.__file__)))
PATTERN = r"avg=([0-9.e+]+)"
CONTENTS = {"a": b"x" * 100, "b": b"x" * 1000, "c d; echo": b"x" * 5000}


def played(log: Path, *options: str) -> str:
    return " ".join([PYTHON, SCRIPT, "--graph={file}", "--log", shlex.quote(str(log)), *options])


def prints(text: str) -> str:
    return f"{PYTHON} -c {shlex.quote(f'print({text!r})')} {{file}}"


@pytest.fixture
def sample(tmp_path: Path, tiny_space: SearchSpace) -> Path:
    arch = Arch(("quadra_k3_e2", "identity", "quadra_k3_e2", "identity"))
    (tmp_path / "space.yaml").write_text(tiny_space.to_yaml(), encoding="utf-8")
    write_measured(tmp_path / "latencies.csv", [Measured(name, arch) for name in CONTENTS])
    for name, content in CONTENTS.items():
        (tmp_path / f"{name}.tflite").write_bytes(content)
    return tmp_path


def runs(log: Path) -> list[str]:
    return [Path(name).stem for name in log.read_text().splitlines()]


def test_a_sample_gets_the_times_that_the_board_prints(sample: Path, tiny_space: SearchSpace) -> None:
    log = sample / "log"
    done = qnas.measure(sample, command=played(log), pattern=PATTERN, format="tflite")
    assert done.noisy == ()
    for row in read_measured(sample / "latencies.csv", tiny_space):
        # the last match, not that of the warm-up, and microseconds as the program says
        assert row.latency_ms == pytest.approx(board.time_us(CONTENTS[row.name]) / 1e3, rel=1e-4)
        assert (row.format, row.precision) == ("tflite", "fp32")
        assert row.runtime.startswith("tflite fp32: ")
        assert "board.py" in row.runtime
    rounds = runs(log)
    assert len(rounds) == 5 * len(CONTENTS)
    for start in range(0, len(rounds), len(CONTENTS)):  # each network once in a round
        assert set(rounds[start : start + len(CONTENTS)]) == CONTENTS.keys()
    assert len({tuple(rounds[i : i + 3]) for i in range(0, 15, 3)}) > 1, "rounds in one order"
    again = qnas.measure(sample, command=played(log), pattern=PATTERN, format="tflite")
    assert (again.timings, again.kept, len(runs(log))) == ({}, 3, len(rounds))


def test_noisy_networks_get_more_runs_and_are_named(sample: Path) -> None:
    log = sample / "log"
    command = played(log, "--noise", "0.5")
    done = qnas.measure(sample, command=command, pattern=PATTERN, format="tflite", repeats=3)
    assert set(done.noisy) == CONTENTS.keys()
    assert len(runs(log)) == 4 * 3 * len(CONTENTS)
    assert all(timing.median_ms < timing.p95_ms for timing in done.timings.values())


def test_a_measurement_goes_on_where_the_board_died(sample: Path, tiny_space: SearchSpace) -> None:
    log, csv = sample / "log", sample / "latencies.csv"
    before = csv.read_text(encoding="utf-8")
    command = played(log, "--dies-at", "8")
    with pytest.raises(
        MeasurementError,
        match=r"ended with code 1: its last lines: .*device offline; the samples are saved in .*"
        "latencies.samples.json: the same command goes on",
    ):
        qnas.measure(sample, command=command, pattern=PATTERN, format="tflite")
    assert csv.read_text(encoding="utf-8") == before
    state = csv.with_suffix(".samples.json")
    kept = read_json(state, CheckpointError)["samples"]
    assert sum(map(len, kept.values())) == 7
    with pytest.raises(CheckpointError, match=r"cannot resume, .*pattern was .*`force=True`"):
        qnas.measure(sample, command=command, pattern="=([0-9.]+)", format="tflite")
    done = qnas.measure(sample, command=command, pattern=PATTERN, format="tflite")
    assert len(runs(log)) == 5 * len(CONTENTS) + 1  # only the run that failed is repeated
    assert {timing.repeats for timing in done.timings.values()} == {5}
    assert not state.exists()
    assert all(row.latency_ms for row in read_measured(csv, tiny_space))


def test_ctrl_c_lets_the_run_end_and_saves(sample: Path, tiny_space: SearchSpace) -> None:
    log = sample / "log"
    command = f"{PYTHON} -c {shlex.quote(INTERRUPTING)} {os.getpid()} {shlex.quote(str(log))} {{file}}"
    with pytest.raises(Interrupted, match="the same command goes on from them"):
        qnas.measure(sample, command=command, pattern=PATTERN, format="tflite")
    kept = read_json(sample / "latencies.samples.json", CheckpointError)["samples"]
    assert sum(map(len, kept.values())) == 4
    qnas.measure(sample, command=command, pattern=PATTERN, format="tflite")
    assert len(log.read_text()) == 5 * len(CONTENTS)


INTERRUPTING = """
import os, signal, sys
from pathlib import Path
log = Path(sys.argv[2])
with log.open("a") as file:
    file.write("x")
if len(log.read_text()) == 4:
    os.kill(int(sys.argv[1]), signal.SIGINT)
print("avg=5 ms")
"""


def test_a_board_that_hangs_is_stopped_with_all_that_it_started(sample: Path) -> None:
    command = Elsewhere(played(sample / "log", "--hangs-at", "1"), PATTERN, timeout_s=1.5)
    start = time.monotonic()
    with pytest.raises(
        MeasurementError, match=r"stopped after `timeout_s=1\.5`: its last line: INFO: Loaded"
    ):
        command.time_ms([sample / "a.tflite"])
    assert time.monotonic() - start < 30
    # no process of its group is left
    names = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [name for name in names if b"time.sleep(600)" in name and str(sample).encode() in name]


@pytest.mark.parametrize(
    ("printed", "pattern", "unit", "ms"),
    [
        ("GPU Compute Time: min = 1.2 ms, median = 1.5 ms", "median = ([0-9.]+)", None, 1.5),
        ("[ INFO ]    Median:           5.17 ms", r"Median: +([0-9.]+)", None, 5.17),
        ("took 0.25 s", "took ([0-9.]+)", None, 250.0),
        ("took 250µs.", "took ([0-9.]+)", None, 0.25),
        ("took 250 samples", "took ([0-9.]+)", None, 250.0),
        ("took 250", "took ([0-9.]+)", "us", 0.25),
        ("took 250 ms", "took ([0-9.]+)", "us", 0.25),
        ("took 9\ntook 7", "took ([0-9.]+)", "s", 7000.0),
        ("avg=5\nInference timings in us: 5", "avg=([0-9.]+)", None, 0.005),
    ],
)
def test_the_unit_is_the_one_given_or_printed(
    printed: str, pattern: str, unit: str | None, ms: float, tmp_path: Path
) -> None:
    assert Elsewhere(prints(printed), pattern, unit).time_ms([tmp_path]) == pytest.approx(ms)


def test_errors_count_as_output(tmp_path: Path) -> None:
    command = f"{PYTHON} -c 'import sys; print(\"avg=3 ms\", file=sys.stderr)' {{file}}"
    assert Elsewhere(command, PATTERN).time_ms([tmp_path]) == 3.0


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        (
            "one\n\ntwo\nthree\nfour",
            r"nothing that it printed matches .*its last lines: two \| three \| four",
        ),
        ("", "nothing that it printed matches .*it printed nothing"),
        ("avg=1e999", "found '1e999', expected a time above 0"),
        ("avg=0", "found '0', expected a time above 0: its last line: avg=0"),
        ("avg=1.2.3", r"found '1\.2\.3', expected a time"),
        ("\x1b[2Jnothing", r"its last line: \\x1b\[2Jnothing"),
    ],
)
def test_an_output_without_a_time_is_shown(printed: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=message):
        Elsewhere(prints(printed), PATTERN).time_ms([tmp_path])


def test_a_name_is_an_argument_and_never_interpreted(tmp_path: Path) -> None:
    odd = tmp_path / "a b; touch gone $(touch gone) {name}.tflite"
    odd.write_bytes(b"x")
    weights = tmp_path / "b.bin"
    shows = f'{PYTHON} -c \'import sys; print(len(sys.argv), *sys.argv[1:], sep="|"); print("avg=1")\''
    command = Elsewhere(f"{shows} --graph={{file}} {{name}} {{files}} '{{print}}'", r"(\d+)\|.*")
    assert command.time_ms([odd, weights]) == 6.0
    found = Elsewhere(f"{shows} {{files}}", rf"(\d)\|{'.*'}b\.bin").time_ms([odd, weights])
    assert found == 3.0
    assert not (tmp_path / "gone").exists()
    assert not Path("gone").exists()


def test_the_push_comes_before_each_run_and_may_hold_the_file_alone(
    sample: Path, tiny_space: SearchSpace
) -> None:
    log, there = sample / "log", sample / "there" / "model.tflite"
    there.parent.mkdir()
    push = f"cp {{file}} {shlex.quote(str(there))}"
    command = played(log).replace("{file}", shlex.quote(str(there)))
    done = qnas.measure(sample, command=command, pattern=PATTERN, push=push, format="tflite", repeats=2)
    for name, timing in done.timings.items():
        assert timing.median_ms == pytest.approx(board.time_us(CONTENTS[name]) / 1e3, rel=1e-4)
    with pytest.raises(MeasurementError, match=r"^cp .* ended with code 1: .*No such file"):
        Elsewhere(command, PATTERN, push=push).time_ms([sample / "gone.tflite"])


def test_all_that_is_wrong_with_a_request_is_said_at_once() -> None:
    with pytest.raises(UsageError) as error:
        Elsewhere("no-such-program 'open", "avg=[0-9.]+", "min", "cp {name} x", timeout_s=-1)
    for part in (
        "`command=no-such-program 'open`: no closing quotation",
        "`push=cp {name} x`: expected {file}, where the path of the file belongs",
        "`pattern=avg=[0-9.]+`: expected one group, such as avg=([0-9.]+), around the number; found 0",
        "`unit=min`: ",
        "`timeout_s=-1`: expected seconds above 0",
    ):
        assert part in str(error.value)
    with pytest.raises(UsageError, match=r"no program 'no-such-program' here"):
        Elsewhere("no-such-program {file}", PATTERN)
    with pytest.raises(UsageError, match="no regular expression: missing"):
        Elsewhere("cat {file}", "avg=(")
    with pytest.raises(UsageError, match="`command`: expected a program"):
        Elsewhere(" ", PATTERN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": PATTERN}, "`pattern` belongs to a `command`"),
        ({"unit": "us"}, "`unit` belongs to a `command`"),
        ({"command": "cat {file}"}, "`command` needs a `pattern`"),
        ({"command": "cat {file}", "pattern": PATTERN, "threads": 2}, "`threads` is of this machine"),
        ({"command": "cat {file}", "pattern": PATTERN, "runtime": "onnxruntime"}, "`runtime` is of this"),
        ({"format": "tflite"}, "`format=tflite`: onnxruntime opens onnx or vpu"),
        ({"format": "tflight"}, "`format='tflight'`: did you mean tflite"),
        ({"precision": "int7"}, "`precision='int7'`: did you mean"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    given: dict[str, object], message: str, sample: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        qnas.measure(sample, **given)  # type: ignore[arg-type]


def test_times_of_two_commands_are_not_mixed(sample: Path, tiny_space: SearchSpace) -> None:
    first = played(sample / "log")
    qnas.measure(sample, command=first, pattern=PATTERN, format="tflite", repeats=2)
    rows = read_measured(sample / "latencies.csv", tiny_space)
    write_measured(sample / "latencies.csv", [rows[0], *(Measured(r.name, r.arch) for r in rows[1:])])
    with pytest.raises(CheckpointError, match=r"has times of .tflite fp32: .*board\.py.*, this is"):
        qnas.measure(sample, command=f"{first} --noise 0", pattern=PATTERN, format="tflite")


def test_the_command_line_names_its_options(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("measure", str(sample), "--format", "tflite", "--quiet", "--command")
    assert run_qnas(*words, played(sample / "log", "--dies-at", "2"), "--pattern", PATTERN) == 1
    assert "device offline; the samples are saved in" in capsys.readouterr().err
    assert run_qnas(*words, "cat {file}") != 0
    assert "--command needs a --pattern" in " ".join(capsys.readouterr().err.split())
    assert run_qnas(*words, played(sample / "log"), "--pattern", PATTERN, "--force") == 0
    shown = capsys.readouterr().out
    assert "1.700 ms to 36.00 ms" in shown
    assert "3 networks; tflite fp32: " in " ".join(shown.split())


@pytest.fixture
def exported(sample: Path, tiny_space: SearchSpace) -> Path:
    """A run's folder with an exported file, as far as a measurement reads it."""
    arch = read_measured(sample / "latencies.csv", tiny_space)[0].arch
    write_json(sample / "arch.json", arch_document(tiny_space, arch, {}))
    file = sample / "export" / "model_int8.tflite"
    file.parent.mkdir()
    file.write_bytes(CONTENTS["b"])
    digest = hashlib.sha256(CONTENTS["b"]).hexdigest()
    about = {"digests": [digest], "resolution_px": tiny_space.input.resolution_px}
    write_json(Path(f"{file}.parity.json"), about)
    return sample


def test_an_exported_file_is_timed_into_its_arch_json(exported: Path) -> None:
    options = {"pattern": PATTERN, "format": "tflite", "precision": "int8", "repeats": 2}
    done = qnas.measure(exported, command=played(exported / "log"), **options)  # type: ignore[arg-type]
    measured = find_arch(exported).document["measured"]
    assert measured == done.document["measured"]
    assert measured["p50_ms"] == pytest.approx(board.time_us(CONTENTS["b"]) / 1e3, rel=1e-4)
    assert (measured["runs"], measured["file"]) == (2, "export/model_int8.tflite")
    assert "board.py" in measured["runtime"]
    before = (exported / "arch.json").read_bytes()
    with pytest.raises(MeasurementError, match="device offline"):
        qnas.measure(exported, command=played(exported / "log", "--dies-at", "3"), **options)  # type: ignore[arg-type]
    assert (exported / "arch.json").read_bytes() == before
    with pytest.raises(
        CheckpointError, match=r"model\.tflite: no such file: run qnas export .*--format tflite "
    ):
        qnas.measure(exported, command="cat {file}", pattern=PATTERN, format="tflite")
    (exported / "export" / "model_int8.tflite").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"changed since its export: .* --precision int8 .* --force"):
        qnas.measure(exported, command="cat {file}", **options)  # type: ignore[arg-type]


def test_an_exported_file_of_another_resolution_is_refused(exported: Path) -> None:
    about = exported / "export" / "model_int8.tflite.parity.json"
    write_json(about, {**read_json(about, CheckpointError), "resolution_px": 8})
    with pytest.raises(
        CheckpointError, match="its input has 8 px, the prediction is for 32 px: run qnas export"
    ):
        qnas.measure(exported, command="cat {file}", pattern=PATTERN, format="tflite", precision="int8")


def shown_on_pages() -> list[str]:
    shown = (block.replace("\\\n", " ") for text in PAGES.values() for _, block in BLOCK.findall(text))
    lines = {line for block in shown for line in block.splitlines() if line.startswith("qnas measure ")}
    return sorted(line for line in lines if "--command" in line)


@pytest.mark.parametrize("line", shown_on_pages())
def test_the_commands_of_the_pages_find_the_times_of_real_outputs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_programs(tmp_path / "programs")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    words = shlex.split(line)[2:]
    given = commands()["measure"].make_context("measure", [*words]).params
    file = tmp_path / "model"
    file.write_bytes(b"x")
    asked = Elsewhere(given["command"], given["pattern"], given["unit"], given["push"])
    expected = {"adb": 18.0505, "trtexec": 1.19}.get(words[words.index("--command") + 1].split()[0], 5.17)
    assert asked.time_ms([file]) == pytest.approx(48.9 if "-api sync" in line else expected)


def test_the_pages_show_commands_for_phones_gpus_and_boards() -> None:
    programs = {re.sub(r".*--command '(\w+) .*", r"\1", line) for line in shown_on_pages()}
    assert programs == {"adb", "ssh", "trtexec"}
