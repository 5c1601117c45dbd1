"""Progress of long work: a bar on a terminal, occasional lines in a log, or calls to a function."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines in a log
# The time left is shown after LEAST_SECONDS and LEAST_SHARE of the steps, once the paces of the older and the
# newer half of a window differ by less than SETTLED_FACTOR: the first steps may be many times slower.
LEAST_SECONDS = 5.0
LEAST_SHARE = 0.02
SETTLED_FACTOR = 1.5
WINDOW_SECONDS = 60.0


@dataclass(frozen=True)
class Report:
    """The progress of some work."""

    phase: str
    done: int  # steps
    total: int
    figures: str = ""
    seconds_left: float | None = None  # None until the pace has settled
    warning: str | None = None


OnProgress = Callable[[Report], None]


class Pace:
    """The pace of the latest steps, and the time left that follows from it."""

    def __init__(self, now: float) -> None:
        self._start = now
        self._marks = deque([(now, 0)])  # seconds and steps done, of the window
        self._settled = False

    def seconds_left(self, done: int, total: int, now: float) -> float | None:
        """Return the time that the remaining steps will take; None until the pace has settled."""
        marks = self._marks
        if now - marks[-1][0] >= WINDOW_SECONDS / 100:
            marks.append((now, done))
        while len(marks) > 2 and now - marks[0][0] > WINDOW_SECONDS:
            marks.popleft()
        seconds, steps = now - marks[0][0], done - marks[0][1]
        if steps <= 0 or now - self._start < LEAST_SECONDS or done < LEAST_SHARE * total:
            return None
        middle, there = min(marks, key=lambda mark: abs(mark[0] - (now - seconds / 2)))
        older, newer = there - marks[0][1], done - there
        if not self._settled and older > 0 and newer > 0:
            ratio = (middle - marks[0][0]) / older / ((now - middle) / newer)
            self._settled = 1 / SETTLED_FACTOR < ratio < SETTLED_FACTOR
        return seconds / steps * (total - done) if self._settled else None


class Progress(AbstractContextManager["Progress"]):
    """Count the steps of a known total, and show the phase, the latest figures and the time left.

    With `on_progress` each step is reported to that function; with `quiet` only warnings are printed.
    """

    def __init__(
        self,
        total: int,
        phase: str,
        *,
        quiet: bool = False,
        on_progress: OnProgress | None = None,
        wording: Callable[[str], str] = str,
    ) -> None:
        self._wording = wording
        self._on_progress = on_progress
        self._quiet = quiet or on_progress is not None
        self._terminal = sys.stderr.isatty()
        self._phase = phase
        self._figures = ""
        # tqdm's own measurement shows nothing on a terminal that reports no size
        columns, lines = shutil.get_terminal_size()
        self._bar = tqdm(
            total=total,
            desc=f"{phase}: ",
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            ncols=columns,
            nrows=lines,
            disable=self._quiet or not self._terminal,
        )
        self._total, self._skipped, self._done = total, 0, 0
        self._last_line = time.monotonic()
        self._pace = Pace(self._last_line)
        self._last_shown: tuple[str, int] | None = None  # phase and steps of the last line

    def phase(self, name: str) -> None:
        """Set the name of the current phase."""
        if name != self._phase:
            self._phase = name
            self._bar.set_description(name)

    def skip(self, steps: int) -> None:
        """Count steps that an earlier process made."""
        self._skipped = self._bar.initial = self._bar.n = steps
        self._bar.refresh()

    def step(self, figures: str = "") -> None:
        """Count one step."""
        self._figures = figures or self._figures
        self.step_by(1)

    def step_by(self, steps: int) -> None:
        """Count several steps."""
        self._done += steps
        now = time.monotonic()
        left = self._pace.seconds_left(self._done, self._total - self._skipped, now)
        if self._on_progress is not None:
            self._on_progress(self._report(left))
        elif self._terminal:
            self._bar.set_postfix_str(_joined(_time_left(left), self._figures), refresh=False)
            self._bar.update(steps)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._line(left)

    def warn(self, text: str) -> None:
        """Show a warning that must not be missed, above the bar, even when quiet."""
        if self._on_progress is not None:
            self._on_progress(self._report(None, text))
        else:
            self._bar.write(f"qnas: warning: {self._wording(text)}", file=sys.stderr)

    def _report(self, left: float | None, warning: str | None = None) -> Report:
        done = self._skipped + self._done
        return Report(self._phase, done, self._total, self._figures, left, warning)

    def _line(self, left: float | None) -> None:
        if self._quiet:
            return
        self._last_shown = (self._phase, self._done)
        share = self._done / max(1, self._total - self._skipped)
        parts = _joined(f"{self._phase}: {share:4.0%}", _time_left(left), self._figures)
        print(parts, file=sys.stderr, flush=True)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.close()
        if not self._terminal and error is None and self._last_shown != (self._phase, self._done):
            self._line(None)


# Makes the progress of some work from its number of steps and its first phase.
Display = Callable[[int, str], Progress]


@dataclass(frozen=True)
class OnStderr:
    """A display on stderr: a bar or lines, with `quiet` only warnings; `wording` rewrites warnings."""

    quiet: bool = False
    wording: Callable[[str], str] = str

    def __call__(self, total: int, phase: str) -> Progress:
        """Show the progress of some work."""
        return Progress(total, phase, quiet=self.quiet, wording=self.wording)


def reporting_to(on_progress: OnProgress) -> Display:
    """Report steps and warnings to a function, and print nothing."""
    return lambda total, phase: Progress(total, phase, on_progress=on_progress)


def silent(total: int, phase: str) -> Progress:
    """Show nothing."""
    return Progress(total, phase, on_progress=lambda report: None)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _time_left(seconds: float | None) -> str:
    if seconds is None or seconds < 0.5:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"
