"""Copied sources of functions and classes, with their dependencies, for a file that must not import qnas."""

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from textwrap import dedent
from types import ModuleType
from typing import Any

from qnas.common.errors import ExportError

_REGISTRATIONS = ("register_block", "register_neuron")


@dataclass
class Copied:
    """Import lines and definitions, in a valid order for a file.

    `given` are names that every file has; `own` are objects of qnas that the file defines separately, and
    `wanted` collects those in use.
    """

    given: Collection[str]
    own: Collection[Any]
    imports: list[str] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)
    wanted: list[Any] = field(default_factory=list)

    def add(self, original: Any, *, annotated: bool = True, without: str = "") -> None:
        """Copy a function or class, `without` one of its methods, and its dependencies.

        Raises ExportError if that is impossible.
        """
        name = original.__name__
        if name in self.definitions:
            return
        if name in self.given:
            raise ExportError(
                f"format standalone: {name} cannot be copied, as the file defines {name} itself"
            )
        try:
            text = dedent(inspect.getsource(original))
            (_,) = ast.parse(text).body  # since Python 3.13 it may be that of all code without a file
        except (OSError, TypeError, SyntaxError, ValueError) as error:
            raise ExportError(f"format standalone: the source of {name} cannot be read: {error}") from error
        text = _without_registration(text, without)
        if not annotated:
            text = _without_annotations(text)
        self.definitions[name] = ""  # marks it as copied; its dependencies come before it
        self._add_used(text, original)
        self.definitions[name] = self.definitions.pop(name) or text

    def _add_used(self, text: str, original: Any) -> None:
        around = vars(sys.modules[original.__module__])
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name))
        for name in dict.fromkeys(node.id for node in nodes if isinstance(node.ctx, ast.Load)):
            if name in around and name != original.__name__ and not hasattr(builtins, name):
                self._add_name(name, around[name], original)

    def _add_name(self, name: str, value: Any, user: Any) -> None:
        alias = "" if getattr(value, "__name__", name) == name else f" as {name}"
        if isinstance(value, ModuleType):
            package, line = value.__name__, f"import {value.__name__}{alias}"
        elif inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value):
            if value in self.own:
                self.wanted.append(value)
                return
            if value.__module__ == user.__module__:
                self.add(value)
                return
            package, line = value.__module__, f"from {value.__module__} import {value.__name__}{alias}"
        elif _is_constant(value):
            self.definitions[name] = f"{name} = {value!r}"
            return
        else:
            raise ExportError(
                f"format standalone: {user.__name__} uses {name}, a {type(value).__name__}, which cannot be "
                "copied into a file"
            )
        if package.partition(".")[0] == "qnas":
            raise ExportError(
                f"format standalone: {user.__name__} uses {name} of {package}: the file must not need qnas"
            )
        if name not in self.given and line not in self.imports:
            self.imports.append(line)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _without_registration(text: str, method: str) -> str:
    """Return a definition without the decorator that registers it, and without a method."""
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    left_out: list[Iterable[int]] = [
        range(decorator.lineno, (decorator.end_lineno or 0) + 1)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).split(".")[-1] in _REGISTRATIONS
    ]
    if isinstance(node, ast.ClassDef):
        left_out += [
            range(min([part.lineno, *(d.lineno for d in part.decorator_list)]), (part.end_lineno or 0) + 1)
            for part in node.body
            if isinstance(part, ast.FunctionDef) and part.name == method
        ]
    gone = {number for numbers in left_out for number in numbers}
    lines = [line for number, line in enumerate(text.splitlines(), 1) if number not in gone]
    return re.sub(r"\n\n\n+", "\n\n", "\n".join(lines).strip() + "\n")


def _without_annotations(text: str) -> str:
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.FunctionDef)
    node.returns = None
    for argument in node.args.args:
        argument.annotation = None
    return ast.unparse(node) + "\n"
