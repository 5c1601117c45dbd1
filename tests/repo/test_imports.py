"""The cost of importing; the direction of imports is held by import-linter's contracts (`make lint`)."""

import subprocess
import sys
from pathlib import Path

import pytest

import qnas

PACKAGE = Path(qnas.__file__).parent

# What reads, counts, predicts, solves and explains, and the command line until it runs a command. The rooms
# among them are held by a contract too; this looks at what is really loaded.
LIGHT = ["common", "spaces", "latency", "solver", "commands"]
LIGHT_RUNS = ["names", "found_arch", "finished_run", "compare", "pareto", "explain", "text", "run_text"]


def _modules(room: str) -> list[str]:
    found = (path.relative_to(PACKAGE).with_suffix("").parts for path in (PACKAGE / room).rglob("*.py"))
    return [".".join(("qnas", *parts)) for parts in found if parts[-1] not in ("__init__", "__main__")]


@pytest.mark.parametrize("room", LIGHT)
def test_a_light_room_loads_no_torch(room: str) -> None:
    check_light(_modules(room))


def test_what_reads_a_run_back_loads_no_torch() -> None:
    check_light([f"qnas.runs.{name}" for name in LIGHT_RUNS])


def check_light(modules: list[str]) -> None:
    code = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module('{name}'); assert 'torch' not in sys.modules, '{name}'" for name in modules
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qnas; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "scipy", "pydantic", "yaml", "typer"} & set(done.stdout.split())


def test_few_entries_stand_in_the_package() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 14, sorted(entries)


def test_the_package_lists_what_it_offers() -> None:
    offered = [name for names in qnas._OFFERED.values() for name in names]
    assert sorted(qnas.__all__) == sorted(["__version__", *offered])
    for name in offered:
        assert getattr(qnas, name).__doc__, name
