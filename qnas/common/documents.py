"""Models of YAML and JSON files, and the problems of a file in one line."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qnas.common.errors import QnasError, abbreviate, nearest, one_line
from qnas.common.reading import LINE_CHARACTERS, parse_yaml


class FilePart(BaseModel):
    """A part of a file: frozen, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Document(FilePart):
    """A part of a JSON file that qnas wrote. Keys of other versions are left out."""

    model_config = ConfigDict(extra="ignore")


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _check_printable(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("expected text without control characters")
    return text


def _check_path(text: str) -> str:
    if any(len(part.encode()) > NAME_BYTES for part in PurePath(text).parts):
        raise ValueError(f"expected a path whose names have at most {NAME_BYTES} bytes")
    return text


NAME_BYTES = 255  # of a file's name
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of spaces and devices; no path

Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Text = Annotated[str, Field(max_length=4096), AfterValidator(_check_printable)]
PathText = Annotated[Text, AfterValidator(_check_path)]  # a path, perhaps after a prefix such as imagefolder:
Digest = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
Number = Annotated[float, Field(ge=-1e40, le=1e40, allow_inf_nan=False)]  # within float32, as losses are
Amount = Annotated[float, Field(ge=0, le=1e40, allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=1e-9, le=1e40, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
ABSENT: Any = None  # the default of a key that may be missing, but not null
Scalar = str | bool | int | float | None
Scalars = dict[str, Scalar]


def check_content(
    model: type[BaseModel], content: Mapping[str, Any], where: str, error: Callable[[str], QnasError]
) -> None:
    """Check the content of a file that `where` names; `error` makes the exception for one that differs."""
    try:
        model.model_validate(content)
    except ValidationError as cause:
        raise error(f"{where}: {one_line(describe_problems(cause), LINE_CHARACTERS - 50)}") from cause


def read_mapping(text: str, where: str, schema: str, error: Callable[[str], QnasError]) -> dict[str, Any]:
    """Read a mapping from YAML text; `error` makes the exception if it has none."""
    content = parse_yaml(text, where, error)
    if not isinstance(content, dict):
        found = "an empty file" if content is None else _show(content)
        raise error(f"{where}: expected a mapping with schema: {schema}, got {found}")
    return content


# pydantic's type of a problem -> our message; other kinds keep pydantic's message
EXPECTATIONS = {
    "missing": "missing",
    "extra_forbidden": "unknown key",
    "literal_error": "expected {expected}",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "string_pattern_mismatch": "expected the form {pattern}",
    "greater_than_equal": "expected at least {ge}",
    "less_than_equal": "expected at most {le}",
    "greater_than": "expected more than {gt}",
    "less_than": "expected less than {lt}",
    "string_too_long": "expected at most {max_length} characters",
    "too_short": "expected at least {min_length}, got {actual_length}",
    "too_long": "expected at most {max_length}, got {actual_length}",
    "model_type": "expected a mapping",
    "dict_type": "expected a mapping",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "bool_type": "expected true or false",
}


def to_tuples(value: Any) -> Any:
    """Turn the lists of JSON into tuples, nested ones too."""
    return tuple(map(to_tuples, value)) if isinstance(value, list) else value


def describe_problems(error: ValidationError, model: type[BaseModel] | None = None, quote: str = "") -> str:
    """Describe the problems of a file in one line: key, expected value, value found.

    Those that a line has no room for are counted. With the model, an unknown key is followed by the nearest
    known ones. Keys are written between quotes.
    """
    lines = []
    for problem in error.errors(include_url=False):
        kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
        if kind in EXPECTATIONS:
            # some versions of pydantic show a bound of 10 as 10.0
            bounds = {k: f"{v:g}" if isinstance(v, float) else v for k, v in problem.get("ctx", {}).items()}
            if bounds.get("actual_length", 0) is None:  # of what was not counted to its end
                bounds["actual_length"] = "more"
            message = EXPECTATIONS[kind].format(**bounds)
        else:
            message = message[:1].lower() + message[1:]
        loc = problem["loc"]
        if kind == "extra_forbidden" and model is not None:
            known = _known_keys(model, loc[:-1])
            message += f" ({nearest(str(loc[-1]), known)})" if known else ""
        elif kind not in ("missing", "too_short", "too_long") and not isinstance(problem["input"], dict):
            # before the list of known names, which a short line has no room for
            told, bracket, known_names = message.partition(" (")
            message = f"{told}, got {_show(problem['input'])}{bracket}{known_names}"
        key = _key(loc)
        lines.append(f"{quote}{key}{quote}: {message}" if key else message)
    return abbreviate(list(dict.fromkeys(lines)), "; ", most=len(lines))


def _key(loc: tuple[int | str, ...]) -> str:
    """Return the place of a problem: `stages[1].channels`."""
    key = ""
    for part in loc:
        if isinstance(part, str):
            key += f".{one_line(part, 60)}"
        elif not key.endswith("candidates"):  # their lists are expanded, so numbers are not the file's
            key += f"[{part}]"
    return key.removeprefix(".")


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the part of a model at `loc`."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for number, part in enumerate(loc):
        if isinstance(part, str):
            inner = next(_models(fields[part].annotation), None) if part in fields else None
            return _known_keys(inner, loc[number + 1 :]) if inner else []
    return list(fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _show(found: Any) -> str:
    """Return a short text for a value of a file."""
    if found is None:
        return "nothing"
    if isinstance(found, dict | list | tuple):
        return "a mapping" if isinstance(found, dict) else "a list"
    try:
        text = repr(found[:60] if isinstance(found, str | bytes) else found)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of too many digits"
    return one_line(text, 60)
