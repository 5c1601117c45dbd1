"""A device: the source of its latencies, their accuracy, and the cost of its kernels.

A device file is readable JSON. A network takes `fixed_ms` plus the sum over its kernels, each a sum of
coefficients times features or interpolated in a grid of measurements. All coefficients are positive, all
features grow with the shape and no grid falls, so no kernel is free and none gets faster by growing.

Your own device is a file of the same schema, anywhere. It needs no model if a folder beside it, of its name
without the suffix, has measured tables. `own_latency` makes devices from functions and blocks.
"""

import json
import math
import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from qnas.common.arguments import check_arguments, quoted
from qnas.common.documents import FilePart, describe_problems, to_tuples
from qnas.common.errors import QnasError, TableError, UsageError, nearest, one_line
from qnas.common.reading import is_file, parse_json, read_text
from qnas.common.resources import shipped, stems
from qnas.common.units import MOST_MS, number_or_nan
from qnas.latency.features import FEATURES
from qnas.latency.grid import Grid
from qnas.latency.intervals import Errors, Uncertainty
from qnas.latency.kernels import FUSIONS, Kernel
from qnas.spaces.space import SearchSpace

SCHEMA = "qnas.device/1"
FILE_BYTES = 16_000_000  # the largest shipped file has 0.1 MB
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

# Finite numbers whose sums and products stay finite. No shape has a feature above 1e20.
Milliseconds = Annotated[float, Field(ge=0, le=MOST_MS, allow_inf_nan=False)]
# of the user's own measurements; the largest supercomputer takes 3e7 W
Watts = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Millijoules = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=f"^{NAME}$", max_length=100)]
Day = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]

# measured: timed itself; fitted: from a model of such measurements; estimated: never timed
Source = Literal["measured", "fitted", "estimated"]
# int8-dynamic: weights in int8, with the range of each map found for each image
FilePrecision = Literal["fp32", "fp16", "int8", "int8-dynamic"]

# latency: of a network that runs for `batch` images by itself; throughput: the time of a batch divided by its
# images, where the device is full and a batch may begin before the last one is done
Quantity = Literal["latency", "throughput"]


# of a kernel, in its measured networks
Size = Literal["resolution_px", "c_in", "c_out", "kernel"]


class KernelModel(FilePart):
    """The cost of one kind of kernel, in one of three forms.

    `terms`: milliseconds for each unit of each feature; `grid`: interpolated between operators timed
    by themselves; `like`: the cost of a kernel of another kind and the same shape. A kernel above one of the
    sizes `measured_up_to`, such as {"c_out": 1024}, is an estimate.

    Its energy may be stated in one of two forms. `energy_mj`: millijoules for each unit of each feature;
    `power_w`: of the device while it runs, which is multiplied by its latency.
    """

    kind: Source
    note: str = ""
    terms: dict[str, Milliseconds] | None = None
    grid: Grid | None = None
    like: str | None = None
    measured_up_to: dict[Size, int] | None = None
    energy_mj: dict[str, Millijoules] | None = None
    power_w: Watts | None = None

    @model_validator(mode="after")
    def _check_energy(self) -> Self:
        if self.energy_mj is not None and self.power_w is not None:
            raise ValueError("expected one of energy_mj and power_w")
        unknown = [name for name in self.energy_mj or () if name not in FEATURES]
        if unknown:
            raise ValueError(
                f"energy_mj: unknown feature {quoted(unknown[0])}: {nearest(unknown[0], FEATURES)}"
            )
        if self.energy_mj is not None and not any(self.energy_mj.values()):
            raise ValueError("energy_mj must have a term above 0, so that no kernel is free")
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(form is not None for form in (self.terms, self.grid, self.like)) != 1:
            raise ValueError("expected one of terms, grid and like")
        if self.terms is None:
            return self
        unknown = [name for name in self.terms if name not in FEATURES]
        if unknown:
            raise ValueError(f"unknown feature {quoted(unknown[0])}: {nearest(unknown[0], FEATURES)}")
        if not self.terms.get("launch"):
            raise ValueError("launch must be above 0, so that no kernel is free")
        return self

    def latency_ms(self, kernel: Kernel) -> float:
        """Return the latency of a kernel in milliseconds; the device looks up `like`."""
        if self.grid is not None:
            return self.grid.latency_ms(kernel)
        assert self.terms is not None
        return math.fsum(weight * FEATURES[name](kernel) for name, weight in self.terms.items())

    def covers(self, kernel: Kernel) -> bool:
        """Whether the kernel is no larger than what was measured; True where the file does not say."""
        return all(getattr(kernel, size) <= most for size, most in (self.measured_up_to or {}).items())


