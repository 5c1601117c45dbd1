"""A finished search with a trained network, for the page and for its browser test."""

from pathlib import Path

import pytest
from helpers.command_line import succeed as qnas
from helpers.tiny import TINY_SPACE


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on two devices, its front, and its network trained: not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(TINY_SPACE)
    small = ("--resolution", "8", "-q")
    within = ("--device", "vpu", "--budget", "2.4ms", "--device", "cpu", "--budget", "1.2ms")
    epochs = ("--warmup-epochs", "1", "--epochs", "3", "--random-networks", "3")
    space = ("--space", folder / "tiny.yaml", "--max-params", "5200")
    qnas("search", *space, *within, *epochs, *small, "--out", folder / "run")
    qnas("pareto", folder / "run", "--points", "4", "--k-best", "2", "-q")
    qnas("train-subnet", folder / "run", "--epochs", "2", *small)
    return folder / "run"
