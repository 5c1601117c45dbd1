import math
from math import hypot as length
from typing import Any

import pytest
from helpers import own_blocks

from qnas.common.errors import ExportError
from qnas.deploy.export.copied_source import Copied
from qnas.nn.blocks import ChannelLayerNorm, count_parameters

SCALE = (2, 3.5)
THINGS = {1: 2}


def inner(x: float) -> float:
    return x * SCALE[0]


def outer(x: float) -> float:
    return inner(length(x, math.pi))


def of_own() -> Any:
    return ChannelLayerNorm(3)


def of_things() -> Any:
    return THINGS


def of_qnas(module: Any) -> int:
    return count_parameters(module)


def test_a_function_comes_with_all_that_it_uses_in_an_order_that_runs() -> None:
    copied = Copied(given=(), own=())
    copied.add(outer)
    copied.add(outer)
    assert sorted(copied.imports) == ["from math import hypot as length", "import math"]
    namespace: dict[str, Any] = {}
    exec("\n".join([*copied.imports, *copied.definitions.values()]), namespace)
    assert namespace["outer"](4.0) == outer(4.0)
    assert list(copied.definitions) == ["SCALE", "inner", "outer"]


def test_what_the_file_defines_itself_is_asked_for() -> None:
    copied = Copied(given=("Any",), own=(ChannelLayerNorm,))
    copied.add(of_own)
    assert copied.wanted == [ChannelLayerNorm]
    assert not copied.imports


@pytest.mark.parametrize(
    ("original", "given", "problem"),
    [
        (of_things, ("Any",), "of_things uses THINGS, a dict, which cannot be copied into a file"),
        (of_qnas, ("Any",), "of_qnas uses count_parameters of qnas.nn.blocks: the file must not need qnas"),
        (inner, ("inner",), "inner cannot be copied, as the file defines inner itself"),
        (eval("lambda x: x"), (), "the source of <lambda> cannot be read"),
    ],
)
def test_what_cannot_be_copied_is_refused(original: Any, given: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ExportError) as error:
        Copied(given, ()).add(original)
    assert str(error.value).startswith(f"format standalone: {problem}")


def test_a_decorator_that_registers_and_a_method_are_left_out() -> None:
    copied = Copied(("nn", "Tensor"), ())
    copied.add(own_blocks.Gate, without="layers")
    text = copied.definitions["Gate"]
    assert "layers" not in text
    assert "def forward" in text
    assert "# named as a mixer's convolution is" in text  # comments stay
