"""A device of one's own that states energies: the Cortex-A76's latencies with made-up figures, for tests."""

import json
from collections.abc import Mapping
from typing import Any

from qnas.latency.device import Device, load_device, parse_device


def metered(
    name: str = "bench", kinds: Mapping[str, Mapping[str, Any]] | None = None, **stated: Any
) -> Device:
    """Return a device with these fields of its file, and those of its kinds of kernels."""
    content = json.loads(load_device("cpu").to_json())
    content |= {"name": name, "aliases": [], "accuracy": {}, **stated}
    for kind, changes in (kinds or {}).items():
        if kind in content["model"]:
            content["model"][kind] |= changes
    return parse_device(json.dumps(content), f"device {name}")
