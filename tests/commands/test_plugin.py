"""Commands with a user's block, from a file given on the command line."""

from pathlib import Path

import pytest
from helpers import own_blocks
from helpers.command_line import qnas
from helpers.tiny import TINY_SPACE

pytestmark = pytest.mark.usefixtures("_registries")


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    text = Path(own_blocks.__file__).read_text()
    (tmp_path / "own.py").write_text(f"{text}\n\nregister_gate()\n")
    gates = "  - {block: gate, width: [1, 3]}\nstages:\n"
    (tmp_path / "space.yaml").write_text(TINY_SPACE.replace("stages:\n", gates))
    return "space.yaml"


def test_a_plugin_registers_a_block_for_the_command_behind_it(
    space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("--plugin", "own.py", "table", space, "--device", "cpu") == 0
    assert "gate_w3" in capsys.readouterr().out


def test_a_plugin_of_the_environment_does_the_same(
    space: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNAS_PLUGINS", "own.py")
    assert qnas("describe", space) == 0
    assert "gate w1, gate w3" in capsys.readouterr().out


def test_without_its_plugin_a_space_is_refused_with_what_to_do(
    space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("describe", space) == 1
    said = capsys.readouterr().err
    assert "or one that a --plugin registers first" in said
    assert said.count("\n") == 1
