"""A device: where its latencies come from, how good they are, and what its kernels cost.

A device file is JSON that a person can read. The model is additive: a network takes `fixed_ms` plus
the sum over its kernels, and a kernel the sum of coefficients times features, or what a grid gives
for its shape. All coefficients are positive, all features grow with the shape and no grid falls, so
no kernel is free and none gets faster by growing.

A device of one's own is a file of the same schema anywhere. It needs no model: its measured tables
lie in a folder beside it that has the name of the file without its suffix.
"""

import json
import math
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from qnas.common.documents import describe_problems
from qnas.common.errors import TableError, nearest
from qnas.common.resources import shipped, stems
from qnas.latency.features import FEATURES
from qnas.latency.grid import Grid
from qnas.latency.kernels import FUSIONS, Kernel

SCHEMA = "qnas.device/1"

# measured: timed as it is; fitted: from a model of such measurements; estimated: never timed
Source = Literal["measured", "fitted", "estimated"]


class _Node(BaseModel):
    """A part of the file: frozen, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class KernelModel(_Node):
    """What kernels of one kind cost: one of three forms.

    `terms`: milliseconds for each unit of each feature; `grid`: interpolated between operators timed
    by themselves; `like`: as kernels of another kind of the same shape.
    """

    kind: Source
    note: str = ""
    terms: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    grid: Grid | None = None
    like: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(form is not None for form in (self.terms, self.grid, self.like)) != 1:
            raise ValueError("expected one of terms, grid and like")
        if self.terms is None:
            return self
        unknown = [name for name in self.terms if name not in FEATURES]
        if unknown:
            raise ValueError("; ".join(f"unknown feature {n!r}: {nearest(n, FEATURES)}" for n in unknown))
        if not self.terms.get("launch"):
            raise ValueError("launch must be above 0, so that no kernel is free")
        return self

    def latency_ms(self, kernel: Kernel) -> float:
        """Return what a kernel takes, in milliseconds; `like` is for the device to look up."""
        if self.grid is not None:
            return self.grid.latency_ms(kernel)
        assert self.terms is not None
        return math.fsum(weight * FEATURES[name](kernel) for name, weight in self.terms.items())


class Figures(_Node):
    """How predictions compare with measurements that the model has not seen; shares in percent."""

    n: int
    rmspe_pct: float  # root of the mean squared relative error
    within_5_pct: float
    within_10_pct: float
    bias_pct: float  # mean relative error: above 0 where predictions are too high
    spearman: float | None = None  # rank correlation; None where there is none, of one network say


class Calibration(_Node):
    """Measured networks against the model: latency = scale * model + offset, and how far it is off.

    The margin is the conformal quantile of measured / predicted - 1: of networks like those of the
    calibration, a share `level` takes at most (1 + margin) times the prediction.
    """

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    offset_ms: Annotated[float, Field(allow_inf_nan=False)]
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    level: Annotated[float, Field(gt=0, lt=1)]
    n: Annotated[int, Field(ge=1)]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    source: str


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Device(_Node):
    """A checked device file."""

    file_schema: Literal["qnas.device/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    aliases: Annotated[tuple[str, ...], BeforeValidator(_to_tuple)] = ()
    title: str
    runtime: str
    precision: str
    batch: Annotated[int, Field(ge=1)]
    unit: Literal["ms"]
    kind: Source
    source: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    # what was held out of the fit -> group ("all", a family, an operator) -> figures
    accuracy: dict[str, dict[str, Figures]] = {}
    fusion: str = "edge"
    fixed_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    model: dict[str, KernelModel] = {}
    calibration: Calibration | None = None

    _tables: Traversable | None = PrivateAttr(default=None)
    _shipped: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {self.fusion!r}: {nearest(self.fusion, FUSIONS)}")
        for kind, model in self.model.items():
            priced = [name for name, other in self.model.items() if other.like is None]
            if model.like is not None and model.like not in priced:
                known = nearest(model.like, priced)
                raise ValueError(f"model.{kind}: no kind {model.like!r} with a cost of its own: {known}")
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

    def kernel_model(self, kernel: Kernel) -> KernelModel:
        """Return what is known of such kernels. Raises TableError where nothing is."""
        if not self.model:
            raise TableError(
                f"device {self.name} has no model, only tables of measured spaces: "
                f"measure this space on it, or add a model to its file"
            )
        if kernel.kind not in self.model:
            raise TableError(
                f"device {self.name} has no cost for {kernel.kind!r} kernels: "
                f"{nearest(kernel.kind, self.model)}"
            )
        return self.model[kernel.kind]

    @property
    def network_ms(self) -> float:
        """What every network takes besides its kernels, calibrated."""
        return self.calibrated(self.fixed_ms, offset=True)

    @property
    def margin(self) -> float:
        """The share of a prediction that a measurement may lie above it; 0 where none was measured."""
        return self.calibration.margin if self.calibration else 0.0

    def calibrated(self, latency_ms: float, *, offset: bool = False) -> float:
        """Return a latency of the model or of a table after calibration; the offset is a network's."""
        if self.calibration is None:
            return latency_ms
        return self.calibration.scale * latency_ms + (self.calibration.offset_ms if offset else 0.0)

    def kernel_ms(self, kernel: Kernel) -> float:
        """Return what a kernel takes, in milliseconds. Raises TableError for an unknown kind."""
        model = self.kernel_model(kernel)
        cost = self.model[model.like] if model.like is not None else model
        return self.calibrated(cost.latency_ms(kernel))

    def to_json(self) -> str:
        """Return the file's text, which `parse_device` reads back to an equal value."""
        content = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # a row of numbers on one line; no text in quotes holds a line break, so none is touched
        return re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


def parse_device(text: str, where: str) -> Device:
    """Read a device from JSON text; `where` names it in messages.

    Raises TableError with every problem of the file in one line.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TableError(f"{where}: expected a JSON object, got {type(content).__name__}")
    try:
        return Device.model_validate(content)
    except ValidationError as error:
        raise TableError(f"{where}: {describe_problems(error)}") from error


def device_names() -> dict[str, tuple[str, ...]]:
    """Return the shipped devices by name, each with its aliases."""
    return {name: _load_shipped(name, file).aliases for name, file in _shipped_files().items()}


def load_device(name_or_path: str | Path) -> Device:
    """Load a shipped device by name or alias, or one's own by the path of its JSON file.

    Raises TableError when there is none, or when it is broken.
    """
    files = _shipped_files()
    by_alias = {alias: device for device, aliases in device_names().items() for alias in aliases}
    name = by_alias.get(str(name_or_path), str(name_or_path))
    if name in files:
        return _load_shipped(name, files[name])
    path = Path(name_or_path)
    if path.is_file():
        try:
            device = parse_device(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise TableError(f"{path}: not a text file in UTF-8") from error
        device._tables = path.with_suffix("")
        return device
    if path.suffix == ".json" or len(path.parts) > 1:
        raise TableError(f"device {name}: no such file")
    raise TableError(f"unknown device {name!r}: {nearest(name, [*files, *by_alias])}")


def _shipped_files() -> Mapping[str, Traversable]:
    return stems("latency_tables", ".json")


def _load_shipped(name: str, file: Traversable) -> Device:
    device = parse_device(file.read_text(encoding="utf-8"), f"device {name}")
    device._tables = shipped("latency_tables").joinpath(name)
    device._shipped = True
    return device
