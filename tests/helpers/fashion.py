"""Fashion-MNIST's four files, small."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np


def idx(values: np.ndarray[Any, Any]) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_fashion(root: Path, *, zipped: bool = True, train: int = 50, test: int = 20) -> Path:
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        files = {
            f"{prefix}-images-idx3-ubyte": rng.integers(1, 256, (count, 28, 28), dtype=np.uint8),
            f"{prefix}-labels-idx1-ubyte": (np.arange(count) % 10).astype(np.uint8),
        }
        for name, values in files.items():
            path = root / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    return root
