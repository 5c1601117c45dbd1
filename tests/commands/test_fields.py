import re
import subprocess
import sys

import pytest
from helpers.command_line import commands, qnas

from qnas.search.config import SearchConfig
from qnas.training.recipe import Recipe, TrainConfig

OWN = {"file_schema", "preset", "recipe"}


@pytest.mark.parametrize(
    ("command", "models"), [("search", [SearchConfig]), ("train-subnet", [Recipe, TrainConfig])]
)
def test_every_field_is_an_option_with_its_description(
    command: str, models: list[type], capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas(command, "--help") == 0
    text = re.sub(r"-\s+", "-", " ".join(capsys.readouterr().out.split()))
    options = {parameter.name: parameter for parameter in commands()[command].params}
    for model in models:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]  # pydantic's
            if name not in OWN:
                assert options[name].default is None
                assert re.sub(r"-\s+", "-", field.description) in text, name


def test_help_is_in_panels(capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas("search", "--help") == 0
    panels = re.findall(r"^([A-Z].*):$", capsys.readouterr().out, re.MULTILINE)
    assert len(panels) == len(set(panels)) == 8


def test_help_imports_neither_torch_nor_what_it_has_no_use_for() -> None:
    for words, heavy in ((["--help"], "{'torch', 'pydantic'}"), (["search", "--help"], "{'torch', 'scipy'}")):
        code = "import sys; from qnas.commands import cli\n"
        code += f"sys.argv = ['qnas', *{words}]\ntry: cli.main()\nexcept SystemExit: pass\n"
        code += f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
