"""Images as a user gives them: one of the shipped kinds by name, or Datasets; and how a run records them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

from qnas.common.errors import DataError

if TYPE_CHECKING:
    from qnas.data.datasets import AnyDataset, Datasets
    from qnas.data.image_data import ImageData
    from qnas.data.sources import DataSpec

    Data = Union[str, DataSpec, AnyDataset, Datasets]

DATASET = "dataset"  # the kind that a run records for Datasets, which it cannot open again by itself
SMALL_PX = 64  # images of a Dataset up to this size are trained on as those of CIFAR-10 are


def recorded_data(data: "Data", images: "ImageData") -> str:
    """Return the name of the data for a run's config.json: `digits`, `imagefolder:DIR`, `dataset:NAME`."""
    from qnas.data.sources import DataSpec, parse_data_spec

    if isinstance(data, str | DataSpec):
        return str(parse_data_spec(str(data)))
    return f"{DATASET}:{images.name}"


def kind_of(data: "Data") -> str:
    """Return the kind of data, by which presets and recipes are chosen.

    Datasets are treated as CIFAR-10 is where their first image has at most SMALL_PX pixels a side, else as a
    folder of photographs.
    """
    from qnas.data.datasets import Datasets
    from qnas.data.sources import DataSpec, parse_data_spec

    if isinstance(data, str | DataSpec):
        return parse_data_spec(str(data)).kind
    opened = data if isinstance(data, Datasets) else Datasets(data)
    return "cifar10" if max(opened.first_size_px) <= SMALL_PX else "imagefolder"


def again(data: "Data | None", former: Mapping[str, Any], default: str | None = None) -> "Data":
    """Return the data of a run: those given now, else those of its config.json, else the default.

    Raises DataError where the run had Datasets, or recorded no data, and none are given.
    """
    if data is not None:
        return data
    recorded = former.get("data", default)
    if recorded is None:
        raise DataError("the run does not say what data it had: give them as `data`")
    if str(recorded).partition(":")[0] == DATASET:
        raise DataError(f"the run had a Dataset of your own ({recorded}): give it again as `data`")
    return str(recorded)
