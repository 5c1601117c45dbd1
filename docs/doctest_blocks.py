"""A griffe extension that shows the doctests of docstrings as code.

The docstrings of qnas are plain sentences with doctests between them; Markdown would take `>>>` for quotes.
"""

import re
from typing import Any

from griffe import Extension, Object

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)  # to the next empty line


class DoctestBlocks(Extension):  # type: ignore[misc]  # griffe is not there where mypy runs without docs
    """Fence each doctest of a docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite a docstring as it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
