"""One thread per test process, and a space small enough to search in seconds.

`make test` runs one process per core, and threads that wait for each other on a busy machine make small
tensors ten times slower.
"""

import os
import sys

# before torch is imported; subprocesses inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator  # see above
from pathlib import Path

import pytest
from helpers.tiny import TINY_SPACE

from qnas.spaces.blocks import BLOCKS
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import SearchSpace, parse_space


@pytest.fixture(scope="session", autouse=True)
def _traced_once() -> Iterator[None]:
    """Trace a network for ONNX once in each test process."""
    if "torch" not in sys.modules:  # no test here needs it, and to import it takes seconds
        yield
        return
    from helpers.traced import traced_once

    with traced_once():
        yield


@pytest.fixture
def _registries() -> Iterator[None]:
    """Remove the blocks and neurons that a test registered, at its end."""
    blocks, neurons = dict(BLOCKS), dict(NEURONS)
    yield
    BLOCKS.clear()
    BLOCKS.update(blocks)
    NEURONS.clear()
    NEURONS.update(neurons)


@pytest.fixture
def tiny_space() -> SearchSpace:
    return parse_space(TINY_SPACE, "tiny.yaml")


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_SPACE, encoding="utf-8")
    return path
