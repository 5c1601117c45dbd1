"""Descriptions of the differences between the requests of an earlier run and of the present one."""

from collections.abc import Iterator, Mapping
from typing import Any

from qnas.common.arguments import quoted
from qnas.common.errors import SpaceError, TableError, abbreviate, one_line
from qnas.common.reading import csv_rows, parse_yaml

_SHOWN = 5  # items of a list that are compared one by one
_DIGEST_SHOWN = 8  # characters

Path = tuple[str | int, ...]
Texts = Mapping[str, str]  # of the files that a run keeps a copy of, by name
NO_TEXTS: Texts = {}


def describe_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], kept: Texts = NO_TEXTS, given: Texts = NO_TEXTS
) -> list[str]:
    """Describe the differences between two requests, apart from those of versions.

    `kept` are the run's copies of its space and latency tables (space.yaml, table-DEVICE.csv), and
    `given` their present texts; a change of a digest is described by comparing them.
    """
    # entries that follow from others are reported only where those are equal
    follows = {"budget_ms", "limit"}
    if before.get("space_digest") != now.get("space_digest"):
        follows.add("table_digest")  # a table is of one space
    if "limits" in before and "limits" in now:
        follows |= {"device", "budget"}  # at the top level: those of the first device
    found: dict[str, None] = {}  # in order, each once: a digest may occur in several places
    following: dict[str, None] = {}
    for path, old, new in _differences(before, now):
        is_inner = len(path) > 1 and path[-1] in ("device", "budget")
        words = _change(path, old, new, kept, given)
        (following if path[-1] in follows and not is_inner else found).update(dict.fromkeys(words))
    return list(found or following)


def _change(path: Path, old: Any, new: Any, kept: Texts, given: Texts) -> list[str]:
    """Describe one change; a change of latency tables gives a text for each device."""
    key = str(path[-1])
    digests = f"digest {str(old)[:_DIGEST_SHOWN]} -> {str(new)[:_DIGEST_SHOWN]}"
    if path[0] == "versions":
        return []
    if key == "table_digest":
        return _tables(kept, given) or [f"the latency table changed ({digests})"]
    if key == "space_digest":
        details = _space(kept.get("space.yaml"), given.get("space.yaml"))
        return [f"the space changed ({digests}){': ' if details else ''}{details}"]
    if key.endswith("_digest"):
        return [f"the {key.removesuffix('_digest')} changed ({digests})"]
    return [_option(path, old, new)]


def _differences(before: Any, now: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the paths at which two nested values differ, with both values; None for a missing one."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), (*path, key))
    elif isinstance(before, list) and isinstance(now, list) and _are_tables(before, now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            same_name = "name" in old and old["name"] == new.get("name")
            yield from _differences(old, new, (*path, i, *([old["name"]] if same_name else [])))
    elif before != now:
        yield path, before, now


def _are_tables(before: list[Any], now: list[Any]) -> bool:
    """Whether both are lists of mappings of equal length, which are compared one by one."""
    return len(before) == len(now) and all(isinstance(item, Mapping) for item in (*before, *now))


def _option(path: Path, old: Any, new: Any) -> str:
    """Describe a changed option: `batch size was 64, is 128`."""
    name = str(path[-1]).replace("_px", " in pixels").replace("_", " ")
    if len(path) > 2 and isinstance(path[1], int):  # of an item of a list, which may have a name
        name += f" of {path[2]}" if len(path) > 3 else f" of {path[0]} {path[1] + 1}"
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{name}: there were {len(old)}, there are {len(new)}"
        if len(old) > _SHOWN:
            return f"{name}: {sum(a != b for a, b in zip(old, new, strict=True))} of {len(old)} changed"
    return f"{one_line(name, 60)} was {quoted(old)}, is {quoted(new)}"


def _space(before: str | None, now: str | None) -> str:
    """Describe the changes of a space; empty where the run has no copy of it."""
    if before is None or now is None:
        return ""
    try:
        old, new = (parse_yaml(text, "space", SpaceError) for text in (before, now))
    except SpaceError:  # a copy that somebody edited
        return ""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    if old.get("name") != new.get("name"):
        return f"it was {one_line(old.get('name'), 60)}, is {one_line(new.get('name'), 60)}"
    return abbreviate([_in_space(path, a, b) for path, a, b in _differences(old, new) if path != ("source",)])


def _in_space(path: Path, old: Any, new: Any) -> str:
    """Describe a change of a space: `channels 32 -> 48 in stage 1`."""
    number = path[1] if path[0] == "stages" and len(path) > 1 else None
    stage = f" in stage {number + 1}" if isinstance(number, int) else ""
    name = ".".join(str(part) for part in path[2 if stage else 0 :] if isinstance(part, str))
    if isinstance(old, list) or isinstance(new, list):  # of different lengths; others are compared one by one
        was, is_now = (len(value) if isinstance(value, list) else 0 for value in (old, new))
        return f"{was} -> {is_now} {name}{stage}"
    return f"{one_line(name, 60)} {one_line(old, 60)} -> {one_line(new, 60)}{stage}"


def _tables(kept: Texts, given: Texts) -> list[str]:
    """Describe the changes of each device's table."""
    found = []
    for name in sorted(name for name in given if name.startswith("table-")):
        device = name.removeprefix("table-").removesuffix(".csv")
        if kept.get(name, given[name]) != given[name]:
            old, new = _latencies(kept[name]), _latencies(given[name])
            both = [row for row in new if row in old]  # rows differ only where the space does
            changed = abbreviate([f"{row} {old[row]} -> {new[row]}" for row in both if old[row] != new[row]])
            found.append(f"the latency table of {device} changed{f': {changed} (ms)' if changed else ''}")
    return found


def _latencies(text: str) -> dict[str, str]:
    """Return the milliseconds of a table's rows, by position and candidate; of another text, none."""
    columns = ("position", "candidate", "latency_ms")
    try:
        rows = [row for _, row in csv_rows(text, "table", TableError, columns)]
    except TableError:  # a copy that somebody edited
        return {}
    return {f"{row['position']} {row['candidate']}".strip(): row["latency_ms"] for row in rows}
