"""Python files of the user, run so that they register blocks and neurons."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from qnas.common.errors import QnasError, UsageError, first_line

VARIABLE = "QNAS_PLUGINS"  # environment variable with files and modules, separated like paths


def load_plugins(names: Iterable[str]) -> None:
    """Run the plugins of the environment, then these: paths of .py files, or names of modules.

    Each runs once per process. Raises UsageError where one is missing or fails.
    """
    from_environment = os.environ.get(VARIABLE, "").split(os.pathsep)
    for name in dict.fromkeys(filter(None, [*from_environment, *names])):
        is_file = name.endswith(".py")
        if is_file and not Path(name).is_file():
            raise UsageError(f"plugin {name}: no such file")
        try:
            if is_file:
                _run_file(Path(name).resolve())
            else:
                importlib.import_module(name)
        except (KeyboardInterrupt, QnasError):
            raise
        except BaseException as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            place = f" ({Path(line.filename).name}, line {line.lineno})" if "<" not in line.filename else ""
            problem = first_line(Exception(str(error)))
            raise UsageError(f"plugin {name}: {type(error).__name__}: {problem}{place}") from error


def _run_file(path: Path) -> None:
    name = f"plugin:{path}"  # in sys.modules, where inspect looks for sources; no module has such a name
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
