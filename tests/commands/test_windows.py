"""Windows is told in one line what to do, before anything is imported that it lacks."""

import subprocess
import sys

import pytest

LINE = "qnas does not run on Windows: run it in WSL (learn.microsoft.com/windows/wsl/install)"
# what Windows lacks cannot be imported there
WINDOWS = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = sys.modules['resource'] = None; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WINDOWS + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "from qnas.commands.cli import main; main()",
        "import runpy; runpy.run_module('qnas.commands', run_name='__main__')",
    ],
)
def test_the_command_line_ends_with_one_line(code: str) -> None:
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"qnas: error: {LINE}\n")


def test_python_gets_one_error_that_can_be_caught() -> None:
    done = run(
        "import qnas\n"
        "for name in ('run_search', 'load_device', 'open_dataset'):\n"
        "    try:\n"
        "        getattr(qnas, name)\n"
        "    except qnas.QnasError as error:\n"
        "        print(error)\n"
    )
    assert done.stderr == ""
    assert done.stdout == 3 * f"{LINE}\n"


def test_elsewhere_nothing_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", "import qnas.commands"], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""
