"""Pretrained networks by name: the shipped ones, and those of timm. Nothing here imports torch by itself."""

from typing import TYPE_CHECKING

from qnas.common.errors import UsageError, nearest
from qnas.common.resources import stems
from qnas.nn.pretrained.derivation import derived_space
from qnas.nn.pretrained.efficientnet_lite import LITES, lite_space, load_lite
from qnas.spaces.space import SearchSpace, load_space

if TYPE_CHECKING:
    from qnas.nn.pretrained.network import PretrainedNetwork

TIMM = "timm:"


def check_name(name: str) -> None:
    """Raise UsageError for the name of an unknown pretrained network; timm knows its own."""
    if name not in LITES and not (name.startswith(TIMM) and name != TIMM):
        raise UsageError(f"`pretrained={name!r}`: {nearest(name, LITES)}, or {TIMM}NAME")


def network_space(name: str) -> SearchSpace:
    """Return a pretrained network as a fixed space.

    Raises UsageError where timm is missing, or its network does not fit.

    >>> network_space("efficientnet-lite0").is_fixed
    True
    """
    check_name(name)
    if name in LITES:
        return lite_space(name)
    from qnas.nn.pretrained.timm_networks import timm_space

    return timm_space(name.removeprefix(TIMM))


def space_around(name: str) -> SearchSpace:
    """Return the default space of a pretrained network: the shipped file of its name, or the derived one.

    >>> len(space_around("efficientnet-lite0").positions)
    16
    """
    check_name(name)
    if name in stems("search_spaces", ".yaml"):
        return load_space(name)
    return derived_space(network_space(name))


def load_pretrained(name: str) -> "PretrainedNetwork":
    """Return a pretrained network with its weights.

    Raises UsageError where its package is missing or the network does not fit, CheckpointError where its
    file is not the known one.
    """
    check_name(name)
    if name in LITES:
        return load_lite(name)
    from qnas.nn.pretrained.timm_networks import load_timm

    return load_timm(name.removeprefix(TIMM))
