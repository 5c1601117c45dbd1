"""Forests for tests of nn-Meter's predictors: trained, and pickled as scikit-learn 0.23.1 did."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import RandomForestRegressor
from sklearn.tree import DecisionTreeRegressor
from sklearn.tree._tree import Tree

from qnas.latency.nn_meter.predictors import FEATURE_COUNTS, PUBLISHED

Array = npt.NDArray[np.float64]

OLD_FIELDS = (
    *("left_child", "right_child", "feature", "threshold"),
    *("impurity", "n_node_samples", "weighted_n_node_samples"),
)


def train_forest(
    n_features: int = 7, *, trees: int = 5, rows: int = 60, seed: int = 0, **options: Any
) -> tuple[RandomForestRegressor, Array]:
    """Return a forest of latencies and its training rows."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 225, (rows, n_features)) * rng.choice([1.0, 0.37, 1e-3], n_features)
    latency = x.sum(axis=1) / 100 + rng.random(rows) + 0.1
    return RandomForestRegressor(trees, random_state=seed, **options).fit(x, latency), x


class OldPickler(pickle._Pickler):
    """Writes names, attributes and the seven fields of a node as scikit-learn 0.23.1 and numpy 1.19 did."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tree):
            make, args, state = value.__reduce__()
            nodes = state["nodes"]
            old = np.zeros(len(nodes), [(name, nodes.dtype[name]) for name in OLD_FIELDS])
            for name in OLD_FIELDS:
                old[name] = nodes[name]
            assert old.dtype.itemsize == 56
            return make, args, {**state, "nodes": old}
        if isinstance(value, RandomForestRegressor | DecisionTreeRegressor):
            make, args, state = value.__reduce_ex__(3)[:3]
            state = {**state, "_sklearn_version": "0.23.1"}
            state["n_features_"] = state.pop("n_features_in_", None)
            state["base_estimator_"] = state.pop("estimator_", None)
            return make, args, state
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module, qualified = obj.__module__, name or obj.__qualname__
        self.write(f"c{module.replace('numpy._core', 'numpy.core')}\n{qualified}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]

    def save_type(self, obj: Any) -> None:
        self.save_global(obj)

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, type: save_type}


def dump_old(forest: RandomForestRegressor, protocol: int = 3) -> bytes:
    """Pickle a forest in the layout of scikit-learn 0.23.1."""
    content = io.BytesIO()
    OldPickler(content, protocol).dump(forest)
    return content.getvalue()


def predictor_files(device: str, **options: Any) -> dict[str, bytes]:
    """Return KERNEL.pkl for each kernel of a device, old layout, and the fusion rules."""
    files = {
        f"{kernel}.pkl": dump_old(train_forest(FEATURE_COUNTS[kernel], seed=i, **options)[0])
        for i, kernel in enumerate(PUBLISHED[device].kernels)
    }
    return {**files, "fusion_rules.json": b"[]"}


def write_zip(path: Path, files: dict[str, bytes], folder: str = "") -> Path:
    """Write a ZIP archive, with its files in a folder if one is given."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{folder}/{name}" if folder else name, content)
    return path
