"""README and documentation agree with the code: commands, options, files and links exist."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.command_line import commands, qnas
from helpers.fashion import write_fashion
from helpers.measured_networks import fill_in, write_networks
from helpers.pages import BLOCK, PAGES, blocks
from helpers.pickled_forests import predictor_files, write_zip
from helpers.pictures import samples, write_tar
from helpers.places import ROOT
from helpers.played_programs import write_programs
from helpers.tiny import TINY_SPACE
from typer.main import get_command

import qnas as qnas_package
from qnas.commands import cli
from qnas.common.resources import stems
from qnas.latency.device import device_names, load_device
from qnas.runs.text import choice_line, field
from qnas.search.config import SearchConfig
from qnas.spaces.space import load_space
from qnas.training.recipe import Recipe

HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
COMMAND_LINE = f"docs/{HOOKS['COMMAND_LINE']}"
KNOWN = commands()
# what the site's build writes
GENERATED = {f"docs/{path}": text for path, text in HOOKS["generated_pages"]().items()}


class Typed(NamedTuple):
    """A command that a page shows, in a block or within a sentence."""

    page: str
    line: str
    is_inline: bool


def _typed(page: str, text: str) -> Iterator[Typed]:
    for kind, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "sh" or (kind == "console" and line.startswith("$ ")):
                words = re.split(r"\s#", line.removeprefix("$ "))[0].strip()
                if words:
                    yield Typed(page, " ".join(words.split()), False)
    prose = " ".join(BLOCK.sub("", text).split())
    for line in re.findall(r"`((?:qnas|python|torchrun) [^`]+)`", prose):
        yield Typed(page, line, True)


TYPED = [typed for page, text in (PAGES | GENERATED).items() for typed in _typed(page, text)]


def _of_qnas(typed: Typed) -> list[str]:
    """Return the words behind `qnas`; none where another program is called."""
    words = shlex.split(typed.line)
    if words[0] == "torchrun":
        return words[words.index("qnas.commands") + 1 :]
    return words[1:] if words[0] == "qnas" else []


# all but `qnas COMMAND --help`, which stands for any
OF_QNAS = [typed for typed in TYPED if _of_qnas(typed) and "COMMAND" not in typed.line]


def _parsed(typed: Typed) -> tuple[str, dict[str, Any]]:
    """Parse a command as the program does; return its name and what it is given."""
    words = _of_qnas(typed)
    if words[0].startswith("--"):
        return "", dict(get_command(cli.app).make_context("qnas", words, resilient_parsing=True).params)
    name = " ".join(words[:2]) if " ".join(words[:2]) in KNOWN else words[0]
    given = [word for word in words[len(name.split()) :] if word != "--help"]
    if not given and typed.is_inline:  # a name in a sentence
        assert name in KNOWN or any(each.startswith(f"{name} ") for each in KNOWN), typed
        return name, {}
    return name, dict(KNOWN[name].make_context(name, given).params)


def test_every_command_parses_with_its_options_and_values() -> None:
    assert len(OF_QNAS) >= 100
    for typed in OF_QNAS:
        try:
            _parsed(typed)
        except Exception as error:
            raise AssertionError(f"{typed.page}: {typed.line}") from error


def test_spaces_devices_and_recipes_of_commands_exist() -> None:
    loaders = {"space": load_space, "device": load_device, "recipe": Recipe.load}
    seen = set()
    for typed in OF_QNAS:
        given = _parsed(typed)[1]
        for option, load in loaders.items():
            value = given.get(option) or []
            for name in value.split(",") if isinstance(value, str) else value:
                if not (name in ("all", "NAME", "SPACE") or name.endswith((".yaml", ".json"))):
                    load(name)
                    seen.add((option, name))
    assert {option for option, _ in seen} == loaders.keys()


def test_scripts_that_are_called_exist() -> None:
    called = [word for typed in TYPED for word in typed.line.split() if re.search(r"/\w+\.(py|sh)$", word)]
    assert len(called) >= 5
    for script in called:
        assert (ROOT / script).is_file(), script


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_link_and_anchor_within_the_repository_resolves() -> None:
    pages = PAGES | GENERATED
    links = 0
    for page in PAGES:
        # what a page includes is linked from where it lies itself
        own = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", own)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            found = os.path.relpath((ROOT / page).parent / path, ROOT) if path else page
            assert found in pages or (ROOT / found).is_file(), f"{page}: {target}"
            assert not anchor or anchor in _anchors(pages[found]), f"{page}: {target}"
            links += 1
    assert links >= 100


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    for page in (*PAGES, *GENERATED):
        if page.startswith("docs/"):
            assert f": {page.removeprefix('docs/')}\n" in navigation, page


def test_the_map_has_every_room_and_the_modules_that_it_names_exist() -> None:
    rooms = [path.name for path in (ROOT / "qnas").iterdir() if (path / "__init__.py").is_file()]
    rows = re.findall(
        r"^\| `(\w+)` \| .+ \| (.+) \|$", PAGES["docs/contributing/architecture.md"], re.MULTILINE
    )
    assert sorted(room for room, _ in rows) == sorted(rooms)
    for room, modules in rows:
        for module in re.findall(r"`(\S+)`", modules):
            assert (ROOT / "qnas" / room / module).is_file(), f"{room}/{module}"
    for room in rooms:
        assert f"\n| `{room}` |" in PAGES["CONTRIBUTING.md"], room


def test_the_python_reference_has_every_name_that_the_package_offers() -> None:
    shown = re.findall(r"^::: qnas\.(\w+)$", PAGES["docs/reference/python.md"], re.MULTILINE)
    assert sorted(shown) == sorted({*qnas_package.__all__} - {"__version__"})


def test_every_shipped_space_device_and_recipe_is_described() -> None:
    for folder, suffix, page in (
        ("search_spaces", ".yaml", "docs/guides/spaces.md"),
        ("recipes", ".yaml", "docs/guides/training.md"),
    ):
        for name in stems(folder, suffix):
            assert f"`{name}`" in PAGES[page], name
    for name in device_names():
        assert re.search(rf"^{name}( \(.*\))?: ", PAGES["docs/guides/devices.md"], re.MULTILINE), name


def test_the_examples_of_yaml_files_are_shipped_ones() -> None:
    for page, file in (
        ("docs/guides/spaces.md", "search_spaces/quadranet-small.yaml"),
        ("docs/guides/searching.md", "recipes/search/digits.yaml"),
    ):
        assert blocks(page, "yaml") == [(ROOT / file).read_text(encoding="utf-8")], page


def test_every_setting_is_in_the_file_formats() -> None:
    text = PAGES["docs/reference/files.md"]
    for title, settings in (("Search presets", SearchConfig), ("Recipes", Recipe)):
        section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for name in settings.model_fields:
            assert name == "file_schema" or f"`{name}`" in section, name


@pytest.mark.parametrize(("page", "count"), [("devices", 2), ("rivals", 1)])
def test_what_the_guides_show_is_what_the_commands_print(
    page: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown_blocks = blocks(f"docs/guides/{page}.md", "console")
    assert len(shown_blocks) == count
    for block in shown_blocks:
        command, _, shown = block.partition("\n")
        assert qnas(*shlex.split(command)[2:]) == 0
        assert capsys.readouterr().out.strip() == shown.strip(), command


def test_the_quick_start_says_how_a_network_was_chosen_as_the_command_does() -> None:
    first = {"heldout_accuracy": 0.927, "heldout_balanced_accuracy": 0.927, "rank": 30}
    ranking = [first | {"level": number < 15} for number in range(31)]
    assert field("chosen", choice_line(ranking, solved=31)) in PAGES["docs/quick-start.md"]


def test_a_notebook_becomes_a_page_with_its_outputs() -> None:
    outputs = [
        {"output_type": "stream", "text": ["29.98\n"]},
        {"output_type": "display_data", "data": {"image/png": "iVBO\n", "text/plain": ["<Figure>"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Search\n", "Text."]},
        {"cell_type": "code", "source": ["print(latency_ms)"], "outputs": outputs},
    ]
    page = HOOKS["notebook_page"]({"cells": cells})
    assert page == (
        "# Search\nText.\n\n```python\nprint(latency_ms)\n```\n\n```text\n29.98\n```\n\n"
        "![](data:image/png;base64,iVBO)\n"
    )


def test_the_readme_is_short_and_names_every_command() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200
    for name, command in KNOWN.items():
        assert f"Example: qnas {name}" in (command.help or ""), name
        assert f"`{name.split()[0]}`" in PAGES["README.md"], name
        assert f"## qnas {name}\n" in GENERATED[COMMAND_LINE], name


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
    for name in KNOWN:
        assert re.search(rf"^  {name.split()[0]}  +\S", shown, re.MULTILINE), name


# ---- the commands run, at a small scale

# what is run elsewhere or not at all, by how it begins, each with where or why
ELSEWHERE = {
    "make ": "sets up an environment first",
    "pip ": "installs",
    **dict.fromkeys(("stick/bin/pip", "python3.9 -m venv", "python -m zipfile", "chmod"), "installs"),
    "export QNAS_MYRIAD_COMPILE": "needs what was installed",
    "adb ": "needs a phone",
    "python classify.py": "on another machine; test_examples.py",
    "trtexec ": "needs TensorRT",
    **dict.fromkeys(("cp examples/browser", "npm ", "python -m http.server"), "test_browser_example.py"),
    "examples/own_photos.sh": "test_examples.py",
    **dict.fromkeys(("DEVICE=", "PRETRAINED="), "test_examples.py"),
    "python examples/": "test_examples.py",
    "python benchmarks/": "measures for minutes: by hand, where a kernel changed",
    "qnas --": "writes to the shell's start-up files; test_completion.py",
    "qnas COMMAND": "any command",
    "qnas search --resume --out RUN": "needs a stopped run; test_interruption.py",
    "qnas profile --runtime torch --target cuda": "needs a GPU",
}
# whose commands are run: all but those that stand for long experiments or for work on the code
RUN_PAGES = [page for page in PAGES if re.fullmatch(r"README\.md|docs/(guides/)?(?!results)[\w-]+\.md", page)]
CONSOLE = ("qnas search --device vpu --budget 30ms", "qnas train-subnet", "qnas export")

# what makes commands of the pages quick, and what it leaves open: pattern, replacement
QUICK = (
    "--warmup-epochs 1 --epochs 1 --batch-size 16 --effect-networks 0 --k-best 2 --random-networks 1 "
    "--finalists 0"
)
SMALL = (
    (r"\bqnas(\.commands)? search", rf"\g<0> --resolution 32 {QUICK}"),
    (r"^((?!.*--data).*\bqnas(\.commands)? search)", r"\1 --data imagefolder:digits"),
    ("^qnas train-subnet", "qnas train-subnet --resolution 32 --epochs 1 --batch-size 16 --force"),
    ("--epochs 60", ""),
    ("--resolution 128", "--resolution 32"),
    ("--resolutions 128,160,192,224", r"\g<0> --resolution 64"),  # the smallest has 37 px
    ("^qnas export", "qnas export --images 20 --force"),
    ("int8 --resolution 224", "int8 --resolution 32"),
    ("--resolution 224 --force", r"\g<0> --allow-drop"),
    ("^qnas pareto", "qnas pareto --points 2 --k-best 1"),
    ("^qnas profile", "qnas profile --repeats 1"),
    ("^qnas measure (board|check|phone|gpu|desk|quick|RUN)", r"qnas measure --repeats 2 \1"),
    ("--n (100|60)", "--n 24"),
    # a space of few blocks, of which each is exported and timed
    ("(profile|sample)(.*) --space quadranet-small", r"\1\2 --space tiny.yaml"),
    # what a machine takes is not what the author's took
    (
        r"(local-onnxruntime|board-sure|quick)(\.json) --budget \S+ --space \S+",
        r"\1\2 --budget 10s --space tiny.yaml",
    ),
    # forests of noise stand in for the published ones
    ("--budget 30ms --latency nn-meter", "--budget 100s --latency nn-meter"),
    ("fashion-mnist:DIR", "fashion-mnist:fashion"),
    ("(cifar10|imagefolder):DIR", r"\1:digits"),
    ("shards:DIR", "shards:shards"),
    ("runs/x/", "runs/union-mobile-vpu-30ms/"),
    ("FILE.npz", "networks.npz"),
    ("NAME", "quadranet-small"),
    ("RUN", "runs/union-mobile-vpu-30ms"),
)


def _to_run(page: str) -> list[str]:
    """Return the commands of a page that the tests run, in order, each once."""
    lines = [t.line for t in TYPED if t.page == page and not (t.is_inline and len(t.line.split()) < 3)]
    return [line for line in dict.fromkeys(lines) if not line.startswith(tuple(ELSEWHERE))]


def test_every_command_of_the_pages_is_run_here_or_is_said_where() -> None:
    for page in RUN_PAGES:
        for line in _to_run(page):
            assert line.startswith(("qnas ", "torchrun ")), f"{page}: {line}"
    for start in ELSEWHERE:
        assert any(t.line.startswith(start) for t in TYPED if t.page in RUN_PAGES), start


def test_every_substitution_is_of_something_that_the_pages_have() -> None:
    lines = [line for page in RUN_PAGES for line in _to_run(page)]
    for pattern, _ in SMALL:
        assert any(re.search(pattern, line) for line in lines), pattern


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quick start was run, with data, archives and measurements beside it."""
    place = tmp_path_factory.mktemp("docs")
    runpy.run_path(str(ROOT / "examples" / "digits_folder.py"))["main"](place / "digits", 10)
    for part in ("train", "test"):
        members = samples(place / "digits" / part, map(str, range(10)))
        write_tar(place / "shards" / f"digits-{part}-000000.tar", members)
    write_programs(place / "programs")
    (place / "tiny.yaml").write_text(TINY_SPACE)
    write_fashion(place / "fashion")
    write_zip(place / "myriadvpu_openvino2019r2.zip", predictor_files("myriad-vpu"))
    write_networks(place / "networks.npz", "vpu", (1.0, 1.08, 1.2), "aab")
    (described,) = blocks("docs/guides/own-device.md", "json")
    (place / "bench.json").write_text(json.dumps(json.loads(described)))
    shutil.copy(ROOT / "search_spaces" / "quadranet-small.yaml", place / "mine.yaml")
    _run(place, CONSOLE)
    first = place / "runs" / "union-mobile-vpu-30ms"
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
            patch.setenv("PATH", f"{place / 'programs'}{os.pathsep}{os.environ['PATH']}")
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
@pytest.mark.parametrize("page", [page for page in RUN_PAGES if _to_run(page)])
def test_the_commands_of_a_page_run_one_after_another(page: str, worked: Path, tmp_path: Path) -> None:
    _run(shutil.copytree(worked, tmp_path / "place"), _to_run(page))
