"""One thread a test process, and a space small enough to search in seconds.

`make test` runs a process a core, and threads that wait for each other on a busy machine make small
tensors ten times slower.
"""

import os

# before torch is imported; subprocesses inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # see above

import pytest

from qnas.space import SearchSpace, parse_space

TINY_SPACE = """\
schema: qnas.space/1
name: tiny
source: made for tests
input: {channels: 3, resolution_px: 32}
norm: layernorm
activation: gelu
stem: {channels: 8, kernel: 2, stride: 2}
transition: conv
candidates:
  - {block: quadra, kernel: [3, 5], expansion: [2, 4]}
  - {block: identity}
stages:
  - {channels: 8, positions: 2, stride: 1}
  - channels: 16
    positions: 2
    stride: 2
    candidates: [{block: quadra, kernel: 3, expansion: 2}, {block: identity}]
head: {classes: 10}
"""


@pytest.fixture
def tiny_space() -> SearchSpace:
    return parse_space(TINY_SPACE, "tiny.yaml")


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_SPACE, encoding="utf-8")
    return path
