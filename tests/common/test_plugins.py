import os
import sys
from pathlib import Path

import pytest

from qnas.common.errors import UsageError
from qnas.common.plugins import VARIABLE, load_plugins


def written(path: Path, text: str = "import sys\nsys.ran.append(__file__)\n") -> str:
    path.write_text(text)
    return str(path)


def test_plugins_of_the_environment_run_before_those_given_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(sys, "ran", ran, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = written(tmp_path / "first.py"), written(tmp_path / "second.py")
    written(tmp_path / "a_module_of_the_user.py")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([second, ""]))
    for _ in range(2):
        load_plugins([first, second, "a_module_of_the_user"])
    assert [Path(file).stem for file in ran] == ["second", "first", "a_module_of_the_user"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\nx.y\n", "AttributeError: 'int' object has no attribute 'y' (own.py, line 2)"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 (own.py, line 2)"),
    ],
)
def test_a_plugin_that_fails_is_one_line_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    path = written(tmp_path / "own.py", text)
    for _ in range(2):  # what failed is not taken as loaded
        with pytest.raises(UsageError) as error:
            load_plugins([path])
        assert str(error.value) == f"plugin {path}: {problem}"


def test_a_missing_plugin_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^plugin .*own\.py: no such file$"):
        load_plugins([str(tmp_path / "own.py")])
    with pytest.raises(UsageError, match=r"^plugin no_such: ModuleNotFoundError: No module named 'no_such'$"):
        load_plugins(["no_such"])
