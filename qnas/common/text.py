"""Names that others chose, such as those of classes and files, as text that can be shown anywhere."""

import re

NAME_CHARACTERS = 80  # of a name in a message or a table
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&~#])")


def shown(name: object, most: int = NAME_CHARACTERS) -> str:
    r"""Return a name in one line of at most `most` printable characters.

    Whatever is not printable is escaped: control characters, which could change a terminal, marks that change
    the direction of text, line separators, and the bytes of a name that is not UTF-8.

    >>> shown("black\x1b[2J\u2028swan"), shown("k\udce4se")
    ('black\\x1b[2J\\u2028swan', 'k\\xe4se')
    """
    text = escaped(str(name)[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def escaped(text: str) -> str:
    """Return a text with everything escaped that is not printable, of any length."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that Python could not decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def in_markdown(name: object, most: int = NAME_CHARACTERS) -> str:
    r"""Return a name as `shown`, which Markdown shows as it is.

    >>> in_markdown("<b>|x_y")
    '\\<b\\>\\|x\\_y'
    """
    return _MARKDOWN.sub(r"\\\1", shown(name, most))
