"""Compare the device a100-throughput with every published throughput of a whole network on an A100.

    python benchmarks/a100_published.py

One number of the device, the rate of matrix products, is fitted to the ConvNeXts; no other network took part.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "latency_tables"))
from fitting.a100 import FITTED, PUBLISHED, predict

from qnas.latency.device import load_device

WITHIN = 0.2


def main() -> None:
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


if __name__ == "__main__":
    main()
