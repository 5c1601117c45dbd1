"""Command-line options from the fields of settings models, and help that lists options in panels.

The models are imported when a command is used or its help is printed, so `qnas --help` stays fast.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import chain
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from qnas.commands import completion
from qnas.commands.options import OPTIONS, option

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Fields:
    """The fields of a model that a command takes as options."""

    model: str  # as in "qnas.search.config:SearchConfig"
    panels: Mapping[str, tuple[str, ...]]  # of the help -> the names of their fields
    rest: str | None = None  # the panel of all other fields
    show_defaults: bool = True  # of the model; False if they come from a file

    def options(self) -> Iterator[inspect.Parameter]:
        """Yield the options as parameters of a function; an option that is not given is None."""
        module, name = self.model.split(":")
        model: type[BaseModel] = getattr(import_module(module), name)
        panels = dict(self.panels)
        if self.rest is not None:
            placed = set(chain(*panels.values()))
            panels[self.rest] = tuple(n for n, f in model.model_fields.items() if f.repr and n not in placed)
        for panel, names in panels.items():
            for each in names:
                kind, made = self._option(each, model.model_fields[each], panel)
                annotation = Annotated[kind | None, made]  # type: ignore[valid-type]  # made here
                keyword = inspect.Parameter.KEYWORD_ONLY
                yield inspect.Parameter(each, keyword, default=None, annotation=annotation)

    def _option(self, name: str, info: "FieldInfo", panel: str) -> tuple[type, Any]:
        kind, metadata = _plain(info.annotation)
        metadata = (*metadata, *info.metadata)
        parts, complete = [info.description or ""], None
        if get_origin(kind) is Literal:
            values = get_args(kind)
            kind, complete = str, completion.one_of(*values)
            parts.append(f"[{'|'.join(values)}]")
        if self.show_defaults and info.is_required():
            parts.append("[default: by the preset]")
        elif self.show_defaults and info.default is not None and kind is not bool:
            parts.append(f"[default: {info.default}]")
        flags = [f"--{OPTIONS[name]}"] if name in OPTIONS else []
        least, most = _bound(metadata, "ge", max), _bound(metadata, "le", min)
        return kind, option("  ".join(parts), *flags, panel=panel, complete=complete, least=least, most=most)


def _plain(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type in an annotation that may be optional, and the constraints on it."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not type(None))
    if get_origin(annotation) is Annotated:
        kind, *parts = get_args(annotation)
        return kind, tuple(chain(*(getattr(part, "metadata", [part]) for part in parts)))
    return annotation, ()


def _bound(metadata: tuple[Any, ...], name: str, tightest: Callable[..., Any]) -> Any:
    return tightest((v for part in metadata if (v := getattr(part, name, None)) is not None), default=None)


def takes_fields(function: Function) -> Function:
    """Hide a command's `**fields` from typer: they are the options of its `field_command`."""
    signature = inspect.signature(function)
    plain = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=plain)  # type: ignore[attr-defined]  # any has it
    return function


class PanelCommand(TyperCommand):
    """A command whose help lists its options in panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel, in the order of their first options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                name = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panel = getattr(parameter, "rich_help_panel", None) or name
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def field_command(*groups: Fields) -> type[PanelCommand]:
    """Return the class of a command that also has these fields as options.

    They are passed to its function, whose `**fields` are hidden by `takes_fields`.
    """

    class FieldCommand(PanelCommand):
        @cached_property
        def _whole(self) -> Any:
            """The same command with all its options, made at its first use."""
            return _command(self._function, groups)

        @property
        def params(self) -> list[Any]:
            parameters: list[Any] = self._whole.params  # the same list each time, since click changes it
            return parameters

        @params.setter
        def params(self, given: list[Any]) -> None:
            pass

        @property
        def callback(self) -> Any:
            return self._whole.callback

        @callback.setter
        def callback(self, given: Any) -> None:
            self._function = given.__wrapped__

    return FieldCommand


def _command(function: Callable[..., Any], groups: tuple[Fields, ...]) -> Any:
    """Return the command that typer makes of a function with these fields as further parameters."""

    def run(**given: Any) -> Any:
        return function(**given)

    fields = [option for group in groups for option in group.options()]
    given = inspect.signature(function).parameters.values()
    run.__signature__ = inspect.Signature([*given, *fields])  # type: ignore[attr-defined]  # any has it
    run.__annotations__ = {each.name: each.annotation for each in (*given, *fields)}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(run)
    return typer.main.get_command(app)
