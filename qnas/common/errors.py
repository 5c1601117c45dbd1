"""Errors that a user can fix, by cause. All other exceptions are bugs of qnas and keep their traceback.

The message of an error is one line: the place, what was found and what was expected. Only the command
line prints it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class QnasError(Exception):
    """A problem that the user can mend. Its text is one line."""


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
    """A run folder or checkpoint is damaged, or does not fit what was asked."""


class ExportError(QnasError):
    """An exported file does not compute what the network computes."""


class TrainingError(QnasError):
    """A training came to a state that nothing can be made of."""


class ProcessError(QnasError):
    """Another process of a run is gone, or holds something else than this one."""


class Interrupted(Exception):  # noqa: N818  # not an error: the state is saved
    """The user asked to stop, and the state was saved."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which names are known, the nearest first.

    >>> nearest("vpo", ["cpu", "vpu"])
    'did you mean vpu? known: cpu, vpu'
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
