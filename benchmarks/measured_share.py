"""How much of a latency rests on measured kernels, with norms of the space and with norms of the candidates.

    python benchmarks/measured_share.py [--device vpu] [--budgets 30]

A row is the network with the most multiply-adds within the budget, solved exactly: no search, and no
accuracy. With `chosen`, every QuadraBlock is a candidate with each norm and activation in `WORDS`.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from qnas.latency.device import Device, load_device
from qnas.latency.device_table import load_table
from qnas.latency.prediction import DEVICE, estimated_ms, predict_arch
from qnas.solver.limits import latency_limit
from qnas.solver.solve import largest
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import SearchSpace, check_space, load_space

WORDS = (("layernorm", "gelu"), ("batchnorm", "relu6"), ("scale", "relu6"))
# the space, the norm and activation around, whether the candidates choose theirs
ROWS = (
    ("quadranet-mobile", "layernorm", "gelu", False),
    ("quadranet-mobile", "layernorm", "gelu", True),
    ("quadranet-mobile-bn", "batchnorm", "gelu", False),
    ("quadranet-mobile-bn", "batchnorm", "gelu", True),
    ("quadranet-mobile-bn", "batchnorm", "relu6", True),
    ("union-mobile", "batchnorm", "relu6", False),
    ("union-mobile", "batchnorm", "relu6", True),
)


def space_of(name: str, norm: str, activation: str, chosen: bool) -> SearchSpace:
    """Return a shipped space with this norm and activation, whose candidates may have their own."""
    space = load_space(name)
    if not chosen and (space.norm, space.activation) == (norm, activation):
        return space
    content = space.written() | {"name": "chosen", "norm": norm, "activation": activation}
    for part in (content, *content["stages"]):
        if chosen and part.get("candidates"):
            own = (_with_words(each, norm, activation) for each in part["candidates"])
            part["candidates"] = list(chain(*own))
    return check_space(content, name)


def _with_words(candidate: Mapping[str, Any], norm: str, activation: str) -> Iterator[dict[str, Any]]:
    """Yield a candidate with each of the words; those of the space have no name."""
    if candidate["block"] != "quadra":
        yield dict(candidate)
        return
    for own_norm, own_activation in WORDS:
        own = {"norm": own_norm} if own_norm != norm else {}
        own |= {"act": own_activation} if own_activation != activation else {}
        yield {**candidate, **own}


def row_of(
    device: Device, budget_ms: float, name: str, norm: str, activation: str, chosen: bool
) -> list[str]:
    """Return the cells of a network: its space, latency, MACs, blocks, measured share, estimates."""
    space = space_of(name, norm, activation, chosen)
    solution = largest(space, (latency_limit(load_table(device, space), budget_ms),))
    arch = arch_from_indices(space, solution.indices)
    prediction, blocks = predict_arch(DEVICE, device, space, arch), lower(space, arch)
    kinds = Counter(block.kind for block in blocks if block.layers and block.block)
    estimates = [
        f"{kind} {ms / prediction.latency_ms:.1%}" for kind, ms in estimated_ms(prediction.parts).items()
    ]
    return [
        f"{name}, {norm}, {activation}{', chosen' if chosen else ''}",
        f"{prediction.latency_ms:.2f}",
        f"{count_macs(blocks) / 1e6:.0f}M",
        ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        f"{prediction.coverage:.1%}",
        ", ".join(estimates) or "none",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="vpu")
    parser.add_argument("--budgets", type=float, nargs="+", default=[30.0], help="milliseconds")
    arguments = parser.parse_args()
    print("| Space | ms | MACs | Blocks | From measurements | Estimates |")
    print("| :-- | --: | --: | :-- | --: | :-- |")
    for budget_ms in arguments.budgets:
        for row in ROWS:
            print("|", " | ".join(row_of(load_device(arguments.device), budget_ms, *row)), "|", flush=True)


if __name__ == "__main__":
    main()
