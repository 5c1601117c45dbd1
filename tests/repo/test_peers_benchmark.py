"""benchmarks/peers.py: what it counts, how it runs programs, and that all programs have one space."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.places import ROOT
from onnx import TensorProto, helper

from qnas.data.image_data import ImageData

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package

import experiments as ex  # type: ignore[import-not-found]  # noqa: E402


def load_script() -> Any:
    """Import the script by its path: the folder beside it has its name."""
    spec = importlib.util.spec_from_file_location("peers_script", BENCHMARKS / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


peers = load_script()


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data: ImageData = ex.load_images("digits", 500, resolution_px=8)
    return data


# ---- the task


def test_limits_reach_from_the_smallest_to_the_largest_network(digits: ImageData) -> None:
    space = peers.task_space(digits)
    every = [p.names for p in space.positions]
    smallest = tuple("identity" if "identity" in names else "mbconv_k3_e2" for names in every)
    assert peers.limit_at(space, 0) == peers.macs_of(space, peers.make_arch(space, smallest))
    assert peers.limit_at(space, 1) == peers.macs_of(space, peers.make_arch(space, ("mbconv_k7_e4",) * 8))


def test_a_random_network_is_within_the_limit_and_near_it(digits: ImageData) -> None:
    space = peers.task_space(digits)
    for share in peers.SHARES:
        limit = peers.limit_at(space, share)
        macs = {peers.macs_of(space, peers.random_network(space, limit, seed)) for seed in range(5)}
        assert max(macs) <= limit
        assert min(macs) >= 0.9 * limit
        assert len(macs) > 1


@pytest.mark.parametrize("program", ["with_nni.py", "with_modelopt.py"])
def test_programs_have_the_stages_of_the_space(program: str, digits: ImageData) -> None:
    tree = ast.parse((peers.CODE / program).read_text(encoding="utf-8"))
    (stages,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STAGES"
    )
    positions = peers.task_space(digits).positions
    own = [(c, 1 if i else stride) for c, count, stride in stages for i in range(count)]
    assert own == [(p.c_out, p.stride) for p in positions]


def test_the_program_of_qnas_has_the_space(digits: ImageData) -> None:
    def arguments(path: Path) -> list[str]:
        calls = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call))
        (call,) = (c for c in calls if ast.unparse(c.func).endswith("make_space"))
        fixed = ("norm", "activation", "transition", "candidates", "stages")
        return [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in fixed]

    assert arguments(peers.CODE / "with_qnas.py") == arguments(BENCHMARKS / "peers.py")


# ---- environments


def write_distribution(folder: Path, name: str, requires: list[str]) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {each}" for each in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{info.name}/METADATA,,\n")


def test_links_are_what_is_required_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "installed"
    write_distribution(installed, "zz_a", ["zz_b[fast]", 'zz_unwanted; extra == "slow"', "zz_missing"])
    write_distribution(installed, "zz_b", ['zz_c; extra == "fast"', 'zz_unwanted; extra == "slow"'])
    write_distribution(installed, "zz_c", ["zz_a"])
    write_distribution(installed, "zz_unwanted", [])
    monkeypatch.syspath_prepend(str(installed))
    peers.link_shared(["zz_a"], tmp_path / "links")
    links = {path.name for path in (tmp_path / "links").iterdir()}
    assert {name for name in links if "dist-info" not in name} == {"zz_a", "zz_b", "zz_c"}
    assert "zz_c-1.0.dist-info" in links  # so that pip sees it as installed


# ---- programs


def run_text(
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at_s: float | None = None,
    most_s: float = 60,
) -> Any:
    (folder / "program.py").write_text(text)
    monkeypatch.setattr(peers, "CODE", folder)
    task = folder / "task.json"
    task.write_text("{}")
    return peers.run_program(Path(sys.executable), "program.py", task, most_s=most_s, kill_at_s=kill_at_s)


def test_a_program_answers_in_json_among_other_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import time\nprint('[1]')\nprint('{\"found\": 3}')\nprint('by the way')\n"
    text += "x = bytearray(80_000_000)\ntime.sleep(0.5)  # so that its memory is seen"
    ended = run_text(text, tmp_path, monkeypatch)
    assert ended.value("found") == 3
    assert ended.value("written") is None
    assert ended.error == ""
    assert 80 < ended.peak_mb < 400


def test_an_error_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = run_text("print('{\"found\": 3}')\nraise ValueError('no GPU')", tmp_path, monkeypatch)
    assert ended.error == "ValueError: no GPU"
    assert ended.value("found") == 3


def test_a_program_is_killed_at_its_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # sleeping takes no processor time: a clock on the wall would kill it before the first line
    text = (
        "import time\ntime.sleep(0.6)\nprint('{\"slept\": true}', flush=True)\n"
        "while time.process_time() < 20: pass\nprint('{\"found\": 1}')"
    )
    ended = run_text(text, tmp_path, monkeypatch, kill_at_s=0.3)
    assert ended.value("slept") is True
    assert ended.value("found") is None
    assert ended.error == "exit -9"


def test_a_program_that_takes_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = run_text("import time\ntime.sleep(60)", tmp_path, monkeypatch, most_s=0.3)
    assert ended.error == "killed after 0 minutes"


def test_user_code_is_counted_between_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import a\n# user code\nimport b\n\n    # why\nx = 1  # what\n# end of user code\nrun(x)\n"
    (tmp_path / "program.py").write_text(text)
    monkeypatch.setattr(peers, "CODE", tmp_path)
    assert peers.user_lines("program.py") == 2


def test_every_program_marks_its_user_code() -> None:
    for peer in peers.PEERS.values():
        if peer.program:
            assert peers.user_lines(peer.program) > 10


def test_a_file_with_other_outputs_is_not_the_network(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negated",
        [value("x", TensorProto.FLOAT, ["n", 2])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "network.onnx")
    images = np.array([[1, 2], [3, -4]], dtype=np.float32)
    for outputs, error in ((-images, ""), (-images - [[0, 0], [0, 0.4]], "outputs differ by 11.1%")):
        largest = float(np.abs(outputs).max())
        np.savez(tmp_path / "network.npz", images=images, outputs=outputs.astype(np.float32))
        found = peers.onnx_error(tmp_path / "network.onnx")
        if error:
            assert found == f"outputs differ by {0.4 / largest:.1%}"
        else:
            assert found == ""
    (tmp_path / "network.onnx").write_bytes(b"no graph")
    assert peers.onnx_error(tmp_path / "network.onnx") != ""


# ---- the table


def a_row(name: str, lines: int, macs: int, accuracy: float, seconds: float = 10, error: str = "") -> Any:
    rows = [
        {
            "limit": 100,
            "macs": macs,
            "own_macs": macs,
            "seconds": seconds,
            "peak_mb": 500.0,
            "accuracy": accuracy,
            "onnx_by": "a",
            "onnx_error": "",
        }
    ]
    return peers.Row(name, lines, {0.5: rows}, None, error)


def test_the_sentence_says_where_qnas_loses() -> None:
    ahead = peers.meaning([a_row("qnas", 30, 99, 0.95), a_row("nni", 70, 110, 0.94)])
    assert "qnas broke the limit in 0 of 1 searches, NNI, one-shot Proxyless in 1 of 1" in ahead
    won, _, lost = ahead.partition("it loses in")
    assert "mean accuracy (95.0% against 94.0%" in won
    assert "lines of user code (30 against 70" in won
    assert "seconds (10 against 10" in lost
    behind = peers.meaning([a_row("qnas", 80, 99, 0.93, seconds=5), a_row("nni", 70, 90, 0.94)])
    won, _, lost = behind.partition("it loses in")
    assert "mean accuracy (93.0% against 94.0%" in lost
    assert "lines of user code (80 against 70" in lost
    assert "seconds (5 against 10" in won


def test_a_tool_that_does_not_install_has_a_row_with_its_error() -> None:
    row = peers.Row("plinio", 0, {0.25: [], 0.5: [], 0.75: []}, None, "No matching distribution")
    cells = peers.cells(row, peers.SHARES)
    assert cells[0] == "PLiNIO"
    assert cells[-1] == "`No matching distribution`"
    assert len(cells) == len(peers.cells(a_row("nni", 70, 90, 0.9), (0.5,))) + 2


def test_a_killed_search_goes_on_only_if_it_takes_less_than_a_whole_one() -> None:
    assert peers.resume_cell({"seconds": 60, "whole_s": 100, "same": True}) == "yes, the same network"
    assert peers.resume_cell({"seconds": 99, "whole_s": 100, "same": False}) == (
        "from the start, another network"
    )
    assert peers.resume_cell({"whole_s": 100, "error": "KeyError: 'x'"}) == "no: `KeyError: 'x'`"


def test_a_task_is_read_as_it_was_written(tmp_path: Path, digits: ImageData) -> None:
    sys.path.insert(0, str(peers.CODE))
    import harness  # type: ignore[import-not-found]

    peers.write_images(digits, tmp_path / "images.npz")
    setting = peers.Setting(
        digits,
        "digits",
        peers.task_space(digits),
        peers.Length(),
        tmp_path / "images.npz",
        tmp_path,
        False,
        1,
    )
    path = setting.task(tmp_path / "run", 12345, 7, resume=True)
    assert json.loads(path.read_text())["max_macs"] == 12345
    task = harness.read_task(path)
    assert (task.max_macs, task.seed, task.resume, task.epochs) == (12345, 7, True, 20)
    images, labels = task.normalised("heldout").tensors
    assert len(labels) == len(digits.heldout)
    raw = digits.heldout.read(torch.arange(len(labels))).float() / 255
    mean, std = digits.mean[0], digits.std[0]
    assert ((raw - mean) / std - images).abs().max() < 1e-5
