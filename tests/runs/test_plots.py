import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qnas.runs.plots import draw_budget


def row(step: int, **changes: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0,
        "of_limit_cortex-a76": 1 + 1 / step,
        "of_limit_params": 0.8,
        "multiplier": 3 / step,
        "temperature": 0.99**step,
        **changes,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> np.ndarray[Any, Any]:
    draw_budget(rows, path, multiplier_bound=3.0)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_only_architecture_steps_are_drawn(tmp_path: Path) -> None:
    rows = [row(2), row(4)]
    others = [{"step": 1, "loss": 2.0}, rows[0], {"step": 3, "loss": 1.0, "warnings": ["x"]}, rows[1]]
    assert (draw(rows, tmp_path / "a.png") == draw(others, tmp_path / "b.png")).all()


@pytest.mark.parametrize("key", ["of_limit_cortex-a76", "of_limit_params", "multiplier", "temperature"])
def test_every_quantity_is_seen(key: str, tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 40)]
    other = [{**each, key: each[key] * (1.5 if each["step"] == 20 else 1)} for each in rows]
    first = draw(rows, tmp_path / "a.png")
    assert (first == draw(rows, tmp_path / "b.png")).all()
    assert (first != draw(other, tmp_path / "c.png")).any()


def test_a_search_without_architecture_steps_has_no_picture(tmp_path: Path) -> None:
    draw_budget([], tmp_path / "a.png", multiplier_bound=3.0)
    assert not (tmp_path / "a.png").exists()


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, qnas.runs.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
