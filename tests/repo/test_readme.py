"""The README says what is there, and nothing that is not."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.command_line import commands
from helpers.fashion import write_fashion
from helpers.measured_networks import fill_in, write_networks
from helpers.pickled_forests import predictor_files, write_zip
from helpers.pictures import samples, write_tar
from helpers.places import ROOT
from helpers.tiny import TINY_SPACE

from qnas.commands import cli
from qnas.common.resources import stems
from qnas.latency.device import device_names, load_device

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


# what is run at a small scale by others, or not at all, each with where or why
ELSEWHERE = {
    "make demo": "sets up an environment first; its three commands are those of the worked example",
    "make test": "sets up an environment first; runs these tests",
    "make lint": "sets up an environment first",
    "make test-slow": "sets up an environment first; runs these tests",
    "make tables": "needs the published measurements, which are not part of this repository",
    "examples/own_photos.sh": "test_examples.py",
    "DEVICE=here BUDGET=2ms examples/own_photos.sh IMAGES": "test_examples.py",
    "qnas --install-completion": "writes to the shell's start-up files; test_commands_completion.py",
    "qnas search --resume --out RUN": "needs a stopped run; test_interruption.py",
    "python benchmarks/quadratic.py": "measures for minutes: by hand, where a kernel changed",
    "python benchmarks/closed_loop.py": "its commands are those of `A device of your own`",
    "pip install openvino": "installs",
    "pip install 'quadranet-nas[tensorboard]'": "installs",
    "qnas derive": "a name",
    "qnas predict": "a name",
}

# what makes commands of the README quick, and what it leaves open: pattern, replacement
QUICK = "--warmup-epochs 1 --epochs 1 --batch-size 16 --effect-networks 0 --k-best 2 --random-networks 1"
SMALL = (
    (r"\bqnas search", rf"\g<0> --resolution 32 {QUICK}"),
    (r"^((?!.*--data).*\bqnas search)", r"\1 --data imagefolder:digits"),
    ("^qnas train-subnet", "qnas train-subnet --resolution 32 --epochs 1 --batch-size 16 --force"),
    ("--epochs 60", ""),
    ("^qnas export", "qnas export --images 20 --force"),
    ("int8 --resolution 224", "int8 --resolution 32"),
    ("^qnas pareto", "qnas pareto --points 2 --k-best 1"),
    ("^qnas profile", "qnas profile --repeats 1"),
    ("^qnas measure (board|check)", r"qnas measure --repeats 2 \1"),
    ("--n 100", "--n 24"),
    # a space of few blocks, of which each is exported and timed
    ("(profile|sample)(.*) --space quadranet-small", r"\1\2 --space tiny.yaml"),
    # what a machine takes is not what the author's took
    (
        r"(local-onnxruntime|board-sure)(\.json) --budget \S+ --space \S+",
        r"\1\2 --budget 10s --space tiny.yaml",
    ),
    # forests of noise stand in for the published ones
    ("--budget 30ms --latency nn-meter", "--budget 100s --latency nn-meter"),
    ("fashion-mnist:DIR", "fashion-mnist:fashion"),
    ("(cifar10|imagefolder):DIR", r"\1:digits"),
    ("shards:DIR", "shards:shards"),
    ("runs/x/", "runs/quadranet-mobile-vpu-30ms/"),
    ("FILE.onnx", "runs/quadranet-mobile-vpu-30ms/export/model.onnx"),
    ("FILE.npz", "networks.npz"),
    ("NAME", "quadranet-small"),
    ("RUN", "runs/quadranet-mobile-vpu-30ms"),
)


def _typed() -> dict[str, list[str]]:
    """The README's commands by section: of its blocks, and those with arguments in the text."""
    found: dict[str, list[str]] = {}
    for section in re.split("^## ", README, flags=re.MULTILINE)[1:]:
        typed = []
        for kind, block in re.findall("^```(sh|console)\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            lines = [line.partition(" #")[0].strip() for line in block.splitlines()]
            typed += [line.removeprefix("$ ") for line in lines if kind == "sh" or line.startswith("$ ")]
        prose = re.sub("^```.*?^```", "", section, flags=re.MULTILINE | re.DOTALL)
        typed += re.findall(r"`((?:qnas|python|make|torchrun|pip) [^`]+)`", " ".join(prose.split()))
        found[section.partition("\n")[0]] = [line for line in dict.fromkeys(typed) if line]
    return found


TYPED = _typed()
WORKED = "A worked example"
CONSOLE = ("qnas search --device vpu --budget 30ms", "qnas train-subnet", "qnas export")


def test_every_command_of_the_readme_is_run_here_or_is_said_where() -> None:
    typed = {line for lines in TYPED.values() for line in lines}
    assert ELSEWHERE.keys() <= typed
    for line in typed - ELSEWHERE.keys():
        assert line.startswith(("qnas ", "torchrun ")), line


def test_every_substitution_is_of_something_that_the_readme_has() -> None:
    typed = [line for lines in TYPED.values() for line in lines]
    for pattern, _ in SMALL:
        assert any(re.search(pattern, line) for line in typed), pattern


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the worked example was run, with data, archives and measurements beside it."""
    place = tmp_path_factory.mktemp("readme")
    runpy.run_path(str(ROOT / "examples" / "digits_folder.py"))["main"](place / "digits", 10)
    for part in ("train", "test"):
        members = samples(place / "digits" / part, map(str, range(10)))
        write_tar(place / "shards" / f"digits-{part}-000000.tar", members)
    (place / "tiny.yaml").write_text(TINY_SPACE)
    write_fashion(place / "fashion")
    write_zip(place / "myriadvpu_openvino2019r2.zip", predictor_files("myriad-vpu"))
    write_networks(place / "networks.npz", "vpu", (1.0, 1.08, 1.2), "aab")
    (described,) = re.findall("^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (place / "bench.json").write_text(described)
    # the three of its console block
    _run(place, [line for line in TYPED[WORKED] if line in CONSOLE])
    first = place / "runs" / "quadranet-mobile-vpu-30ms"
    again = shutil.copytree(first, Path(f"{first}-2"))
    os.utime(again / "arch.json", (0, 0))  # the first stays the latest
    return place


def _run(place: Path, lines: Sequence[str]) -> None:
    """Run commands in a folder, at a small scale."""
    for typed in lines:
        line = typed
        for pattern, small in SMALL:
            line = re.sub(pattern, small, line)
        program, *words = shlex.split(line)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            patch.setenv("QNAS_HOME", str(place / "home"))
            if program == "torchrun":
                command = [sys.executable, "-m", "torch.distributed.run", *words]
                assert subprocess.run(command, check=False).returncode == 0, line
                continue
            patch.setattr(sys, "argv", [program, *words])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code, line
            if typed.startswith("qnas measure "):
                # two visits on a busy machine are no times to fit to: a device makes them up
                for folder in (Path(word) for word in words if Path(word, "latencies.csv").is_file()):
                    fill_in(folder, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name, lines in TYPED.items() if set(lines) - ELSEWHERE.keys()])
def test_the_commands_of_a_section_run_one_after_another(section: str, worked: Path, tmp_path: Path) -> None:
    place = shutil.copytree(worked, tmp_path / "place")
    _run(place, [line for line in TYPED[section] if line not in ELSEWHERE])


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


def test_the_list_of_commands_says_all_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["qnas", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert "..." not in shown.partition("Commands:")[2]
    assert max(map(len, shown.splitlines())) <= 80
    for name in commands():
        assert re.search(rf"^  {name.split()[0]}  +\S", shown, re.MULTILINE), name


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
    code += "from qnas.training.recipe import load_recipe; load_recipe('imagenet'); "
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
