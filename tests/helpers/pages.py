"""The pages of the repository as the site shows them, and the code blocks in them."""

import re
from pathlib import Path

from helpers.places import ROOT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _read(path: Path) -> str:
    """Return a page as the site shows it, with its included files."""
    text = path.read_text(encoding="utf-8")
    return re.sub('^--8<-- "(.+)"$', lambda found: _read(ROOT / found[1]), text, flags=re.MULTILINE)


# by path: what is in the repository
PAGES = {
    str(path.relative_to(ROOT)): _read(path)
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "benchmarks" / "RESULTS.md",
    )
}


def blocks(page: str, kind: str) -> list[str]:
    """Return the code blocks of this language on a page."""
    return [block for each, block in BLOCK.findall(PAGES[page]) if each == kind]
