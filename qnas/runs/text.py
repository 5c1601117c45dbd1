"""The layout of the commands' output: plain text of at most 80 columns."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill as fill_text
from typing import Any


def short_name(candidate: str) -> str:
    """Abbreviate a candidate's name to `k7 e4`, identity to a dash; a registered block keeps its name.

    >>> short_name("quadra_k7_e4"), short_name("quadra_k7_e4_fan"), short_name("identity")
    ('k7 e4', 'k7 e4 fan', '-')
    >>> short_name("star_k7_e4")
    'star k7 e4'
    """
    if candidate == "identity":
        return "-"
    block, _, rest = candidate.partition("_")
    return (rest if block in ("quadra", "mbconv") else candidate).replace("_", " ")


def table_rows(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Align the columns in `left` to the left and the others to the right."""
    every = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def choice_line(ranking: Sequence[Mapping[str, Any]], solved: int) -> str:
    """Describe how the first network of a ranking (`ranking_document`) was chosen from those solved for."""
    first, level = ranking[0], sum(entry["level"] for entry in ranking)
    accuracy = f"held-out accuracy {first['heldout_accuracy']:.1%}"
    if solved == 1:
        return f"the only network within the budget; {accuracy}"
    of = f"of the {solved} best within the budget; {accuracy}; number {first['rank']} by score"
    return (
        f"the largest of {level} equally accurate networks, {of}" if level > 1 else f"the most accurate {of}"
    )


def field(name: str, text: str) -> str:
    """Format a named line of a result, wrapped at 80 columns."""
    return wrapped(text, f"{name:<12}", " " * 12)


def wrapped(text: str, first: str = "", further: str = "  ", width: int = 80) -> str:
    """Wrap text with indents. Paths and addresses are not broken, so that they can be copied.

    Neither are numbers and their units.
    """
    return fill_text(
        re.sub(r"(?<=\d) (?=(ms|s|px)\b)", "\N{NO-BREAK SPACE}", text),
        width,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\N{NO-BREAK SPACE}", " ")


def next_command(command: str) -> str:
    """Format the next command to type, in lines that a shell joins if it is longer than 80 columns."""
    lines = wrapped(command, "next        ", " " * 14, width=78).split("\n")
    return " \\\n".join(lines)


def files_in(folder: Path) -> str:
    """Format the list of files in a folder."""
    return f"{folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Format accuracies as mean and standard deviation in percent."""
    spread = f" +- {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"
