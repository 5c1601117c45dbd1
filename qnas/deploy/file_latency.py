"""The predicted latency of an exported file, for its classes and resolution, on the devices of the search."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qnas.common.errors import QnasError, TableError, one_line
from qnas.common.units import format_ms
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import compute_table, load_table
from qnas.latency.prediction import DEVICE, table_from
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import CONFIG_FILE, SUBNET_FOLDER
from qnas.solver.solve import entry_latency_ms
from qnas.spaces.space import SearchSpace


@dataclass(frozen=True)
class FileLatency:
    """The latency of one image on a device, predicted for a file, and the budget of the search."""

    device: str
    resolution_px: int
    budget_ms: float
    latency_ms: float | None  # None if it cannot be predicted here
    problem: str = ""  # why it cannot
    certified: str = ""  # what the certified latency is of, where it is not of the file
    precision: str = "fp32"  # of the files that the device's latencies are of

    @property
    def over_budget(self) -> bool:
        """Whether the predicted latency exceeds the budget."""
        return self.latency_ms is not None and self.latency_ms > self.budget_ms

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {**asdict(self), "over_budget": self.over_budget}


def describe_latency(facts: Mapping[str, Any]) -> str:
    """Write the facts of a FileLatency in words."""
    where, budget = f"{facts['device']} at {facts['resolution_px']} px", format_ms(facts["budget_ms"])
    if facts.get("precision", "fp32") != "fp32":  # not in a card of an older version
        where += f", for files in {facts['precision']}"
    latency_ms = facts["latency_ms"]
    if latency_ms is None:
        return f"not predicted on {where}: {facts['problem']}"
    took = format_ms(latency_ms, round_up=True)
    certified = facts.get("certified") or ""  # not in a card of an older version
    if facts["over_budget"]:
        excess = latency_ms / facts["budget_ms"] - 1
        said = f"{took} on {where}, predicted for the file: over the budget of {budget} by {excess:.1%}"
    else:
        said = f"{took} of {budget} on {where}, predicted for the file"
    return f"{said}; certified is {certified}" if certified else said


def predict_exported(found: FoundArch, resolution_px: int, classes: int) -> tuple[FileLatency, ...]:
    """Predict a trained network at a resolution on the devices of its search, in the order of its limits.

    At the search's own resolution and number of classes, the latencies are those of its arch.json. There are
    none for an architecture without a search.
    """
    return tuple(
        _predict(found, name, budget_ms, certified_ms, resolution_px, classes)
        for name, budget_ms, certified_ms in _budgets(found.document)
    )


def searched_devices(found: FoundArch) -> tuple[tuple[str, Device | None], ...]:
    """Return the devices of a network's search by name, in the order of its limits; None if unknown here."""
    return tuple((name, _known(found, name)) for name, *_ in _budgets(found.document))


def _known(found: FoundArch, name: str) -> Device | None:
    try:
        return _device(found, name)
    except (QnasError, ValidationError):  # such as an own device whose file is gone
        return None


def _budgets(document: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Yield each device of a search with its budget and the latency that was certified."""
    limits = [entry for entry in document.get("limits") or () if entry["unit"] == "ms"]
    if limits:
        yield from ((entry["name"], entry["budget"], entry_latency_ms(entry)) for entry in limits)
    elif document.get("device") is not None and document.get("budget_ms") is not None:
        yield document["device"], document["budget_ms"], document.get("latency_ms")


def _of_another(found: FoundArch, certified_ms: float | None, resolution_px: int, classes: int) -> str:
    """Describe the certified network where the file has another size or number of classes; else nothing."""
    px, of_space = found.space.input.resolution_px, found.space.head.classes
    if certified_ms is None or (px, of_space) == (resolution_px, classes):
        return ""
    took = format_ms(certified_ms, round_up=True)
    return f"{took} at {px} px with {of_space} classes"


def _predict(
    found: FoundArch,
    name: str,
    budget_ms: float,
    certified_ms: float | None,
    resolution_px: int,
    classes: int,
) -> FileLatency:
    space = found.space
    certified = _of_another(found, certified_ms, resolution_px, classes)
    source = found.document.get("latency_source") or DEVICE
    try:
        device = _device(found, name)
        own = space.with_resolution(resolution_px).with_classes(classes)
        table = (
            table_from(source, device, space) if own.digest == space.digest else _table(source, device, own)
        )
        latency_ms = table.latency_ms(found.arch.indices(space))
    except (QnasError, ValidationError) as error:  # such as an own device whose file is gone
        return FileLatency(name, resolution_px, budget_ms, None, one_line(error), certified)
    return FileLatency(
        name, resolution_px, budget_ms, latency_ms, "", certified, precision=device.file_precision
    )


def _table(source: str, device: Device, space: SearchSpace) -> Any:
    """Return the table of a space that nobody measured: by the device's model where there is one."""
    if source != DEVICE:
        return table_from(source, device, space)
    is_modelled = device.table_function is None and device.prices_kernels
    return compute_table(device, space) if is_modelled else load_table(device, space)


def _device(found: FoundArch, name: str) -> Device:
    """Return a device of the search by its name, or from the file that the search was given."""
    try:
        return load_device(name)
    except TableError:
        for entry in _asked(found.folder):
            device = load_device(entry)
            if device.name == name:
                return device
        raise


def _asked(folder: Path) -> Iterator[str]:
    """Yield the devices that the run of a trained network was given, by name or path."""
    run = folder.parent if folder.name == SUBNET_FOLDER else folder
    limits = read_config(run).get("limits", ()) if (run / CONFIG_FILE).is_file() else ()
    yield from (entry["device"] for entry in limits if "device" in entry)
