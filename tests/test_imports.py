"""DESIGN's one direction: a module imports only from those above it, and the light ones stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import qnas

PACKAGE = Path(qnas.__file__).parent

# From the top down. `latency` is a folder and stands for all its modules.
ORDER = [
    "errors",
    "changes",
    "files",
    "resources",
    "host",
    "units",
    "intervals",
    "layer",
    "space",
    "recipe",
    "arch",
    "lower",
    "latency",
    "limits",
    "knapsack",
    "placement",
    "derive",
    "record",
    "pareto",
    "explain",
    "compare",
    "text",
    "findings",
    "kernels",
    "quadratic",
    "neurons",
    "distributed",
    "effects",
    "blocks",
    "acceleration",
    "subnet",
    "penalty",
    "choices",
    "supernet",
    "gradients",
    "encoded",
    "folders",
    "shards",
    "originals",
    "decoding",
    "intact",
    "augmentation",
    "data",
    "progress",
    "checkpoint",
    "run",
    "train",
    "watch",
    "plots",
    "predictions",
    "report",
    "events",
    "final",
    "train_subnet",
    "rerank",
    "teacher",
    "search",
    "outcome",
    "export",
    "assembly",
    "sampling",
    "runtimes",
    "rounds",
    "profiling",
    "measurement",
    "deploy",
    "commands",
    "cli",
    "__main__",
]

# What reads, counts, predicts and solves, and the command line until it runs a command.
TORCH_FREE = [
    "errors",
    "changes",
    "files",
    "resources",
    "host",
    "units",
    "intervals",
    "layer",
    "space",
    "recipe",
    "arch",
    "lower",
    "limits",
    "knapsack",
    "placement",
    "derive",
    "record",
    "pareto",
    "explain",
    "compare",
    "text",
    "findings",
    "commands",
    "cli",
]


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def _imported(path: Path) -> Iterator[str]:
    """Yield the modules of qnas that a file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "qnas":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            elif node.module is not None and node.module.startswith("qnas."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qnas."))


def test_every_module_has_a_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in _modules()} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_a_module_imports_only_from_those_above_it() -> None:
    wrong = [
        f"{name} imports {used}"
        for name, path in _modules().items()
        for used in _imported(path)
        if used != name.split(".")[0] and ORDER.index(used) >= ORDER.index(name.split(".")[0])
    ]
    assert not wrong


def test_the_light_modules_do_not_import_torch() -> None:
    latency = [name for name in _modules() if name.startswith("latency.")]
    code = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module('qnas.{name}'); assert 'torch' not in sys.modules, '{name}'"
        for name in [*TORCH_FREE, *latency]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qnas; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "scipy", "pydantic", "yaml", "typer"} & set(done.stdout.split())
