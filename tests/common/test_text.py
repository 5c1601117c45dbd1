import pytest

from qnas.common.text import in_markdown, shown

ODD = "a\x1b[31m\r\n\t\x00\x7f\x85\u2028\u2029\u202e\u200b\ufeff\U000e0001z"


@pytest.mark.parametrize("name", [ODD, "k\udce4se", "\ud800", "x" * 500, ""])
def test_what_is_shown_is_one_printable_line_of_bounded_length(name: str) -> None:
    text = shown(name)
    assert text.isprintable()
    assert len(text) <= 80
    text.encode()


def test_different_characters_are_shown_differently() -> None:
    assert shown(ODD, 200) == (r"a\x1b[31m\r\n\t\x00\x7f\x85\u2028\u2029\u202e\u200b\ufeff\U000e0001z")
    assert shown("k\udce4se") == r"k\xe4se", "the byte of the name"


@pytest.mark.parametrize("name", ["Größe", "猫", "a b", "ångström", "🐈"])
def test_names_that_can_be_read_stay(name: str) -> None:
    assert shown(name) == name
    assert in_markdown(name) == name


def test_markdown_shows_what_it_would_format() -> None:
    assert in_markdown("*a*|`b`<i>[c](d)&amp;_e_~#\\\n") == (r"\*a\*\|\`b\`\<i\>\[c\](d)\&amp;\_e\_\~\#\\\\n")
