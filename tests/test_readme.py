"""The README says what is there, and nothing that is not."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import commands

from qnas.latency.device import device_names, load_device
from qnas.resources import stems

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_module_has_its_phrase_in_the_tree() -> None:
    for path in sorted((ROOT / "qnas").rglob("*.py")):
        if path.name != "__init__.py":
            assert re.search(rf"^\s+{path.name}\s+\S+", README, re.MULTILINE), path.name


def test_every_shipped_space_is_named() -> None:
    for name in stems("search_spaces", ".yaml"):
        assert name in README or re.sub("-[a-z]+$", "-*", name) in README, name


def test_the_devices_accuracy_is_the_device_files() -> None:
    for name in device_names():
        device = load_device(name)
        assert name in README
        for held_out, figures in device.accuracy.items():
            if "all" in figures and held_out == "unseen networks":
                assert f"{figures['all'].within_10_pct:.1f}%" in README, name


def test_every_command_of_the_readme_exists_with_its_options() -> None:
    known_commands = commands()
    used = re.findall(r"^\$? ?qnas (.*)$", README, re.MULTILINE)
    assert len(used) >= 15
    for line in used:
        words = line.partition("#")[0].split()
        name = " ".join(words[:2]) if " ".join(words[:2]) in known_commands else words[0]
        known = {option for p in known_commands[name].params for option in p.opts}
        for option in (word for word in words if word.startswith("--")):
            assert option in known, f"{name} {option}"


def test_every_command_is_named_and_has_an_example() -> None:
    for name, command in commands().items():
        assert f"Example: qnas {name}" in (command.help or ""), name
        assert re.search(rf"\b{name}\b", README), name


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
    code = "from qnas.space import load_space; from qnas.latency.device import load_device; "
    code += "from qnas.recipe import load_recipe; load_recipe('imagenet'); "
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
