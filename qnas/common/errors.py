"""Errors that a user can fix, by cause. All other exceptions are bugs of qnas and keep their traceback.

The message of an error is one line: the place, what was found and what was expected.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from qnas.common.text import shown

HINTED_CHARACTERS, KNOWN_CHARACTERS = 150, 200  # of the names that are known, with and without a near one
LIST_CHARACTERS = 260  # of a list in a message
ITEM_CHARACTERS = (200, 90, 60)  # of an item of it: the first that leaves room for all


NOT_ON_WINDOWS = "qnas does not run on Windows: run it in WSL (learn.microsoft.com/windows/wsl/install)"


class QnasError(Exception):
    """A problem that the user can fix. Its text is one line."""


class UsageError(QnasError):
    """A value given on the command line or to a function is not of the expected form."""


class SpaceError(QnasError):
    """A search space is unknown, broken or incomplete."""


class ArchError(QnasError):
    """An architecture does not belong to the space, or its file is broken."""


class TableError(QnasError):
    """A latency table or device file is unknown, broken or incomplete."""


class InfeasibleBudgetError(QnasError):
    """No network of the space meets the budget."""


class DataError(QnasError):
    """A data set is missing, empty or damaged."""


class BrokenImageError(DataError):
    """An image cannot be decoded to its end."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


class CheckpointError(QnasError):
    """A run folder or checkpoint is damaged, or does not fit the request."""


class ExportError(QnasError):
    """An exported file does not compute what the network computes."""


class MeasurementError(QnasError):
    """A command that should time a file elsewhere failed, or printed no time."""


class TrainingError(QnasError):
    """Training reached a state from which it cannot continue."""


class ProcessError(QnasError):
    """Another process of a run has ended, or its state differs from that of this process."""


class Interrupted(Exception):  # noqa: N818  # not an error: the state is saved
    """The user asked to stop, and the state was saved."""


class QnasWarning(UserWarning):
    """Something that the user should know but that stops nothing; the command line prints it as a line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """List the known names, the nearest first.

    >>> nearest("vpo", ["cpu", "vpu"])
    'did you mean vpu? known: cpu, vpu'
    """
    names = sorted(known)
    close = get_close_matches(name[:100], names, n=3, cutoff=0.5)  # the time grows with the name
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}known: {one_line(', '.join(names), HINTED_CHARACTERS if hint else KNOWN_CHARACTERS)}"


def abbreviate(items: Sequence[str], between: str = ", ", most: int = 5) -> str:
    """Join the first items of a list, as many as a line has room for, and say how many more there are.

    >>> abbreviate(["a", "b", "c"], most=2)
    'a, b, and 1 more'
    """
    shown: list[str] = []
    for longest in ITEM_CHARACTERS:
        shown, room = [], LIST_CHARACTERS
        for item in items[:most]:
            shown.append(one_line(item, longest))
            room -= len(shown[-1]) + len(between)
        if room >= 0:
            break
    while room < 0:
        room += len(shown.pop()) + len(between)
    more = [f"and {len(items) - len(shown):,} more"] if len(items) > len(shown) else []
    return between.join([*shown, *more])


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])


def one_line(text: object, most: int = 200) -> str:
    """Return an error's message, or any text, in one line of at most `most` characters.

    Control characters, which could change a terminal, are escaped. An error without a message gives its type.

    >>> one_line("unknown\\n  name " + 50 * "x", most=20)
    'unknown name xxxx...'
    """
    return shown(" ".join(str(text).split()) or type(text).__name__, most)
