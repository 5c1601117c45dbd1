"""Values of a run's documents by their keys."""

import json
from pathlib import Path
from typing import Any


def value_at(documents: dict[str, Any], key: str) -> Any:
    value: Any = documents
    for step in key.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def documents_of(folder: Path) -> dict[str, Any]:
    paths = {
        "arch": folder / "arch.json",
        "search": folder / "search.json",
        "config": folder / "config.json",
        "result": folder / "subnet" / "result.json",
    }
    return {name: json.loads(path.read_text()) for name, path in paths.items()}