class Figures(FilePart):
    """The accuracy of predictions on measurements that the model has not seen; shares in percent."""

    n: int
    rmspe_pct: Finite  # root of the mean squared relative error
    within_5_pct: Finite
    within_10_pct: Finite
    within_15_pct: Finite | None = None
    bias_pct: Finite  # mean relative error: above 0 where predictions are too high
    spearman: Finite | None = None  # rank correlation; None where undefined, as for one network


class Calibration(FilePart):
    """A correction of a model by measured networks: latency = scale * model + offset, with a margin.

    A share `level` of networks like those measured takes at most (1 + margin) times the prediction.
    """

    scale: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    offset_ms: Annotated[float, Field(ge=-MOST_MS, le=MOST_MS, allow_inf_nan=False)]
    margin: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
    level: Annotated[float, Field(gt=0, lt=1)]
    n: Annotated[int, Field(ge=1)]
    date: Day
    source: str


class Device(FilePart):
    """A checked device file."""

    file_schema: Literal["qnas.device/1"] = Field(alias="schema")
    name: Name
    aliases: Annotated[tuple[str, ...], BeforeValidator(to_tuples)] = ()
    title: str
    runtime: str
    precision: str  # of the computation, in words
    # the files whose latency this is: their format where `runtime` does not tell it, and their precision
    file_format: Annotated[str, Field(pattern="^[a-z]*$", max_length=20)] = ""
    file_precision: FilePrecision = "fp32"
    batch: Annotated[int, Field(ge=1)]
    unit: Literal["ms"]
    quantity: Quantity = "latency"
    kind: Source
    source: str
    date: Day
    # what was held out of the fit -> group ("all", a family, an operator) -> figures
    accuracy: dict[str, dict[str, Figures]] = Field(default={})
    fusion: str = "edge"
    fixed_ms: Milliseconds = 0.0
    model: dict[str, KernelModel] = Field(default={}, max_length=1_000)
    calibration: Calibration | None = None
    uncertainty: Uncertainty | None = None  # of predictions, after the calibration if there is one
    # energy, where the user states it: of what has no figure of its own, and of each network in all
    power_w: Watts | None = None
    fixed_mj: Millijoules | None = None

    _tables: Traversable | None = PrivateAttr(default=None)
    _shipped: bool = PrivateAttr(default=False)
    _kernel_function: Callable[[Kernel], float] | None = PrivateAttr(default=None)
    _table_function: Callable[["Device", SearchSpace], Any] | None = PrivateAttr(default=None)

    def __hash__(self) -> int:
        return hash(self.name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {quoted(self.fusion)}: {nearest(self.fusion, FUSIONS)}")
        priced = [name for name, other in self.model.items() if other.like is None]
        for kind, model in self.model.items():
            if model.like is not None and model.like not in priced:
                missing = (
                    f"no kind {quoted(model.like)} with a cost of its own: {nearest(model.like, priced)}"
                )
                raise ValueError(f"model.{kind:.60}: {missing}")
        if self.model and self.network_ms < 0:
            raise ValueError("calibration: the offset puts a network without kernels below zero")
        return self

    @property
    def tables(self) -> Traversable | None:
        """The folder of the device's tables; None for a device that was not loaded from a file."""
        return self._tables

    @property
    def is_shipped(self) -> bool:
        """Whether the device came with qnas, not from a file of the user."""
        return self._shipped

    @property
    def table_function(self) -> Callable[["Device", SearchSpace], Any] | None:
        """The function that returns the LatencyTable of a space, where one was given in Python."""
        return self._table_function

    @property
    def prices_kernels(self) -> bool:
        """Whether the device has a model or a function of kernels, not only tables of blocks."""
        return bool(self.model) or self._kernel_function is not None

    def with_functions(
        self,
        *,
        kernel: Callable[[Kernel], float] | None = None,
        table: Callable[["Device", SearchSpace], Any] | None = None,
    ) -> "Device":
        """Return this device with latencies from Python: of a kernel in ms, or the table of a space."""
        device = self.model_copy()
        device._kernel_function, device._table_function = kernel, table
        return device

    def prices(self, kernel: Kernel) -> bool:
        """Whether the device has a cost for kernels of this kind."""
        return self._kernel_function is not None or kernel.kind in self.model

    def kernel_source(self, kernel: Kernel) -> Source:
        """Return the source of a kernel's latency. Raises TableError for an unknown kind.

        A kernel that is larger than those measured is an estimate.
        """
        if self._kernel_function is not None:
            return self.kind
        model = self._model_of(kernel)
        return model.kind if model.covers(kernel) and self._cost_of(model).covers(kernel) else "estimated"

    def _cost_of(self, model: KernelModel) -> KernelModel:
        """Return the model of the kind by which a kernel is priced."""
        return self.model[model.like] if model.like is not None else model

    def _model_of(self, kernel: Kernel) -> KernelModel:
        if not self.model:
            raise TableError(
                f"device {self.name} has no model, only tables of measured spaces: "
                f"measure this space on it, or add a model to its file"
            )
        if kernel.kind not in self.model:
            known = nearest(kernel.kind, self.model)
            raise TableError(
                one_line(f"device {self.name} has no cost for {quoted(kernel.kind)} kernels: {known}", 300)
            )
        return self.model[kernel.kind]

    @property
    def per_image(self) -> str:
        """What follows a printed latency of a throughput device: `an image at batch 256`; else empty."""
        return f"an image at batch {self.batch}" if self.quantity == "throughput" else ""

    @property
    def states_kernel_energy(self) -> bool:
        """Whether the file states the energy or the power of some kind of kernel."""
        return any(m.energy_mj is not None or m.power_w is not None for m in self.model.values())

    @property
    def states_energy(self) -> bool:
        """Whether the file states energies at all."""
        return self.power_w is not None or self.states_kernel_energy

    @property
    def network_mj(self) -> float:
        """The energy that every network has besides its kernels. Raises TableError where it is not stated."""
        if self.fixed_mj is not None:
            return self.fixed_mj
        if self.power_w is None and self.network_ms > 0:
            raise TableError(
                f"device {self.name}: its networks take {self.network_ms:g} ms besides their kernels, of "
                "unknown energy: add fixed_mj, or power_w of the device, to its file"
            )
        return (self.power_w or 0.0) * self.network_ms

    def kernel_mj(self, kernel: Kernel) -> float:
        """Return the energy of a kernel in millijoules. Raises TableError where it is not stated."""
        own = self.model.get(kernel.kind)
        for stated in (own, self.model.get(own.like or "") if own is not None else None):
            if stated is not None and stated.energy_mj is not None:
                return math.fsum(weight * FEATURES[name](kernel) for name, weight in stated.energy_mj.items())
            if stated is not None and stated.power_w is not None:
                return stated.power_w * self.kernel_ms(kernel)
        if self.power_w is None:
            known = [kind for kind, model in self.model.items() if model.energy_mj or model.power_w]
            raise TableError(
                f"device {self.name} states no energy of {quoted(kernel.kind)} kernels, only of "
                f"{one_line(', '.join(known), 120)}: add theirs, or power_w of the device, to its file"
            )
        return self.power_w * self.kernel_ms(kernel)

    @property
    def network_ms(self) -> float:
        """The latency that every network has besides its kernels, calibrated."""
        return self.calibrated(self.fixed_ms, offset=True)

    @property
    def margin(self) -> float:
        """The share by which a measurement may exceed a prediction; 0 without a calibration."""
        return self.calibration.margin if self.calibration else 0.0

    def limit_ms(self, budget_ms: float) -> float:
        """Return the highest prediction for which a measurement within the margin meets the budget."""
        return budget_ms / (1.0 + self.margin)

    @property
    def known_uncertainty(self) -> Uncertainty | None:
        """The uncertainty of predictions; that of a calibration without one is its margin, None without."""
        if self.uncertainty is not None or self.calibration is None:
            return self.uncertainty
        c = self.calibration
        at_most = Errors(level=c.level, low=-1.0, high=c.margin)
        return Uncertainty(source=c.source, networks=c.n, errors=(at_most,))

    def calibrated(self, latency_ms: float, *, offset: bool = False) -> float:
        """Return a latency of the model or a table after calibration; the offset is added per network."""
        if self.calibration is None:
            return latency_ms
        return self.calibration.scale * latency_ms + (self.calibration.offset_ms if offset else 0.0)

    def kernel_ms(self, kernel: Kernel) -> float:
        """Return the latency of a kernel in milliseconds. Raises TableError for an unknown kind."""
        if self._kernel_function is not None:
            return self.calibrated(self.ms_of(self._kernel_function, kernel, kernel))
        model = self._model_of(kernel)
        return self.calibrated(self._cost_of(model).latency_ms(kernel))

    def ms_of(self, function: Callable[[Any], Any], argument: Any, of: object) -> float:
        """Return the result of a Python function as a latency. Raises TableError where it raises, too."""
        try:
            latency_ms = function(argument)
        except QnasError:
            raise
        except Exception as error:  # a user's function
            raise TableError(
                f"device {self.name}: its function raised {type(error).__name__} for {one_line(of, 80)}: "
                f"{one_line(error, 80)}"
            ) from error
        return self.checked_ms(latency_ms, of)

    def checked_ms(self, latency_ms: Any, of: object) -> float:
        """Return the result of a Python function as a latency. Raises TableError for an invalid one."""
        value = number_or_nan(latency_ms)
        if not 0 <= value <= MOST_MS:
            raise TableError(
                f"device {self.name}: its function returned {quoted(latency_ms)} for {one_line(of, 100)}: "
                f"expected milliseconds, 0 to {MOST_MS:g}"
            )
        return value

    def to_json(self) -> str:
        """Return the file's text, which `parse_device` reads back to an equal value."""
        content = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # puts a row of numbers on one line; JSON strings contain no line breaks, so none is changed
        return re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


def parse_device(text: str, where: str) -> Device:
    """Read a device from JSON text. Raises TableError with all problems; `where` names it in messages."""
    content = parse_json(text, where, TableError)
    try:
        return Device.model_validate(content)
    except ValidationError as error:
        raise TableError(f"{where}: {describe_problems(error, Device)}") from error


def device_names() -> dict[str, tuple[str, ...]]:
    """Return the shipped devices by name, each with its aliases."""
    return {name: _load_shipped(name).aliases for name in stems("latency_tables", ".json")}


def load_device(device: str | Path | Device) -> Device:
    """Load a shipped device by name or alias, or your own by the path of its JSON file.

    A Device is returned unchanged. Raises TableError when there is none, or when its file is broken.

    >>> load_device("vpu").name
    'myriad-vpu'
    """
    if isinstance(device, Device):
        return device
    check_arguments(device=device)
    names = device_names()
    by_alias = {alias: name for name, aliases in names.items() for alias in aliases}
    name = by_alias.get(str(device), str(device))
    if name in names:
        return _load_shipped(name)
    path = Path(device)
    if is_file(path):
        return _parse_file(read_text(path, TableError, "a device file", limit=FILE_BYTES), path)
    if path.suffix == ".json" or len(path.parts) > 1:
        raise TableError(f"device {one_line(name)}: no such file")
    raise TableError(f"unknown device {quoted(name)}: {nearest(name, [*names, *by_alias])}")


def check_own_name(name: str, what: str = "device name") -> None:
    """Raise UsageError where your own device cannot have this name; `what` says where it was given."""
    if not re.fullmatch(NAME, name) or len(name) > 100:
        raise UsageError(
            f"{what} {quoted(name)}: expected letters, digits, '.', '_' and '-', such as my-phone"
        )
    if any(name in (known, *aliases) for known, aliases in device_names().items()):
        raise UsageError(f"{what} {name}: a device that ships has this name: choose another")


# A command loads a device at several places: a file with the same text is parsed once.
@lru_cache(maxsize=32)
def _parse_file(text: str, path: Path) -> Device:
    device = parse_device(text, str(path))
    device._tables = path.with_suffix("")
    return device


@cache
def _load_shipped(name: str) -> Device:
    text = shipped("latency_tables").joinpath(f"{name}.json").read_text(encoding="utf-8")
    device = parse_device(text, f"device {name}")
    device._tables = shipped("latency_tables").joinpath(name)
    device._shipped = True
    return device
