"""Progress: a bar on a terminal, a line now and then in a log, nothing when quiet."""

import shutil
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines in a log


class Progress:
    """Count steps of a known total; say what is being done, the figures of the day, and time left."""

    def __init__(self, total: int, phase: str, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._phase = phase
        self._figures = ""
        self._last_line = time.monotonic()
        # not tqdm's own measure, which shows nothing on a terminal that reports no size
        size = shutil.get_terminal_size()
        self._bar = tqdm(
            total=total,
            desc=f"{phase}: ",
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
            ncols=size.columns,
            nrows=size.lines,
            disable=quiet or not self._terminal,
            smoothing=0.05,
        )
        self._start = self._last_line
        self._done = 0
        self._said: tuple[str, int] | None = None  # where the last line was
        self._total = total

    def phase(self, name: str) -> None:
        """Name what is being done from here on."""
        if name != self._phase:
            self._phase = name
            self._bar.set_description(name)

    def skip(self, steps: int) -> None:
        """Count steps that an earlier process made."""
        self._total -= steps
        self._bar.initial = steps
        self._bar.n = steps
        self._bar.refresh()

    def step(self, figures: str = "") -> None:
        """Count one step."""
        self._figures = figures or self._figures
        self._bar.set_postfix_str(self._figures, refresh=False)
        self.step_by(1)

    def step_by(self, steps: int) -> None:
        """Count several steps."""
        self._done += steps
        self._bar.update(steps)
        if not self._terminal and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def warn(self, text: str) -> None:
        """Say something that must not be missed, above the bar, when quiet too."""
        self._bar.write(f"qnas: warning: {text}", file=sys.stderr)

    def _line(self) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        self._last_line, self._said = now, (self._phase, self._done)
        left = (now - self._start) / max(1, self._done) * (self._total - self._done)
        share = self._done / max(1, self._total)
        parts = [f"{self._phase}: {share:4.0%}", f"{left:.0f} s left", self._figures]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if not self._terminal and error is None and self._said != (self._phase, self._done):
            self._line()
