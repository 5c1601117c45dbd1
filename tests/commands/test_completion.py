"""The completions of Tab, by the completers themselves and in every shell of this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers.command_line import commands

from qnas.commands import completion, subnet
from qnas.latency.device import load_device
from qnas.spaces.space import load_space
from qnas.training.recipe import Recipe

# what a shell is told to do when its completion script is read and Tab is pressed after `$1`
PRESS_TAB = {
    "bash": 'eval "$SCRIPT"; read -ra COMP_WORDS <<< "$1"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); '
    '_qnas_completion qnas; printf "%s\\n" "${COMPREPLY[@]}"',
    # zsh's own completion needs a terminal: what it would be told is printed
    "zsh": "autoload -Uz compinit && compinit -u -D; eval $SCRIPT; _arguments() { print -r -- $@ }; "
    "words=(${=1}); CURRENT=$#words; _qnas_completion",
    "fish": "eval $SCRIPT; complete -C $argv[1]",
}


def words(found: completion.Words) -> list[str]:
    return [word for word, _ in found]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/one", "runs/two", "elsewhere/three"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "arch.json").touch()
    (tmp_path / "runs" / "unfinished").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_offered_can_be_loaded() -> None:
    assert {"vpu", "myriad-vpu", "cpu", "gpu"} <= set(words(completion.devices("")))
    for name, title in completion.devices(""):
        assert load_device(name).title == title
    for name in words(completion.spaces("")):
        assert load_space(name).name == name
    for name in words(completion.recipes("")):
        Recipe.load(name)


def test_only_what_begins_as_typed_is_offered() -> None:
    assert words(completion.devices("vp")) == ["vpu"]
    assert words(completion.devices("/home/me/bo")) == []
    assert words(completion.one_of("fp32", "fp16", "int8")("fp")) == ["fp32", "fp16"]


def test_of_several_devices_the_last_is_completed_and_none_twice() -> None:
    assert words(completion.device_lists("vpu,cp")) == ["vpu,cpu"]
    assert "vpu,cpu,vpu" not in words(completion.device_lists("vpu,cpu,"))
    assert "vpu,cpu,gpu" in words(completion.device_lists("vpu,cpu,"))


def test_finished_runs_are_offered_wherever_they_lie(here: Path) -> None:
    assert words(completion.runs("")) == words(completion.runs("ru")) == ["runs/one", "runs/two"]
    assert words(completion.runs("runs/t")) == ["runs/two"]
    assert words(completion.runs("elsewhere/")) == ["elsewhere/three"]
    assert words(completion.runs(f"{here}/runs/o")) == [f"{here}/runs/one"]
    assert words(completion.runs("nowhere/")) == []
    assert "runs/one" in words(completion.networks("r"))


def test_every_device_space_recipe_and_run_is_completed(here: Path) -> None:
    """Whatever the command: an option that takes one of them offers them."""
    expected = {"device": "vpu", "space": "quadranet-small", "recipe": "cifar", "source": "runs/one"}
    expected |= {"sources": "runs/one", "target": "runs/one"}
    seen = set()
    for name, command in commands().items():
        for option in command.params:
            wanted = "cpu" if option.name == "target" and name == "profile" else expected.get(option.name)
            if wanted is None or (name == "predictors import" and option.name == "source"):
                continue
            offered = {item.value for item in option.shell_complete(typer.Context(command), "")}
            assert wanted in offered, f"{name} {option.name}"
            seen.add(option.name)
    assert seen == set(expected)


@pytest.mark.parametrize("shell", PRESS_TAB)
def test_a_shell_completes_by_its_script(shell: str, here: Path) -> None:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"no {shell} here")
    command = here / "bin" / "qnas"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qnas.commands "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(here)}

    def run(*arguments: str, **more: str) -> str:
        done = subprocess.run(
            arguments, env=environment | more, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    script = run("qnas", _QNAS_COMPLETE=f"source_{shell}")
    assert "qnas" in script
    for typed, offered in (
        ("qnas expl", "explain"),
        ("qnas search --device vp", "vpu"),
        ("qnas explain runs/t", "runs/two"),
        ("qnas explain --js", "--json"),
    ):
        plain = ("--no-config", "-c") if shell == "fish" else ("-c",)
        name = () if shell == "fish" else (shell,)
        shown = run(found, *plain, PRESS_TAB[shell], *name, typed, SCRIPT=script)
        assert offered in shown, typed


def test_every_export_format_is_offered() -> None:
    from qnas.deploy.export.formats import FORMATS

    assert set(FORMATS) <= set(subnet.FORMATS)


def test_public_models_are_offered_once_their_library_is_typed() -> None:
    assert "timm:" in words(completion.predictable("ti"))
    assert words(completion.predictable("timm:mobilenetv4_conv_small_0")) == [
        f"timm:mobilenetv4_conv_small_0{width}" for width in ("35", "50")
    ]
    assert words(completion.predictable("quadranet-sm")) == words(completion.networks("quadranet-sm")) != []
    assert not any(word.startswith("timm:resnet") for word in words(completion.predictable("")))
