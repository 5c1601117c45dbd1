"""Checks of the Python API's arguments: a wrong type or value becomes a UsageError that names it."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from qnas.common.errors import UsageError, one_line
from qnas.common.units import MOST_MS

Rule = tuple[str, Callable[[Any], bool]]  # the expected value in words, and its check


def _at_least(least: int) -> Rule:
    return f"a whole number from {least}", lambda value: type(value) is int and value >= least


_SHARE: Rule = ("a share, 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1)
_PART: Rule = ("a name or a function", lambda value: isinstance(value, str) or callable(value))
_PATH: Rule = ("a name or a path", lambda value: isinstance(value, str | Path))
_NAME: Rule = ("text", lambda value: isinstance(value, str))
_BOOL: Rule = ("True or False", lambda value: isinstance(value, bool))
_MS: Rule = (f"milliseconds, 0 to {MOST_MS:g}", lambda v: type(v) in (int, float) and 0 <= v <= MOST_MS)
_SOURCES = ("measured", "fitted", "estimated")  # of a latency
_NEEDED = (_PATH[0], _NAME[0], _MS[0])  # where None is wrong too
_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("batch", "images", "k_best", "opset", "repeats", "resolution_px", "threads"), _at_least(1)
    ),
    "points": _at_least(2),
    **dict.fromkeys(("max_broken", "max_drop"), _SHARE),
    "confidence": ("a share between 0 and 1: 0.9", lambda v: type(v) is float and 0 < v < 1),
    **dict.fromkeys(("loss", "metric"), _PART),
    **dict.fromkeys(("device", "folder", "network", "result", "source", "space", "target", "trained"), _PATH),
    "name": _NAME,
    "pretrained": ("the name of a pretrained network", lambda value: isinstance(value, str)),
    **dict.fromkeys(("aot", "keeps_shape", "needs_batchnorm", "symmetric"), _BOOL),
    **dict.fromkeys(("layers", "parameters"), ("a mapping", lambda value: isinstance(value, Mapping))),
    "fixed_ms": _MS,
    "kind": (f"one of {', '.join(_SOURCES)}", lambda v: isinstance(v, str) and v in _SOURCES),
    "sliced": ("names", lambda value: isinstance(value, Collection) and not isinstance(value, str)),
    "module": ("a function, a class or its import path", lambda v: isinstance(v, str) or callable(v)),
    "progress": ("True, False or a function", lambda v: isinstance(v, bool) or callable(v)),
}


def check_arguments(**arguments: object) -> None:
    """Raise UsageError for the first argument that breaks its rule. None passes unless a path is needed.

    >>> check_arguments(points=5, max_drop=0.01, loss=None)
    >>> check_arguments(batch=0)
    Traceback (most recent call last):
    ...
    qnas.common.errors.UsageError: `batch=0`: expected a whole number from 1
    """
    for name, value in arguments.items():
        expected, holds = _RULES[name]
        if not (holds(value) or (value is None and expected not in _NEEDED)):
            raise UsageError(f"`{name}={quoted(value)}`: expected {expected}")


def quoted(value: object) -> str:
    """Return a value in one line of at most 60 characters, as Python writes it."""
    try:
        return one_line(repr(value), 60)
    except Exception as error:  # whatever a value's own code raises
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
