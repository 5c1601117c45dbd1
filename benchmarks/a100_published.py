"""Compare the devices of the A100 with the published figures of whole networks.

    python benchmarks/a100_published.py

Batches of 128 on `a100-throughput`: one number of the device, the rate of matrix products, is fitted to the
ConvNeXts; no other network took part. One image at a time by eager frameworks on `a100-eager`: no network
took part. One image at a time on `a100`: the GPU column of QuadraNet's table III, which took no part either.
The paper gives no blocks, so random networks of a space with as many multiply-adds stand for each row.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "latency_tables"))
from fitting.a100 import FITTED, PUBLISHED, predict
from fitting.a100_latency import eager_ms
from fitting.a100_networks import EAGER

from qnas.latency.device import Device, load_device
from qnas.latency.kernels import Kernel, fuse_operators
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import layers_of, lower
from qnas.spaces.space import SearchSpace, load_space

WITHIN = 0.2
NEAR = 0.03  # of a published number of multiply-adds
NETWORKS = 20  # that stand for a row of table III
DRAWS = 2_000

# QuadraNet (arXiv 2311.17956), table III, but Proxyless-GPU, whose 1065M no shipped space reaches
TABLE_III = (
    ("Proxyless-CPU", "proxyless-mobile", 333, 1.8),
    ("Proxyless-VPU", "proxyless-mobile", 275, 1.7),
    ("QuadraNet-CPU", "quadranet-mobile", 279, 2.1),
    ("QuadraNet-VPU", "quadranet-mobile", 312, 1.9),
    ("QuadraNet-GPU", "quadranet-gpu", 948, 2.9),
)


def show_throughput() -> None:
    """Print a line for each network, then the share within a fifth and the rank correlation."""
    predicted = predict(load_device("a100-throughput").model, PUBLISHED)
    published = np.array([network.ms for network in PUBLISHED])
    error = predicted / published - 1
    print(f"{'network':16} {'published':>12} {'predicted':>12}")
    for network, ms, off in zip(PUBLISHED, predicted, error, strict=True):
        seen = "  fitted" if network.family == FITTED else ""
        rates = f"{network.images_per_s:8.1f} img/s {1e3 / ms:8.1f} img/s"
        print(f"{network.name:16} {rates}  {off:+6.1%}{seen}")
    unseen = np.array([network.family != FITTED for network in PUBLISHED])
    for what, rows in (("all", np.ones_like(unseen)), ("never fitted", unseen)):
        within = np.abs(error[rows]) <= WITHIN
        rank = spearmanr(predicted[rows], published[rows])[0]
        print(f"{what}: {within.sum()} of {len(within)} within {WITHIN:.0%}, rank correlation {rank:.3f}")


def show_eager() -> None:
    """Print the networks of eager frameworks at batch 1, norms launched, too."""
    predicted = eager_ms(load_device("a100-eager").model)
    print(f"{'one image, eager':26} {'published':>10} {'a100-eager':>10}")
    for network, ms in zip(EAGER, predicted, strict=True):
        print(
            f"{network.name:26} {network.latency_ms:7.2f} ms {ms:7.2f} ms  {ms / network.latency_ms - 1:+.0%}"
        )


def networks_of(space: SearchSpace, mmacs: float) -> Iterator[tuple[Kernel, ...]]:
    """Yield the operators of random networks of so many million multiply-adds, as they are trained."""
    rng = np.random.default_rng(0)
    found = 0
    counts = [len(position.candidates) for position in space.positions]
    last = [max(i for i, c in enumerate(p.candidates) if c.block != "identity") for p in space.positions]
    ends = (tuple(0 for _ in last), tuple(last))  # the smallest and the largest blocks
    for _ in range(DRAWS):
        end, often = ends[int(rng.integers(2))], rng.random()  # so that all sizes occur
        indices = tuple(
            extreme if rng.random() < often else int(rng.integers(count))
            for extreme, count in zip(end, counts, strict=True)
        )
        layers = tuple(layers_of(lower(space, arch_from_indices(space, indices))))
        if abs(sum(layer.macs for layer in layers) / (1e6 * mmacs) - 1) <= NEAR:
            yield tuple(Kernel(s.op, s.resolution_px, s.c_in, s.c_out, s.kernel, s.stride) for s in layers)
            found += 1
            if found == NETWORKS:
                return


def price(device: Device, operators: tuple[Kernel, ...]) -> tuple[float, float]:
    """Return the milliseconds of operators launched one by one, and those that are estimated."""
    kernels = [kernel for operator in operators for kernel in fuse_operators([operator], "eager")]
    estimated = [kernel for kernel in kernels if device.kernel_source(kernel) == "estimated"]
    return sum(map(device.kernel_ms, kernels)), sum(map(device.kernel_ms, estimated))


def show_table_iii() -> None:
    """Print the predictions for each row of the paper's table, and the interval of the one in the middle."""
    device, eager = load_device("a100"), load_device("a100-eager")
    assert device.uncertainty is not None
    print(
        f"{'one image, table III':21} {'published':>10} {'a100':>8}  (range)        {'interval':16} "
        "a100-eager"
    )
    for name, space, mmacs, published in TABLE_III:
        networks = list(networks_of(load_space(space), mmacs))
        prices = sorted(price(device, network) for network in networks)
        mid, estimated = prices[len(prices) // 2]
        interval = device.uncertainty.interval(mid, estimated)
        one_by_one = np.median([price(eager, network)[0] for network in networks])
        print(
            f"{name:13} {mmacs:4}M {published:10.1f} ms {mid:5.2f} ms  "
            f"({prices[0][0]:.2f} to {prices[-1][0]:.2f})  "
            f"{interval.describe():18} {one_by_one:7.2f} ms  {mid / published - 1:+.0%}"
        )


def main() -> None:
    """Print all comparisons."""
    show_throughput()
    print()
    show_eager()
    print()
    show_table_iii()


if __name__ == "__main__":
    main()
