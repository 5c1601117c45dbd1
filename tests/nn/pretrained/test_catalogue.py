import pytest

from qnas.common.errors import UsageError
from qnas.nn.pretrained.catalogue import load_pretrained, network_space, space_around
from qnas.nn.pretrained.derivation import check_fits
from qnas.nn.pretrained.efficientnet_lite import LITES
from qnas.spaces.space import load_space


@pytest.mark.parametrize("name", LITES)
def test_a_network_fits_the_space_around_it(name: str) -> None:
    space = space_around(name)
    check_fits(space, network_space(name))
    assert not space.is_fixed
    assert space.name == name


def test_a_shipped_space_is_taken_as_it_is_shipped() -> None:
    assert space_around("efficientnet-lite0") == load_space("efficientnet-lite0")


@pytest.mark.parametrize("name", ["efficientnet-lite9", "timm:", "resnet50"])
def test_an_unknown_network_is_refused(name: str) -> None:
    for function in (network_space, space_around, load_pretrained):
        with pytest.raises(UsageError, match=r"`pretrained='.*'`: .*efficientnet-lite0.*, or timm:NAME"):
            function(name)
