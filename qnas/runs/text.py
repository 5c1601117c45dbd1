"""The layout of the commands' output: plain text of at most 80 columns, fewer on a narrower terminal."""

import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill as fill_text
from typing import Any

from qnas.common.errors import abbreviate
from qnas.common.text import shown

WIDEST, NARROWEST = 80, 20  # columns
ROOMY = 72  # columns that tables and trees are laid out for; with fewer, their lines are divided
NAME_SHOWN = 30  # characters of a class's name
BALANCING = "--class-weights balanced or --sampler balanced makes up for rare classes"


def columns() -> int:
    """Return the columns of the output: those of the terminal, within bounds; the most without a terminal."""
    return min(max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROWEST), WIDEST)


def short_name(candidate: str) -> str:
    """Abbreviate a QuadraBlock's name to `k7 e4`, identity to a dash; other blocks keep their names.

    >>> short_name("quadra_k7_e4"), short_name("quadra_k7_e4_fan"), short_name("identity")
    ('k7 e4', 'k7 e4 fan', '-')
    >>> short_name("star_k7_e4"), short_name("mbconv_k3_e6_se")
    ('star k7 e4', 'mbconv k3 e6 se')
    """
    if candidate == "identity":
        return "-"
    block, _, rest = candidate.partition("_")
    return (rest if block == "quadra" else candidate).replace("_", " ")


def table_rows(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Sequence[int] = (0,),
    *,
    keys: int = 1,
    width: int | None = None,
) -> str:
    """Align the columns in `left` to the left and the others to the right.

    If the table is wider than `width` (default: the output), it becomes several, one below the other, each
    with the first `keys` columns, which name the rows, and as many of the others as fit.
    """
    every = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    tables = _column_groups(widths, keys, columns() if width is None else width)
    return "\n\n".join(
        "\n".join(
            "  ".join(
                row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in table
            ).rstrip()
            for row in every
        )
        for table in tables
    )


def _column_groups(widths: Sequence[int], keys: int, most: int) -> list[list[int]]:
    """Divide the columns of a table so that each group fits; each has the keys, and at least one other."""
    first = list(range(min(keys, len(widths))))
    groups = [list(first)]
    for i in range(len(first), len(widths)):
        group = [*groups[-1], i]
        if sum(widths[j] for j in group) + 2 * (len(group) - 1) > most and len(groups[-1]) > len(first):
            groups.append([*first, i])
        else:
            groups[-1] = group
    return groups


def balanced_text(accuracy: float, balanced: float | None, digits: int = 2) -> str:
    """Describe a balanced accuracy; empty if it is not known or reads like the accuracy.

    >>> balanced_text(0.95, 0.5), balanced_text(0.95, 0.95)
    ('balanced accuracy 50.00%, the mean recall of the classes', '')
    """
    if balanced is None or f"{accuracy:.{digits}%}" == f"{balanced:.{digits}%}":
        return ""
    return f"balanced accuracy {balanced:.{digits}%}, the mean recall of the classes"


def balanced_beside(accuracy: float, balanced: float | None) -> str:
    """Return a balanced accuracy in brackets, to follow an accuracy; empty as in `balanced_text`.

    >>> balanced_beside(0.95, 0.5), balanced_beside(0.95, None)
    (' (balanced 50.0%)', '')
    """
    return f" (balanced {balanced:.1%})" if balanced_text(accuracy, balanced, digits=1) else ""


def never_text(names: Sequence[str], classes: int) -> str:
    """Say which classes a network never predicts; empty if there are none.

    >>> never_text(["cat"], 2)
    'never predicts 1 of 2 classes: cat'
    """
    if not names:
        return ""
    listed = abbreviate([shown(name, NAME_SHOWN) for name in names])
    return f"never predicts {len(names)} of {classes} classes: {listed}"


def choice_line(ranking: Sequence[Mapping[str, Any]], solved: int) -> str:
    """Describe how the first network of a ranking (`ranking_document`) was chosen from those solved for."""
    first, level = ranking[0], sum(entry["level"] for entry in ranking)
    accuracy = f"held-out accuracy {first['heldout_accuracy']:.1%}"
    accuracy += balanced_beside(first["heldout_accuracy"], first.get("heldout_balanced_accuracy"))
    if solved == 1:
        return f"the only network within the budget; {accuracy}"
    of = f"of the {solved} best within the budget; {accuracy}; number {first['rank']} by score"
    return (
        f"the largest of {level} equally accurate networks, {of}" if level > 1 else f"the most accurate {of}"
    )


def field(name: str, text: str) -> str:
    """Format a named line of a result, wrapped at the width of the output."""
    return wrapped(text, f"{name:<12}", " " * 12)


def wrapped(text: str, first: str = "", further: str = "  ", width: int | None = None) -> str:
    """Wrap text with indents, at the width of the output unless another is given.

    Paths and addresses are not broken, so that they can be copied, nor are numbers from their units.
    """
    return fill_text(
        re.sub(r"(?<=\d) (?=(ms|s|px)\b)", "\N{NO-BREAK SPACE}", text),
        columns() if width is None else width,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\N{NO-BREAK SPACE}", " ")


def next_command(command: str) -> str:
    """Format the next command to type, in lines that a shell joins if it does not fit into one."""
    lines = wrapped(command, "next        ", " " * 14, width=columns() - 2).split("\n")
    return " \\\n".join(lines)


def files_in(folder: Path) -> str:
    """Format the list of files in a folder."""
    return f"{folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Format accuracies as mean and standard deviation in percent."""
    spread = f" +- {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"
