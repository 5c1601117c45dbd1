"""Arguments of Python functions as options of the command line, in what errors and warnings say.

Everything below the command line names an argument in backquotes: "`force=True` replaces it". Here that
becomes what can be typed: "--force replaces it".
"""

import re

# arguments whose option has another name
OPTIONS = {
    "budgets": "budget",
    "devices": "device",
    "formats": "format",
    "networks": "n",
    "resolution_px": "resolution",
    "search_epochs": "epochs",
}
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]+))?`")


def as_flags(text: str) -> str:
    """Return a text with the arguments that it names as options.

    >>> as_flags("exists already: `force=True` replaces it, or another `out`")
    'exists already: --force replaces it, or another --out'
    >>> as_flags("`linear_start=False` or `weights='scratch'`, `resolution_px=64`")
    '--no-linear-start or --weights scratch, --resolution 64'
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        option = OPTIONS.get(name, name).replace("_", "-")
        if value in (None, "True"):
            return f"--{option}"
        return f"--no-{option}" if value == "False" else f"--{option} {value.strip(chr(39))}"

    return _ARGUMENT.sub(flag, text)
