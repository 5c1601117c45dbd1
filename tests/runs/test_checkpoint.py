import errno
import hashlib
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mutants import (
    MUTANTS,
    attack,
    bounded,
    byte_mutants,
    check_refusal,
    mutated_bytes,
    read_or_refuse,
)
from helpers.places import SHARED
from hypothesis import given

from qnas.common.errors import CheckpointError
from qnas.runs.checkpoint import _HEAD, BEFORE, NEWEST, Checkpoints

FAULTS = SHARED / "faults"


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


def with_digest(payload: bytes) -> bytes:
    """Return a checkpoint with a valid digest and any content."""
    return _HEAD + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def saved_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(path: Path) -> dict[str, Any] | None:
    return Checkpoints(path.parent).load()


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"P", b"PK", b"PK\x03\x04", b"no zip archive", b"\x80\x02}q\x00.", pickle.dumps({"step": 1})),
        *(saved_bytes(content) for content in ([1, 2], 5, None, torch.zeros(3))),
        *(saved_bytes(state(1))[:size] for size in (40, 400, 1000)),
        saved_bytes(state(1)).replace(b"data.pkl", b"date.pkl"),
        saved_bytes({"path": Path("x")}),
    ],
)
def test_a_valid_digest_makes_no_state(payload: bytes, tmp_path: Path) -> None:
    (tmp_path / NEWEST).write_bytes(with_digest(payload))
    with pytest.raises(CheckpointError, match=r"holds no state \(.+\), and there is no earlier one") as error:
        load(tmp_path / NEWEST)
    check_refusal(error.value, tmp_path / NEWEST)
    (tmp_path / NEWEST).rename(tmp_path / BEFORE)
    saved(tmp_path, 2)
    assert step_of(Checkpoints(tmp_path)) == 2


def test_a_state_of_another_kind_leaves_the_one_before_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / NEWEST).write_bytes(with_digest(saved_bytes([1])))
    assert step_of(checkpoints) == 1
    assert "holds no state (a list)" in checkpoints.damage


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NEWEST)
    with pytest.raises(CheckpointError, match=f"{NEWEST} cannot be read"):
        load(tmp_path / NEWEST)


@pytest.mark.parametrize("path", sorted(FAULTS.glob("checkpoint__*")), ids=lambda path: path.name[12:30])
def test_known_faults_are_one_line(path: Path, tmp_path: Path) -> None:
    (tmp_path / NEWEST).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / NEWEST)
    check_refusal(error.value, tmp_path / NEWEST)


@bounded
@given(content=mutated_bytes(saved_bytes(state(1))))
def test_any_content_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    read_or_refuse(load, tmp_path / NEWEST, with_digest(content))
    read_or_refuse(load, tmp_path / NEWEST, content)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(tmp_path: Path) -> None:
    whole, path = saved_bytes(state(1)), tmp_path / NEWEST
    assert attack(load, path, map(with_digest, byte_mutants(whole, MUTANTS))) == []
    assert attack(load, path, byte_mutants(with_digest(whole), MUTANTS)) == []
    # the pickled part alone, which holds the types and the shapes
    at = whole.index(b"\x80\x02")
    end = whole.index(b"PK\x07\x08", at)
    pickled = byte_mutants(whole[at:end], MUTANTS, seed=2)
    inside = (whole[:at] + (part + whole[end:])[: end - at] + whole[end:] for part in pickled)
    assert attack(load, path, map(with_digest, inside)) == []
