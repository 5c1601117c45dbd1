"""The wheel holds everything that an installation needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.places import ROOT


@pytest.mark.slow
def test_the_wheel_holds_spaces_and_tables(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("quadranet_nas-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for file in (
        "search_spaces/quadranet-mobile.yaml",
        "recipes/imagenet.yaml",
        "latency_tables/myriad-vpu.json",
        "report/page.html",
        "report/style.css",
    ):
        assert f"qnas/{file}" in names
    # as installed, away from the source tree
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "from qnas.spaces.space import load_space; from qnas.latency.device import load_device; "
    code += "from qnas.training.recipe import Recipe; Recipe.load('imagenet'); "
    code += "import qnas; print(qnas.__file__, load_space('quadranet-mobile').name, load_device('vpu').name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[1:] == ["quadranet-mobile", "myriad-vpu"]
    assert str(unpacked) in done.stdout
