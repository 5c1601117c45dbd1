"""All problems of a file come in one line of bounded length."""

from typing import Any

import pytest
from pydantic import ValidationError

from qnas.common.documents import FilePart, describe_problems
from qnas.common.reading import LINE_CHARACTERS


class Part(FilePart):
    number: int = 0
    words: tuple[str, ...] = ()


def problems_of(content: Any) -> str:
    with pytest.raises(ValidationError) as error:
        Part.model_validate(content)
    return describe_problems(error.value, Part)


def test_each_problem_has_its_key_and_the_value_found() -> None:
    assert problems_of({"number": "x", "worlds": 1}) == (
        "number: expected a whole number, got 'x'; "
        "worlds: unknown key (did you mean words? known: number, words)"
    )


@pytest.mark.parametrize(
    "content",
    [
        {f"key{i}": i for i in range(1000)},
        {"k" * 5000: 1},
        {"\x1b[2J\n": 1},
        {"words": tuple(range(5000))},
        {"number": "x" * 10**6},
        {"number": b"x" * 10**6},
        {"number": "\u2028\x00\ud800"},
        {"words": 10**5000},
        {3: 4},
    ],
)
def test_any_problems_are_one_printable_line(content: Any) -> None:
    text = problems_of(content)
    assert 0 < len(text) <= LINE_CHARACTERS
    assert text.isprintable()


def test_problems_without_room_are_counted() -> None:
    assert problems_of({f"key{i}": i for i in range(1000)}).endswith(" more")
