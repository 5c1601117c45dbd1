"""What a search changed of the pretrained network that it started from."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qnas.runs.text import field
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

_SIZES = re.compile(r"_k(\d+)_e(\d+)")  # of an inverted residual's name


def changes_of(space: SearchSpace, arch: Arch, own: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the positions that differ from the pretrained network, by kind of change: before and after.

    `own` is the entry `pretrained` of an arch.json. Kinds are `pruned` (fewer hidden channels, in multiples
    of the input's), `grown` and `shrunk` (a larger or smaller kernel), `quadratic` and `dropped`; a block may
    have several.
    """
    found: dict[str, dict[str, str]] = {
        kind: {} for kind in ("pruned", "grown", "shrunk", "quadratic", "dropped")
    }
    for position, choice, before in zip(space.positions, arch.choices, own.get("choices", ()), strict=False):
        candidate, sizes = position.candidate(choice), _SIZES.search(before)
        if candidate.block == "identity":
            found["dropped"][position.name] = before
            continue
        if candidate.parameters.get("neuron", "linear") != "linear":
            found["quadratic"][position.name] = str(candidate.parameters["neuron"])
        if sizes is None or not {"kernel", "expansion"} <= candidate.sizes.keys():
            continue
        kernel, expansion = map(int, sizes.groups())
        if (now := candidate.sizes["expansion"]) < expansion:
            found["pruned"][position.name] = f"{expansion} > {now}"
        if (now := candidate.sizes["kernel"]) != kernel:
            found["grown" if now > kernel else "shrunk"][position.name] = f"{kernel} > {now}"
    return found


def pretrained_lines(space: SearchSpace, arch: Arch, document: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on what is left of the pretrained network; none for a search that started from scratch."""
    own = document.get("pretrained")
    if own is None:
        return
    changes = changes_of(space, arch, own)
    changed = {name for of_kind in changes.values() for name in of_kind}
    whole = len(space.positions) - len(changed)
    yield field("pretrained", f"{own['name']}: {whole} of {len(space.positions)} blocks as they were")
    words = {
        "pruned": "pruned (expansion)",
        "grown": "grown (kernel)",
        "shrunk": "shrunk (kernel)",
        "quadratic": "made quadratic",
        "dropped": "dropped",
    }
    for kind, of_kind in changes.items():
        if of_kind:
            shows = kind not in ("quadratic", "dropped")
            listed = (f"{name} {change}" if shows else name for name, change in of_kind.items())
            yield field("", f"{words[kind]}: {', '.join(listed)}")
