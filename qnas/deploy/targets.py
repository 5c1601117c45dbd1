"""The devices of a search and the files that run on them, by the runtime that their latencies are of.

A latency holds for one runtime. A file of another format may run on the device as well, in another runtime:
nobody predicted how fast.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qnas.common.errors import UsageError, one_line
from qnas.deploy.export.formats import check_request
from qnas.deploy.file_latency import searched_devices
from qnas.latency.device import FilePrecision
from qnas.runs.found_arch import FoundArch

DEFAULT = "onnx"  # for runtimes that are not listed, and in place of a format that cannot be written

# the runtime of a device file -> the formats that run in it; the first that fits counts
_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"tflite|litert|tensorflow lite", ("tflite",)),
    # releases before 2022 read neither the IR nor the ONNX operators of the format openvino
    (r"myriad|openvino.20(18|19|20|21)", ("vpu",)),
    (r"openvino", ("openvino",)),
    (r"executorch", ("executorch",)),
    (r"torch.*cuda", ("torch", "onnx")),  # onnx for TensorRT
    (r"torch", ("torch",)),
)


def formats_of(runtime: str) -> tuple[str, ...]:
    """Return the formats that a runtime reads, each of which is enough.

    >>> formats_of("TFLite 2.1, GPU delegate"), formats_of("onnxruntime 1.32.0, 1 thread")
    (('tflite',), ('onnx',))
    """
    return next((names for pattern, names in _FORMATS if re.search(pattern, runtime, re.I)), (DEFAULT,))


@dataclass(frozen=True)
class Target:
    """A device of a search; `runtime` is that of its latencies, empty where the device is not known here."""

    device: str
    runtime: str
    format: str = ""  # of the files that its latencies are of, where the device says it
    precision: FilePrecision = "fp32"  # of these files

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of the files that run there."""
        return (self.format,) if self.format else formats_of(self.runtime)

    def runs(self, entry: Mapping[str, Any]) -> bool:
        """Return whether a file of a card runs there, in the precision that its latencies are of.

        Files of any precision run where they are of float32 files.
        """
        is_other = self.precision != "fp32" and entry.get("precision") != self.precision
        return entry["format"] in self.formats and not is_other


def targets_of(found: FoundArch) -> tuple[Target, ...]:
    """Return the devices of an architecture's search, in the order of its limits; none without a search."""
    known = searched_devices(found)
    return tuple(
        Target(name, "")
        if device is None
        else Target(name, device.runtime, device.file_format, device.file_precision)
        for name, device in known
    )


def is_for_phone_gpus(targets: Iterable[Target]) -> bool:
    """Return whether TFLite files run on GPUs, on all devices of the search that run them."""
    runtimes = [target.runtime for target in targets if "tflite" in target.formats]
    return bool(runtimes) and all(re.search("gpu", runtime, re.I) for runtime in runtimes)


def precisions_of(targets: Iterable[Target]) -> tuple[FilePrecision, ...]:
    """Return the precisions of the files that latencies are of, fp32 without a device."""
    return tuple(dict.fromkeys(target.precision for target in targets)) or ("fp32",)


@dataclass(frozen=True)
class Choice:
    """The formats to write, and why others that the devices need cannot be written here."""

    formats: tuple[str, ...]
    unable: Mapping[str, str]  # by format


def choose_formats(targets: Sequence[Target], precision: str, batch: int | None) -> Choice:
    """Return the formats that the devices run; DEFAULT stands in for those that cannot be written here.

    Raises UsageError where that one has no such precision.
    """
    formats: list[str] = []
    unable: dict[str, str] = {}
    for name in [name for target in targets for name in target.formats] or [DEFAULT]:
        try:
            check_request((name,), precision, batch)
            formats.append(name)
        except UsageError as error:
            unable[name] = one_line(error)
            formats.append(DEFAULT)
    check_request(formats, precision, batch)
    return Choice(tuple(dict.fromkeys(formats)), unable)


@dataclass(frozen=True)
class DeviceFiles:
    """The files that run on a device of the search; if there are none, the command that writes one."""

    device: str
    runtime: str
    files: tuple[str, ...]  # names, of the first file of each export
    problem: str  # why there is none, where it is not for want of asking
    command: str  # empty if there is a file

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return asdict(self)


def device_files(
    targets: Iterable[Target],
    entries: Mapping[str, Mapping[str, Any]],
    unable: Mapping[str, str],
    command: str,
) -> tuple[DeviceFiles, ...]:
    """Return which of a card's files run on each device; `command` exports them, without a format."""
    found = []
    for target in targets:
        names = tuple(name for name, entry in entries.items() if target.runs(entry))
        missing = target.formats[0]
        precision = "" if target.precision == "fp32" else f" --precision {target.precision}"
        found.append(
            DeviceFiles(
                target.device,
                target.runtime,
                names,
                "" if names else unable.get(missing, ""),
                "" if names else f"{command} --format {missing}{precision}",
            )
        )
    return tuple(found)


def describe_device(facts: Mapping[str, Any]) -> str:
    """Write the facts of a DeviceFiles in words."""
    runtime = facts["runtime"] or "a device that is not known here"
    where = f"{facts['device']} ({runtime})"
    if facts["files"]:
        return f"{where}: {', '.join(facts['files'])}"
    problem = facts["problem"]
    told = (
        f"no file that runs there: {problem}; then" if problem else "no file that runs there; write one with"
    )
    return f"{where}: {told} {facts['command']}"
