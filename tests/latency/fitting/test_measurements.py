from pathlib import Path

import pytest
from helpers.mutants import check_refusal

from qnas.common.errors import TableError
from qnas.latency.fitting.measurements import (
    Measured,
    measured_only,
    read_measured,
    the_one,
    write_measured,
)
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

CHOICES = ("quadra_k3_e2", "identity", "quadra_k3_e2", "identity")
WORDS = " ".join(CHOICES)
HEADER = "name,choices,latency_ms,p95_ms,runtime\n"


def written(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / "latencies.csv"
    path.write_text(header + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_networks_read_back_as_they_were_written(tiny_space: SearchSpace, tmp_path: Path) -> None:
    rows = (
        Measured("a", Arch(CHOICES), 1.25, 1.5, "a runtime, 1 thread"),
        Measured("b", Arch(CHOICES)),
    )
    write_measured(tmp_path / "t.csv", rows)
    assert read_measured(tmp_path / "t.csv", tiny_space) == rows


def test_columns_that_are_not_needed_may_be_left_out_and_others_added(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    path = written(tmp_path, f"2.5,first,a,{WORDS}", header="\ufefflatency_ms,note,name,choices\n")
    assert read_measured(path, tiny_space) == (Measured("a", Arch(CHOICES), 2.5),)


def test_all_problems_are_told_with_line_and_column(tiny_space: SearchSpace, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"a,{WORDS},1.5,,",
        f"a,{WORDS},fast,,",
        f",{WORDS},-1,,",
        "b,identity identity,2,,",
        f"c,{WORDS.replace('k3_e2', 'k9_e2')},2,,",
    )
    with pytest.raises(TableError) as error:
        read_measured(path, tiny_space)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "line 3, latency_ms: 'fast', expected milliseconds above 0 or nothing" in text
    assert "line 3, name: 'a' is there twice" in text
    assert "line 4, name: empty" in text
    assert "line 4, latency_ms: '-1'" in text
    assert "line 5, choices: 2 choices, but space tiny has 4 positions" in text
    assert "and 1 more" in text
    assert "\n" not in text


@pytest.mark.parametrize("time", ["0", "nan", "inf", "1,5"])
def test_what_is_no_latency_is_refused(time: str, tiny_space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path, f'a,{WORDS},"{time}",,')
    with pytest.raises(TableError, match="line 2, latency_ms: "):
        read_measured(path, tiny_space)


def test_a_file_of_another_form_is_refused(tiny_space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file, expected the CSV that qnas sample writes"):
        read_measured(tmp_path / "none.csv", tiny_space)
    with pytest.raises(TableError, match="columns missing: choices, latency_ms"):
        read_measured(written(tmp_path, "a", header="name\n"), tiny_space)
    with pytest.raises(TableError, match="no networks in it"):
        read_measured(written(tmp_path), tiny_space)


def test_networks_without_a_latency_are_named(tmp_path: Path) -> None:
    rows = [Measured("a", Arch(CHOICES), 1.0), *(Measured(name, Arch(CHOICES)) for name in "bcdef")]
    with pytest.raises(TableError, match="latency_ms: empty for b, c, d, and 2 more: fill in 5 of 6"):
        measured_only(rows, tmp_path / "x.csv")
    assert measured_only(rows[:1], tmp_path / "x.csv") == (rows[0],)


def test_times_of_two_runtimes_are_refused(tmp_path: Path) -> None:
    rows = [Measured(name, Arch(CHOICES), 1.0, runtime=f"runtime {name}") for name in "ab"]
    with pytest.raises(TableError, match="runtime: 'runtime a' and 'runtime b': expected one"):
        the_one("runtime", rows, tmp_path / "x.csv")
    assert the_one("runtime", rows[:1], tmp_path / "x.csv") == "runtime a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"a,{WORDS},1e-300,,", "line 2, latency_ms: '1e-300', expected milliseconds above 0 or nothing"),
        (f"a,{WORDS},1e300,,", "line 2, latency_ms: '1e300'"),
        (f"a,{WORDS},{'9' * 5000},,", "line 2, latency_ms: '999"),
        (f"a,{'x' * 5000},1,,", "line 2, choices: 1 choices, but space tiny has 4 positions"),
        (f"a,{WORDS.replace('k3', 'k' * 5000)},1,,", "line 2, choices: position 1.1: 'quadra_kkk"),
        ("\x1b[2J\u2028,,1,,", "line 2, choices: 0 choices"),
        ("a,b,c,d,e,f", "line 2: 6 fields, expected 5; a field with a comma stands in quotes"),
        ('a,"b', "line 2: not CSV: "),
        (f"a,{'x' * 100_001},1,,", "line 2: a field of over 100,000 characters"),
        (f"{'n' * 5000},{WORDS},1,,x\n{'n' * 5000},{WORDS},1,,x", "line 3, name: 'nnn"),
    ],
)
def test_what_a_row_may_not_hold_is_one_short_line(
    line: str, message: str, tiny_space: SearchSpace, tmp_path: Path
) -> None:
    path = written(tmp_path, line)
    with pytest.raises(TableError) as error:
        read_measured(path, tiny_space)
    assert str(error.value).startswith(f"{path}: {message}")
    check_refusal(error.value, path)


def test_columns_that_are_there_twice_are_refused(tiny_space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path, header=HEADER.replace("p95_ms", "name"))
    with pytest.raises(TableError, match="columns there twice: name; expected name,choices,latency_ms"):
        read_measured(path, tiny_space)


def test_runtimes_that_differ_are_one_short_line(tiny_space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path, f"a,{WORDS},1,,{'r' * 5000}", f"b,{WORDS},1,,{'s' * 5000}")
    with pytest.raises(TableError) as error:
        the_one("runtime", read_measured(path, tiny_space), path)
    check_refusal(error.value, path)


def test_a_file_of_bad_rows_is_not_read_to_its_end(tiny_space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path, *(300 * [",x,y,z,"]))
    with pytest.raises(TableError, match=r"and 1?\d\d more$"):
        read_measured(path, tiny_space)
