"""Weights in safetensors files: no bit is another than was written, unless it is said."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, mutated_bytes, read_or_refuse
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from qnas.common.errors import CheckpointError, QnasWarning
from qnas.runs.tensor_files import read_tensor_file
from qnas.runs.tensors import load_supernet, load_tensors, save_supernet, save_tensors

TENSORS = {
    "head.classifier.weight": torch.arange(12.0).reshape(3, 4),
    "norm.batches": torch.tensor(7),
    "half": torch.ones(2, 3, dtype=torch.float16),
    "images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
}


def content(folder: Path) -> bytes:
    save_tensors(folder / "made", TENSORS)
    return (folder / "made").read_bytes()


def test_tensors_come_back_and_any_reader_of_safetensors_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sha256 = save_tensors(path, {**TENSORS, "turned": torch.arange(6).reshape(2, 3).T})
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for found in (load_tensors(path), load_tensors(path, sha256), load_file(path)):
        assert found.keys() == {*TENSORS, "turned"}
        for name, tensor in TENSORS.items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == tensor.dtype
    assert torch.equal(load_file(path)["turned"], torch.arange(6).reshape(2, 3).T)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    digests = set()
    for i in range(20):
        digests.add(save_supernet(tmp_path / str(i), TENSORS))
    assert len(digests) == 1


def test_every_bit_counts(tmp_path: Path) -> None:
    whole, path = content(tmp_path), tmp_path / "x"
    rng = random.Random(0)
    in_head = len(whole) - sum(t.numel() * t.element_size() for t in TENSORS.values())
    places = [*range(0, in_head), *rng.sample(range(in_head, len(whole)), 60)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"damaged"):
            load_tensors(path)
    for size in (0, 7, 8, in_head, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            load_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(path)


def test_another_file_than_the_one_beside_the_documents_is_refused(tmp_path: Path) -> None:
    sha256 = save_tensors(tmp_path / "x", TENSORS)
    save_tensors(tmp_path / "x", {**TENSORS, "norm.batches": torch.tensor(8)})
    with pytest.raises(CheckpointError, match=rf"SHA-256 .*, expected {sha256[:12]}\.\.\.: not the file"):
        load_tensors(tmp_path / "x", sha256)


def test_files_of_earlier_versions_are_read_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file(TENSORS, path)
    with pytest.warns(QnasWarning, match="written by an earlier version of qnas, without a digest"):
        assert load_tensors(path).keys() == TENSORS.keys()
    save_file(TENSORS, path, metadata={"schema": "qnas.supernet/2"})
    with pytest.warns(QnasWarning, match="without a digest"):
        assert load_supernet(path).keys() == TENSORS.keys()
    save_file(TENSORS, path, metadata={"schema": "qnas.supernet/1"})
    with (
        pytest.warns(QnasWarning),
        pytest.raises(CheckpointError, match=r"from another version of qnas \(qnas.supernet/1, expected"),
    ):
        load_supernet(path)


def test_a_supernet_is_not_just_any_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS)
    with pytest.raises(CheckpointError, match=r"\(qnas.tensors/1, expected qnas.supernet/2\)"):
        load_supernet(tmp_path / "x")
    save_supernet(tmp_path / "x", TENSORS)
    with safe_open(tmp_path / "x", "pt") as file:
        ((key, text),) = file.metadata().items()
    assert key == "qnas"
    assert text.startswith("qnas.supernet/2 sha256:")


@pytest.mark.parametrize("metadata", [{"qnas": "x"}, {"schema": "a", "b": "c"}, {"other": "x"}])
def test_other_metadata_are_not_taken_for_those_of_an_earlier_version(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(save(TENSORS, metadata=metadata))
    with pytest.raises(CheckpointError, match="its metadata are not those of qnas"):
        load_tensors(tmp_path / "x")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "none")
    with pytest.raises(CheckpointError, match="found a folder"):
        load_tensors(tmp_path)


def sealed(header: object, data: bytes = b"") -> bytes:
    """Return a file with a valid digest and any header."""
    blank = {"__metadata__": {"qnas": f"qnas.tensors/1 sha256:{64 * '0'}"}}
    text = json.dumps(blank, separators=(",", ":"))[:-1] + "," + json.dumps(header)[1:]
    file = len(text).to_bytes(8, "little") + text.encode() + data
    return file.replace(64 * b"0", hashlib.sha256(file).hexdigest().encode(), 1)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}},
        {"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": 5},
    ],
)
def test_a_valid_digest_makes_no_valid_tensors(header: object, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(sealed(header, b"\0\0\0\0"))
    read_tensor_file(tmp_path / "x")  # so it is not refused for its digest
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(tmp_path / "x")


@bounded
@given(mutant=mutated_bytes(save(TENSORS, metadata={"schema": "qnas.supernet/2"})))
def test_any_bytes_are_read_or_refused(tmp_path: Path, mutant: bytes) -> None:
    read_or_refuse(load_tensors, tmp_path / "x", mutant)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(tmp_path: Path) -> None:
    for whole in (content(tmp_path), save(TENSORS), save(TENSORS, metadata={"schema": "qnas.supernet/2"})):
        assert attack(load_tensors, tmp_path / "x", byte_mutants(whole, MUTANTS)) == []
    assert attack(load_supernet, tmp_path / "x", byte_mutants(whole, MUTANTS, seed=1)) == []
