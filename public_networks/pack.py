"""Write timm.npz, the public networks that ship with qnas, from the data folder.

    python public_networks/pack.py --data PATH/TO/latency_data

The networks are in `zoo_networks.npz` there. The same data give the same bytes: arrays in a fixed order, in
the smallest integers that hold them, with fixed dates.
"""

import argparse
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
SOURCE = (
    "operators and ImageNet top-1 as published with timm "
    "(github.com/huggingface/pytorch-image-models, Apache-2.0)"
)
RENAMED = {"resolution": "resolution_px", "top1": "top1_pct"}
AS_THEY_ARE = ("name", "family", "op_names", "op_columns")
INTEGERS = ("resolution", "ops", "indptr", "indices")
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a ZIP archive can have


def packed(zoo: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of zoo_networks.npz in the form that ships."""
    arrays = {"source": np.array([SOURCE])} | {name: zoo[name] for name in AS_THEY_ARE}
    for name in INTEGERS:
        arrays[RENAMED.get(name, name)] = zoo[name].astype(np.min_scalar_type(int(zoo[name].max())))
    arrays[RENAMED["top1"]] = zoo["top1"].astype(np.float64)
    return dict(sorted(arrays.items()))


def write_arrays(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write an npz file whose bytes depend on the arrays only."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getvalue(), compresslevel=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of zoo_networks.npz")
    with np.load(parser.parse_args().data / "zoo_networks.npz", allow_pickle=False) as zoo:
        write_arrays(packed(zoo), HERE / "timm.npz")
