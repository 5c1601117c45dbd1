"""The data argument of a user, a shipped kind by its spec or Datasets, and its record in a run."""

from collections.abc import Mapping
from typing import Any

from qnas.common.errors import DataError
from qnas.data.datasets import AnyDataset, Datasets
from qnas.data.image_data import ImageData
from qnas.data.sources import DataSpec, parse_data_spec

GivenData = str | DataSpec | AnyDataset | Datasets

DATASET = "dataset"  # the kind recorded for Datasets, which a run cannot reopen by itself
SMALL_PX = 64  # images of Datasets up to this size get the settings of CIFAR-10, larger ones of photographs


def recorded_data(data: GivenData, images: ImageData) -> str:
    """Return the data's entry in config.json: `digits`, `imagefolder:DIR` or `dataset:NAME`."""
    if isinstance(data, str | DataSpec):
        return str(parse_data_spec(str(data)))
    return f"{DATASET}:{images.name}"


def kind_of(data: GivenData) -> str:
    """Return the kind of data, which selects presets and recipes. Raises DataError."""
    if isinstance(data, str | DataSpec):
        return parse_data_spec(str(data)).kind
    datasets = data if isinstance(data, Datasets) else Datasets(data)
    return "cifar10" if max(datasets.first_size_px) <= SMALL_PX else "imagefolder"


def reopen(data: GivenData | None, config: Mapping[str, Any], default: str | None = None) -> GivenData:
    """Return the data of a run: those given, or those recorded in its config.json, or the default.

    Raises DataError if no data are given and the run had Datasets or records no data.
    """
    if data is not None:
        return data
    recorded = config.get("data", default)
    if recorded is None:
        raise DataError("the run does not record its data: give them as `data`")
    if str(recorded).partition(":")[0] == DATASET:
        raise DataError(f"the run had Datasets ({recorded}): give them again as `data`")
    return str(recorded)
