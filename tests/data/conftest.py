from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import PX, numbered, save


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the user's cache, empty for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QNAS_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered(tmp_path_factory.mktemp("plain"), {"ant": 20, "bee": 15, "cat": 5})


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 3)):
        for name in ("ant", "bee"):
            for i in range(count):
                save(root / part / name / f"{i}.png", rng.integers(0, 256, (PX, PX, 3)))
    return root
