"""Processes that are killed right before one of their file operations."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# that change a folder; their arguments may be names relative to an open folder
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.utime"}
_MOST = 10_000


def killed_before(number: int, act: Callable[[], None], inside: Path) -> bool:
    """Do something in a forked process, and kill it before its file operation of a number.

    Operations are those that change folders, and all opening of files inside a folder. Returns whether it was
    killed: false once there are no more operations. What goes wrong otherwise is an AssertionError.
    """
    process = os.fork()
    if process == 0:
        code = 1
        try:
            _watch(number, inside)
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "failed before it was killed"
    return False


def _watch(number: int, inside: Path) -> None:
    seen, where = 0, str(inside)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        opened = event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(where)
        if opened or event in _CHANGES:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)


def every_kill(
    act: Callable[[], None], inside: Path, prepare: Callable[[], None], check: Callable[[], None]
) -> int:
    """Kill a process before each of its operations in turn; return how many there are.

    `prepare` sets up the folder before each, and `check` looks at what is left.
    """
    for number in range(_MOST):
        prepare()
        killed = killed_before(number, act, inside)
        check()
        if not killed:
            return number
    raise AssertionError(f"more than {_MOST} operations")
