"""The commands of the command line, for tests that go through all of them."""

from typing import Any

from typer.main import get_command

from qnas import cli


def commands() -> dict[str, Any]:
    """All commands by what is typed, those of a group as `group command`."""
    found: dict[str, Any] = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]  # a group
        inner = getattr(command, "commands", {})
        found |= {f"{name} {sub}": c for sub, c in inner.items()} or {name: command}
    return found


def joined(text: str) -> str:
    """Return what a command printed as one line, the lines joined that were wrapped."""
    return " ".join(text.replace("\\\n", " ").split())
