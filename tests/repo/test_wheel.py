"""The wheel contains all files that an installation needs."""

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
        "recipes/search/digits.yaml",
        "latency_tables/myriad-vpu.json",
        "public_networks/timm.npz",
        "public_networks/README.md",
        "runs/report/page.html",
        "runs/report/style.css",
        "nn/kernels/quadratic.cpp",
        "py.typed",
    ):
        assert f"qnas/{file}" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"qnas"}
    # as installed, away from the source tree
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "from qnas.search.config import SearchConfig; from qnas.training.recipe import Recipe; "
    code += "Recipe.load('imagenet'); SearchConfig.load('digits'); import qnas; "
    code += "print(qnas.__file__, qnas.predict('quadranet25-xxs', 'vpu').device)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[1:] == ["myriad-vpu"]
    assert str(unpacked) in done.stdout
