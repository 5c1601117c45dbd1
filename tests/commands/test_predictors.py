import json
from pathlib import Path

import pytest
from helpers.pickled_forests import predictor_files, write_zip
from typer.testing import CliRunner, Result

from qnas.commands.predictors import app
from qnas.common.errors import TableError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_predictors_are_imported_listed_and_removed(tmp_path: Path, home: Path) -> None:
    listed = run("list")
    assert "myriad-vpu: none; download myriadvpu_openvino2019r2.zip" in listed.stdout
    source = write_zip(tmp_path / "a.zip", {**predictor_files("myriad-vpu"), "mul.pkl": b"x"}, "top")
    done = run("import", source, "--device", "vpu")
    assert done.exit_code == 0, done.output
    assert "myriad-vpu: myriadvpu_openvino2019r2, 12 kernels, 60 trees" in done.stdout
    assert "not read: fusion_rules.json, mul.pkl" in done.stdout
    assert "--device vpu --latency nn-meter" in done.stdout
    assert "import: 100%" in done.stderr
    assert "myriad-vpu: myriadvpu_openvino2019r2, 12 kernels" in run("list").stdout
    assert "removed" in run("remove", "--device", "vpu").stdout
    assert not list((home / "predictors").iterdir())


def test_what_a_script_reads_is_json(tmp_path: Path) -> None:
    assert json.loads(run("list", "--json").stdout) == []
    source = write_zip(tmp_path / "a.zip", predictor_files("cortex-a76"))
    done = run("import", source, "--device", "cpu", "--json", "--quiet")
    assert not done.stderr
    facts = json.loads(done.stdout)
    assert facts["device"] == "cortex-a76"
    assert facts["forests"]["fc"]["trees"] == 5
    assert json.loads(run("list", "--json").stdout) == [facts]


def test_a_failed_import_is_an_error_that_the_user_can_mend(tmp_path: Path, home: Path) -> None:
    done = run("import", tmp_path / "none.zip", "--device", "cpu")
    assert done.exit_code == 1
    assert isinstance(done.exception, TableError)
    assert not home.exists()
