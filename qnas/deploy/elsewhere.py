"""A command of the user that runs a file elsewhere, on a phone or a board, and prints its time.

The command is split into words once, by the rules of a POSIX shell, and started without a shell: nothing in
the name of a file is interpreted here. (`adb shell` and `ssh` hand the rest of the words to a shell over
there.) What stands for the file is put in afterwards: FILE, its path; NAME, the last part of it; FILES, alone
in a word, all files of the format. A push command, which copies the file over, runs before each run: the
board keeps one file, and which one is never a question.

The time is the number in the pattern's group, where the pattern matches last: benchmark programs print their
warm-up first. The program warms up and repeats by itself, so that a run is one sample.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qnas.common.arguments import quoted
from qnas.common.errors import MeasurementError, UsageError, nearest, one_line
from qnas.common.units import LEAST_MS, MOST_MS, MS_PER_UNIT, number_or_nan

FILE, NAME, FILES = "{file}", "{name}", "{files}"
REPEATS = 5  # runs of a file
TIMEOUT_S = 600.0
_READ_BYTES = 1_000_000  # of the end of what a command prints
_SHOWN_LINES = 3
_BEHIND = re.compile(r"\s*(us|µs|μs|ms|s)\b")
_TOLD = re.compile(r"timings in (us|ms)\b")  # TFLite's benchmark_model, before its numbers


@dataclass(frozen=True)
class Elsewhere:
    """A command that runs a file and prints its time, checked. Raises UsageError with all that is wrong.

    `command` and `push` are as in a shell; `pattern` is a regular expression with one group, the number.
    `unit` is that of the number; None takes the unit that is printed behind it, or else ms.
    """

    command: str
    pattern: str
    unit: str | None = None
    push: str | None = None
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        problems = [*self._word_problems(), *_pattern_problems(self.pattern)]
        if self.unit is not None and self.unit not in MS_PER_UNIT:
            problems.append(f"`unit={one_line(self.unit, 20)}`: {nearest(self.unit, MS_PER_UNIT)}")
        if not 0 < self.timeout_s < float("inf"):
            problems.append(f"`timeout_s={self.timeout_s:g}`: expected seconds above 0")
        if problems:
            raise UsageError("; ".join(problems))

    def _word_problems(self) -> list[str]:
        problems = []
        given = {"command": self.command, **({} if self.push is None else {"push": self.push})}
        for name, text in given.items():
            try:
                words = shlex.split(text)
            except ValueError as error:  # an open quote
                problems.append(f"`{name}={one_line(text, 80)}`: {str(error).lower()}")
                continue
            if not words:
                problems.append(f"`{name}`: expected a program with its arguments")
            elif shutil.which(words[0]) is None:
                problems.append(f"`{name}={one_line(text, 80)}`: no program {quoted(words[0])} here")
        first = "push" if self.push is not None else "command"
        if not any(part in given[first] for part in (FILE, FILES)):
            problems.append(
                f"`{first}={one_line(given[first], 80)}`: expected {FILE}, where the path of the file belongs"
            )
        return problems

    @property
    def words(self) -> str:
        """The command as it is recorded with its times."""
        return one_line(self.command, 500)

    def time_ms(self, files: Sequence[Path]) -> float:
        """Run the command for a file, the first of those of its format, and return the milliseconds.

        Raises MeasurementError, with the last lines of its output, if it fails, takes longer than
        `timeout_s`, or prints no time.
        """
        if self.push is not None:
            _run(_filled(self.push, files), self.timeout_s)
        words = _filled(self.command, files)
        return self._read(_run(words, self.timeout_s), one_line(shlex.join(words), 120))

    def _read(self, output: str, where: str) -> float:
        matches = list(re.finditer(self.pattern, output))
        if not matches:
            raise MeasurementError(
                f"{where}: nothing that it printed matches {self.pattern!r}: {_end(output)}"
            )
        found = matches[-1]
        unit = self.unit or _printed_unit(output, found)
        time_ms = number_or_nan(found[1]) * MS_PER_UNIT[unit]
        if not LEAST_MS <= time_ms <= MOST_MS:
            raise MeasurementError(
                f"{where}: {self.pattern!r} found {quoted(found[1])}, expected a time above 0: {_end(output)}"
            )
        return time_ms


def _pattern_problems(pattern: str) -> list[str]:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"`pattern={one_line(pattern, 80)}`: no regular expression: {error}"]
    if groups == 1:
        return []
    return [
        f"`pattern={one_line(pattern, 80)}`: expected one group, such as avg=([0-9.]+), around the number; "
        f"found {groups} (one that is not the number begins with ?:)"
    ]


def _printed_unit(output: str, found: re.Match[str]) -> str:
    """Return the unit that an output gives for a number in it, ms where it gives none."""
    behind = _BEHIND.match(output, found.end(1))
    told = behind or _TOLD.search(output)
    return re.sub("[µμ]", "u", told[1]) if told else "ms"


def _filled(text: str, files: Sequence[Path]) -> list[str]:
    """Return the words of a command with a file in them."""
    first = files[0]
    words: list[str] = []
    for word in shlex.split(text):
        if word == FILES:
            words += map(str, files)
        else:
            words.append(word.replace(FILE, str(first)).replace(NAME, first.name))
    return words


def _run(words: Sequence[str], timeout_s: float) -> str:
    """Run a program to its end; return the end of what it printed, errors too."""
    where = one_line(shlex.join(words), 120)
    with tempfile.TemporaryFile() as printed:  # a pipe could be held open by what the program started
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                # of its own group, so that Ctrl-C lets this run end, and all of it can be stopped
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            raise MeasurementError(f"{where}: cannot be started: {one_line(error)}") from error
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
        size = printed.seek(0, os.SEEK_END)
        printed.seek(max(0, size - _READ_BYTES))
        output = printed.read().decode("utf-8", "replace")
    if code is None:
        raise MeasurementError(f"{where}: stopped after `timeout_s={timeout_s:g}`: {_end(output)}")
    if code:
        raise MeasurementError(f"{where}: ended with code {code}: {_end(output)}")
    return output


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a program that still runs, with what it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(output: str) -> str:
    """Return the last lines of an output, for a message."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return "it printed nothing"
    shown = " | ".join(one_line(line, 160) for line in lines[-_SHOWN_LINES:])
    return f"its last line{'s' * (len(lines) > 1)}: {shown}"
