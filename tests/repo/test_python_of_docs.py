"""The Python code in README, documentation and notebooks agrees with the package, and runs."""

import ast
import inspect
import re
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers.pages import PAGES, blocks
from helpers.places import ROOT

import qnas
from qnas.search.config import SearchConfig
from qnas.spaces.neurons import Neuron
from qnas.training.recipe import Recipe, TrainConfig

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# what takes longer than a moment, or needs a run
SLOW = re.compile(r"qnas\.(run_search|load_run|derive|pareto|train_subnet|export)\(")
# what a function takes by `**`
SETTINGS: dict[str, set[str]] = {
    "run_search": {*SearchConfig.model_fields},
    "register_neuron": {field.name for field in fields(Neuron)},
    "train_subnet": {*Recipe.model_fields, *TrainConfig.model_fields},
}


def _cells(path: Path) -> list[str]:
    return [c["source"] for c in nbformat.read(path, as_version=4)["cells"] if c["cell_type"] == "code"]


CODE = {page: blocks(page, "python") for page in WITH_PYTHON} | {p.name: _cells(p) for p in NOTEBOOKS}


@pytest.mark.parametrize("name", CODE)
def test_every_name_and_argument_is_one_that_the_package_offers(name: str) -> None:
    for block in CODE[name]:
        for node in ast.walk(ast.parse(block, name)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qnas":
                assert node.attr in qnas.__all__, f"{name}: qnas.{node.attr}"
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("qnas.")):
                continue
            function = ast.unparse(node.func).removeprefix("qnas.")
            known = {*inspect.signature(getattr(qnas, function)).parameters} | SETTINGS.get(function, set())
            for keyword in node.keywords:
                assert keyword.arg in known or keyword.arg is None, f"{name}: {function}({keyword.arg}=)"


def _quick(page: str) -> list[str]:
    """Return the blocks of a page before the first that searches, trains or reads a run."""
    found = blocks(page, "python")
    slow = (number for number, block in enumerate(found) if SLOW.search(block))
    return found[: next(slow, len(found))]


def _run(page: str, code: list[str]) -> None:
    """Run blocks of a page, one after another, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in code:
        exec(compile(block, page, "exec"), namespace)


@pytest.fixture
def _digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds some digits as class folders."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "digits_folder.py"))["main"](tmp_path / "digits", 10)


@pytest.mark.usefixtures("_registries", "_digits")
@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if _quick(page)])
def test_the_python_of_a_page_runs_up_to_its_first_search(page: str) -> None:
    _run(page, _quick(page))


def _quickly(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Return a function of the package that takes few steps, on few images."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if keywords.get("data") == "digits":
            keywords["data"] = "imagefolder:digits"
        return function(*arguments, **keywords | settings)

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("_registries", "_digits")
@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if _quick(page) != blocks(page, "python")])
def test_the_python_of_a_page_runs_with_its_searches(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"warmup_epochs": 1, "search_epochs": 1, "effect_networks": 0, "k_best": 2, "random_networks": 1}
    small = {"resolution_px": 32, "batch_size": 16}
    monkeypatch.setattr(qnas, "run_search", _quickly(qnas.run_search, **search, **small))
    monkeypatch.setattr(qnas, "train_subnet", _quickly(qnas.train_subnet, epochs=1, **small))
    monkeypatch.setattr(qnas, "pareto", _quickly(qnas.pareto, points=2, k_best=1))
    if "runs/union-mobile-vpu-30ms" in "".join(blocks(page, "python")):
        found = qnas.run_search(budgets={"vpu": "30ms"}, data="digits", out="runs/union-mobile-vpu-30ms")
        qnas.train_subnet(found)
    _run(page, blocks(page, "python"))


# ---- the notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_what_its_code_printed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    from nbclient import NotebookClient  # here: loads the kernel's machinery

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (next(tmp_path.glob("runs/*")) / "subnet" / "result.json").is_file()
