import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qnas.common.errors import ArchError
from qnas.common.resources import stems
from qnas.runs.found_arch import find_arch
from qnas.spaces.arch import (
    Arch,
    arch_document,
    arch_from_indices,
    make_arch,
    only_arch,
    read_arch,
    sample_arch,
)
from qnas.spaces.space import load_space

SPACE = load_space("quadranet-small")
ARCH = sample_arch(SPACE, np.random.default_rng(0))


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**arch_document(SPACE, ARCH, {"seed": 3}), **changes}))
    return path


@pytest.mark.parametrize("name", stems("search_spaces", ".yaml"))
def test_an_architecture_reads_back_from_its_file(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    arch = sample_arch(space, np.random.default_rng(1))
    path = tmp_path / "arch.json"
    path.write_text(json.dumps(arch_document(space, arch, {})))
    assert read_arch(path, space) == arch
    assert arch_from_indices(space, arch.indices(space)) == arch


def test_a_document_holds_what_is_needed_to_read_it_without_qnas() -> None:
    document = arch_document(SPACE, ARCH, {"device": "vpu"})
    assert document == {
        "schema": "qnas.arch/1",
        "space": "quadranet-small",
        "space_digest": SPACE.digest,
        "classes": 10,
        "choices": list(ARCH.choices),
        "device": "vpu",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "qnas.arch/9"}, "schema: expected 'qnas.arch/1', got 'qnas.arch/9'"),
        ({"schema": None}, "schema: expected 'qnas.arch/1', got nothing"),
        (
            {"space": "quadranet-gpu", "space_digest": "0123"},
            f"belongs to space 'quadranet-gpu', digest 0123, "
            f"expected 'quadranet-small', digest {SPACE.digest}",
        ),
        ({"classes": 1000}, "classes: 1000, the head of its space has 10"),
        ({"classes": 1}, "classes: expected at least 2, got 1"),
        (
            {"space_digest": "0123"},
            f"belongs to space 'quadranet-small', digest 0123 (another version of it), "
            f"expected 'quadranet-small', digest {SPACE.digest}",
        ),
        (
            {"choices": list(ARCH.choices)[:-1]},
            "9 choices, but space quadranet-small has 10 positions",
        ),
        ({"choices": "quadra"}, "choices: expected a list, got 'quadra'"),
        (
            {"choices": [3], "space": None},
            "space: expected text, got nothing; choices[0]: expected text, got 3",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "arch.json", **changes)
    with pytest.raises(ArchError) as error:
        read_arch(path, SPACE)
    assert str(error.value) == f"{path}: {message}"


def test_all_unknown_candidates_are_named_with_the_nearest_known(tmp_path: Path) -> None:
    choices = ["quadra_k3_e9", *ARCH.choices[1:-1], "identty"]
    with pytest.raises(ArchError) as error:
        read_arch(write(tmp_path / "arch.json", choices=choices), SPACE)
    message = str(error.value)
    assert "position 1.1: 'quadra_k3_e9' is not a candidate (did you mean quadra_k3_e" in message
    assert "position 3.3: 'identty' is not a candidate (did you mean identity?" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "qnas.arch/1"}'])
def test_a_damaged_file_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    path.write_text(text)
    with pytest.raises(ArchError) as error:
        read_arch(path, SPACE)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchError, match="expected a file, found a folder"):
        read_arch(tmp_path, SPACE)
    with pytest.raises(ArchError, match=r"arch\.json: no such file"):
        read_arch(tmp_path / "arch.json", SPACE)
    with pytest.raises(ArchError, match=r"no arch\.json in this folder"):
        find_arch(tmp_path)


def test_an_architecture_is_found_with_the_space_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "arch.json")
    for path in (tmp_path, tmp_path / "arch.json"):
        found = find_arch(path)
        assert (found.arch, found.space, found.folder) == (ARCH, SPACE, tmp_path)
        assert found.document["seed"] == 3
    (tmp_path / "space.yaml").write_text(load_space("quadranet-gpu").to_yaml())
    with pytest.raises(ArchError, match="belongs to space 'quadranet-small'"):
        find_arch(tmp_path)
    assert find_arch(tmp_path, "quadranet-small").arch == ARCH


def test_samples_draw_all_candidates_of_a_position_equally_often() -> None:
    rng = np.random.default_rng(0)
    n = 2000
    for position, drawn in zip(
        SPACE.positions, zip(*(sample_arch(SPACE, rng).choices for _ in range(n)), strict=True), strict=True
    ):
        expected = n / len(position.names)
        counts = Counter(drawn)
        chi_square = sum((counts[name] - expected) ** 2 / expected for name in position.names)
        assert chi_square < 22.5  # 6 degrees of freedom: 1 in 1000


def test_the_same_seed_draws_the_same_architecture() -> None:
    assert sample_arch(SPACE, np.random.default_rng(0)) == ARCH
    assert sample_arch(SPACE, np.random.default_rng(1)) != ARCH


def test_choices_are_checked_against_the_space() -> None:
    assert make_arch(SPACE, ARCH.choices) == ARCH
    with pytest.raises(ArchError, match=r"^architecture: 0 choices"):
        make_arch(SPACE, ())


def test_a_fixed_space_has_one_architecture() -> None:
    space = load_space("quadranet36-t")
    assert only_arch(space) == Arch(("quadra_k7_e4",) * 36)
