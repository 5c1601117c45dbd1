import errno
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from qnas.common.errors import CheckpointError
from qnas.runs.checkpoint import BEFORE, NEWEST, Checkpoints


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3, 4), float(step)), "name": None, "numbers": (1, 2.5)}


def saved(folder: Path, *steps: int) -> Checkpoints:
    for step in steps:
        Checkpoints(folder).save(state(step))
    return Checkpoints(folder)


def step_of(checkpoints: Checkpoints) -> int:
    found = checkpoints.load()
    assert found is not None
    assert torch.equal(found["weights"], state(found["step"])["weights"])
    return int(found["step"])


def test_the_last_state_comes_back_with_its_layout(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load() is None
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    Checkpoints(tmp_path).save({"weight": weight, "numbers": (1, 2.5)})
    found = Checkpoints(tmp_path).load()
    assert found is not None
    assert torch.equal(found["weight"], weight)
    assert found["weight"].stride() == weight.stride()
    assert found["numbers"] == (1, 2.5)
    assert step_of(saved(tmp_path, 1, 2, 3)) == 3


@pytest.mark.parametrize("seed", range(20))
def test_any_damage_is_detected_and_the_one_before_serves(seed: int, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    rng = random.Random(seed)
    content = bytearray((tmp_path / NEWEST).read_bytes())
    place = rng.randrange(100 if seed % 2 else len(content))  # every other one in the head
    assert place != content.index(b"\n") - 1, "the number of the format: see below"
    if seed % 3 == 0:
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    (tmp_path / NEWEST).write_bytes(content)
    assert step_of(checkpoints) == 1
    assert str(tmp_path / NEWEST) in checkpoints.damage


def test_a_damaged_one_never_takes_the_place_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / NEWEST).write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    assert step_of(checkpoints) == 1
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.name == NEWEST:
            raise OSError(errno.EIO, "no more")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.save(state(3))
    assert step_of(Checkpoints(tmp_path)) == 1
    checkpoints.save(state(3))
    checkpoints.save(state(4))
    assert step_of(Checkpoints(tmp_path)) == 4
    (tmp_path / NEWEST).write_bytes(b"")
    assert step_of(Checkpoints(tmp_path)) == 3


def test_where_all_are_damaged_it_is_said(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / NEWEST).write_bytes(b"no")
    with pytest.raises(
        CheckpointError, match=f"{NEWEST} is damaged .*, and there is no earlier one: `force=True`"
    ):
        checkpoints.load()
    (tmp_path / BEFORE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{NEWEST} is damaged .*, and .*{BEFORE} is damaged"):
        Checkpoints(tmp_path).load()
    (tmp_path / NEWEST).unlink()
    with pytest.raises(CheckpointError, match=f"{BEFORE} is damaged"):
        Checkpoints(tmp_path).load()
    Checkpoints(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    torch.save({"step": 3}, tmp_path / NEWEST)  # as the first version wrote it
    with pytest.raises(CheckpointError, match="format 1, written by another version of qnas"):
        checkpoints.load()
    (tmp_path / NEWEST).write_bytes(b"qnas.checkpoint/17\nabc")
    with pytest.raises(CheckpointError, match="format 17, written"):
        checkpoints.load()


def test_nothing_but_values_is_unpickled(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save({"path": Path("x")})
    with pytest.raises(CheckpointError, match=r"holds no state \(more than values and tensors\)"):
        Checkpoints(tmp_path).load()
