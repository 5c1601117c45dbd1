"""The device file of this machine: a new one, or an existing one with a further space."""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from qnas import __version__
from qnas.common import host
from qnas.common.errors import CheckpointError
from qnas.deploy.distinct_blocks import COPIES
from qnas.deploy.runtimes import Runtime
from qnas.latency.device import SCHEMA, Device, load_device, parse_device
from qnas.latency.evaluation import figures
from qnas.spaces.space import SearchSpace

LOADS = 3  # of each chain


def this_device(runtime: Runtime, name: str, repeats: int) -> Device:
    """Return the device that this machine is with this runtime. Raises TableError for a bad name."""
    threads = f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}"
    clock = host.gpu_clock() if runtime.target == "cuda" else host.cpu_clock()
    content = {
        "schema": SCHEMA,
        "name": name,
        "title": f"{host.cpu_name()}, {threads}",
        "runtime": f"{runtime.version}, {runtime.settings}",
        "precision": "float32",
        "batch": 1,
        "unit": "ms",
        "kind": "measured",
        "source": f"qnas profile {__version__}: chains of {COPIES} blocks, {LOADS} loads, medians "
        f"of {repeats} or more interleaved runs; {host.load()}, {clock}",
        "date": date.today().isoformat(),
    }
    return parse_device(json.dumps(content), f"device {name}")


def former_device(device: Device, file: Path, table_file: Path, *, force: bool) -> Device | None:
    """Return the existing device of this file; None where there is none or another one is replaced."""
    former = load_device(file) if file.exists() else None
    if former is not None and (former.title, former.runtime) != (device.title, device.runtime):
        others = any(path != table_file for path in table_file.parent.glob("*.csv"))
        if others or not force:
            differs = [
                f"{getattr(former, key)}, this one is {getattr(device, key)}"
                for key in ("title", "runtime")
                if getattr(former, key) != getattr(device, key)
            ]
            raise CheckpointError(
                f"{file}: describes another device: {'; '.join(differs)}: "
                f"give {'another' if others else '`force=True` or another'} `device_name`"
            )
        former = None
    if table_file.exists() and not force:
        raise CheckpointError(
            f"{table_file}: exists already: `force=True` measures again, or give another `device_name`"
        )
    return former


def complete_device(
    device: Device,
    former: Device | None,
    space: SearchSpace,
    whole: Sequence[tuple[float, float]],
    *,
    keeps_calibration: bool,
) -> Device:
    """Return the device with what was there, and how sums of this space's blocks compare with networks.

    A calibration does not outlive the table that it was made for.
    """
    update: dict[str, object] = {"date": device.date, "source": device.source}
    accuracy = dict((former or device).accuracy)
    if len(whole) > 1:
        sums, measured = np.array(whole).T
        accuracy[f"whole networks of {space.name}"] = {"all": figures(sums, measured)}
    update["accuracy"] = accuracy
    if not keeps_calibration:
        update["calibration"] = None
    return (former or device).model_copy(update=update)
