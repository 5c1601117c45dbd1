"""The commands of the command line, for tests that go through all of them."""

import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from qnas.commands import cli


def commands() -> dict[str, Any]:
    """All commands by name, those of a group as `group command`."""
    found: dict[str, Any] = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]  # a group
        inner = getattr(command, "commands", {})
        found |= {f"{name} {sub}": c for sub, c in inner.items()} or {name: command}
    return found


def joined(text: str) -> str:
    """Return the output of a command as one line, with wrapped lines joined."""
    return " ".join(text.replace("\\\n", " ").split())


def qnas(*words: str | Path) -> int:
    """Run a command in this process; return its exit code."""
    before, sys.argv = sys.argv, ["qnas", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def succeed(*words: str | Path) -> None:
    """Run a command that must succeed."""
    assert qnas(*words) == 0, words
