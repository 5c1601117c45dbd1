"""Whether a saved state has the form of the search or training that it is to continue.

A checkpoint with a valid digest may still hold the state of another run, or one that somebody made. What
torch loads unchecked (the moments of an optimiser, the attributes of a schedule) would then fail at a later
step, far from its cause.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What a step changes in the state of a schedule or of a group of weights; all else follows from the request.
_CHANGING = {"lr", "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, shaped as their weight


def check_form(found: object, fresh: object, where: str = "state") -> None:
    """Raise ValueError where a saved value has another form than that of a fresh run.

    Tensors have the same type and shape, mappings the same keys, sequences the same length. A mapping or
    sequence that is empty in a fresh run may have any plain content, and a missing value may be a number.
    """
    if isinstance(fresh, Tensor):
        if not isinstance(found, Tensor):
            raise _wrong(where, found, fresh)
        if (found.dtype, found.shape, found.layout) != (fresh.dtype, fresh.shape, fresh.layout):
            raise _wrong(where, found, fresh)
    elif isinstance(fresh, Mapping):
        if not isinstance(found, Mapping) or (fresh and found.keys() != fresh.keys()):
            raise _wrong(where, found, fresh)
        for key, value in fresh.items():
            check_form(found[key], value, f"{where}.{key}")
    elif isinstance(fresh, list | tuple):
        if not isinstance(found, list | tuple) or (fresh and len(found) != len(fresh)):
            raise _wrong(where, found, fresh)
        if not fresh and not all(isinstance(value, int | float | str) for value in found):
            raise _wrong(where, found, fresh)
        for i, (ours, theirs) in enumerate(zip(found, fresh, strict=False)):
            check_form(ours, theirs, f"{where}.{i}")
    elif not isinstance(found, _types_like(fresh)) or isinstance(found, bool) != isinstance(fresh, bool):
        raise _wrong(where, found, fresh)


def _types_like(fresh: object) -> tuple[type, ...]:
    if fresh is None:
        return (type(None), float)
    return (int, float) if isinstance(fresh, float) else (type(fresh),)


def check_unchanged(found: object, fresh: object, where: str) -> None:
    """Raise ValueError where a saved schedule or group of weights differs in what no step changes."""
    if isinstance(fresh, Mapping) and isinstance(found, Mapping):
        for key, value in fresh.items():
            if key not in _CHANGING:
                check_unchanged(found[key], value, f"{where}.{key}")
    elif isinstance(fresh, list | tuple) and isinstance(found, list | tuple):
        for i, (ours, theirs) in enumerate(zip(found, fresh, strict=True)):
            check_unchanged(ours, theirs, f"{where}.{i}")
    elif found != fresh:
        raise _wrong(where, found, fresh)


def check_optimizer(found: Mapping[str, Any], optimizer: torch.optim.Optimizer, where: str) -> None:
    """Raise ValueError where the saved state of an Adam is not of the weights that it has.

    Weights that no step has reached have none.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    check_unchanged(found["param_groups"], optimizer.state_dict()["param_groups"], where)
    for place, kept in found["state"].items():
        if type(place) is not int or not 0 <= place < len(weights):
            raise ValueError(f"{where}: the state of weight {place!r} of {len(weights)}")
        shaped = torch.empty_like(weights[place], device="meta")
        fresh = {"step": torch.empty((), device="meta"), **dict.fromkeys(_MOMENTS, shaped)}
        check_form(kept, fresh, f"{where}.{place}")


def _wrong(where: str, found: object, fresh: object) -> ValueError:
    return ValueError(f"{where}: {_describe(found)}, expected {_describe(fresh)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    return repr(value)[:50]
