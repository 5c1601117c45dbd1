from helpers.pretrained import NAME, tiny_space

from qnas.nn.pretrained.derivation import derived_space, own_choices
from qnas.runs.pretrained_text import changes_of, pretrained_lines
from qnas.spaces.arch import Arch

NETWORK = tiny_space()
SPACE = derived_space(NETWORK, quadratic=True)
OWN = {"name": NAME, "sha256": "0", "choices": list(own_choices(SPACE, NETWORK))}
# the network itself: mbconv_k3_e1, mbconv_k5_e6 twice, mbconv_k3_e4
ARCH = Arch(("mbconv_k3_e1", "mbconv_k3_e6_factored", "identity", "mbconv_k7_e2"))


def test_each_change_is_named_with_its_position() -> None:
    assert changes_of(SPACE, ARCH, OWN) == {
        "pruned": {"3.1": "4 > 2"},
        "grown": {"3.1": "3 > 7"},
        "shrunk": {"2.1": "5 > 3"},
        "quadratic": {"2.1": "factored"},
        "dropped": {"2.2": "mbconv_k5_e6"},
    }


def test_the_network_itself_has_no_changes() -> None:
    same = Arch(tuple(OWN["choices"]))
    assert not any(changes_of(SPACE, same, OWN).values())
    (line,) = pretrained_lines(SPACE, same, {"pretrained": OWN})
    assert line.split() == f"pretrained {NAME}: 4 of 4 blocks as they were".split()


def test_changes_are_told_in_words() -> None:
    text = " ".join(" ".join(pretrained_lines(SPACE, ARCH, {"pretrained": OWN})).split())
    for words in (
        f"{NAME}: 1 of 4 blocks as they were",
        "pruned (expansion): 3.1 4 > 2",
        "grown (kernel): 3.1 3 > 7",
        "shrunk (kernel): 2.1 5 > 3",
        "made quadratic: 2.1",
        "dropped: 2.2",
    ):
        assert words in text


def test_a_search_from_scratch_has_no_such_lines() -> None:
    assert list(pretrained_lines(SPACE, ARCH, {})) == []
