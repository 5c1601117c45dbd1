"""Pages of the site that are written from the code: the command line, the modules of each room, notebooks.

mkdocs runs `on_files` at every build. The page of the command line comes from typer's own command tree,
so it cannot fall behind; each room's page lists all its modules for mkdocstrings. A notebook in examples/
becomes notebooks/NAME.md with its outputs, and needs an entry in the navigation of mkdocs.yml.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.main import get_command

from qnas.commands import cli

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "spaces", "latency", "solver", "nn", "data", "runs", "training", "search", "deploy")
COMMAND_LINE = "reference/command-line.md"

INTRODUCTION = """\
# Command line

This page is generated from the program itself; `qnas COMMAND --help` prints the same. Exit codes: 0 done,
1 an error that you can fix (one line on stderr says what), 2 wrong usage, 130 stopped by Ctrl-C or SIGTERM
with the state saved. Every command has an example; commands that a script may call have `--json`, and those
that take long have `--quiet`. Output fits 80 columns, or those of a narrower
terminal, and is coloured only on a terminal, and never where `NO_COLOR` is set.
"""


def all_commands() -> Iterator[tuple[str, Any]]:
    """Yield every command with what is typed for it, those of a group as `group command`."""
    group: Any = get_command(cli.app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {sub}", found) for sub, found in inner.items())


def command_line_page() -> str:
    """Return the page of the command line as Markdown."""
    parts = [INTRODUCTION]
    for name, command in all_commands():
        text, _, example = (command.help or "").partition("Example: ")
        parts.append(f"## qnas {name}\n")
        parts += [" ".join(paragraph.split()) + "\n" for paragraph in text.split("\n\n") if paragraph.strip()]
        if example:
            parts.append(f"```sh\n{' '.join(example.split())}\n```\n")
        parts.append(_options(command))
    return "\n".join(parts)


def _options(command: Any) -> str:
    """Return the arguments and options of a command as tables, one for each group of the help."""
    groups: dict[str, list[str]] = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            group, shown = (
                "Arguments",
                f"`{(parameter.metavar or parameter.name.upper()).replace('|', ' or ')}`",
            )
        else:
            group = getattr(parameter, "rich_help_panel", None) or "Options"
            shown = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        # brackets would be links
        help_text = re.sub(r"([|\[\]])", r"\\\1", " ".join((parameter.help or "").split()))
        default = parameter.default
        if parameter.show_default is True and isinstance(default, int | float | str) and default is not False:
            help_text += f" Default: `{default}`."
        groups.setdefault(group, []).append(f"| {shown} | {help_text.strip()} |")
    tables = (f"| {group} | |\n| :-- | :-- |\n" + "\n".join(rows) + "\n" for group, rows in groups.items())
    return "\n".join(tables)


def room_page(room: str) -> str:
    """Return a page with all public modules of a room, for mkdocstrings to fill."""
    found = []
    for path in sorted((ROOT / "qnas" / room).rglob("*.py")):
        *parents, name = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parents if name == "__init__" else [*parents, name]))
    return f"# qnas.{room}\n\n" + "\n".join(f"::: {name}\n" for name in found)


def notebook_page(notebook: Mapping[str, Any]) -> str:
    """Return a notebook as Markdown: its texts, its code, and what the code printed or drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text") or data.get("text/plain", "")).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def generated_pages() -> dict[str, str]:
    """Return the text of every page that is written from the code, by its path in docs/."""
    pages = {COMMAND_LINE: command_line_page()}
    pages |= {f"reference/modules/{room}.md": room_page(room) for room in ROOMS}
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = notebook_page(json.loads(path.read_text(encoding="utf-8")))
    return pages


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of the folder (mkdocs calls this)."""
    from mkdocs.structure.files import File  # here: the tests use the rest without mkdocs

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files
