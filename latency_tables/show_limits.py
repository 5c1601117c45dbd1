"""Show how accurate a sum over kernels can be on the published GPU measurements, and what stands in its way.

    python latency_tables/show_limits.py --data PATH/TO/latency_data

Four figures for each device: the spread of networks with equal operators, which no model can tell apart; the
share within 10% of a fit that has seen every network, which no fit of this form to fewer can be expected to
pass; the share of five fits that each leave out a fifth of the names; and the share that the measured times
of another device give, scaled by one factor. Then the families in which a fifth left out goes wrong, and the
ratio between two runs on one GPU of the networks that the newer run merged (timm's RepVGG and MobileOne).
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fitting.fit import design, fit_robust
from fitting.published import FOLDS, PUBLISHED, fold_of, predict_unseen

from qnas.latency.evaluation import Array, Networks, read_networks

_NEAR = 0.1
_MERGED = ("repvgg", "mobileone")
_OTHER = {"rtx5090": "rtx4090-compiled", "rtx4090-compiled": "rtx5090-compiled", "rtx3090": "rtx4090-nhwc"}
# one GPU, run by PyTorch 2.4 and by 2.9, both eager
_RUNS = ("rtx4090-nhwc", "rtx4090-nchw")


def twins(of_network: Sequence[npt.NDArray[np.int64]]) -> list[list[int]]:
    """Return the groups of two or more networks that run the same operators in the same order."""
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, operators in enumerate(of_network):
        groups[tuple(operators.tolist())].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def spread(ms: Array, groups: Sequence[Sequence[int]]) -> float:
    """Return the largest relative difference, slowest to fastest, within a group; NaN without any."""
    measured = [ms[rows][np.isfinite(ms[rows])] for rows in (list(group) for group in groups)]
    return max((float(of.max() / of.min() - 1) for of in measured if len(of) > 1), default=np.nan)


def share_near(predicted: Array, measured: Array) -> float:
    """Return the share of the measured networks predicted to within 10%."""
    known = np.isfinite(predicted) & np.isfinite(measured)
    return float(np.mean(np.abs(predicted[known] / measured[known] - 1) <= _NEAR))


def scaled_to(other: Array, measured: Array) -> Array:
    """Return the times of another device, times the median ratio of the two."""
    return np.asarray(other * np.nanmedian(measured / other), dtype=np.float64)


def show_device(name: str, networks: Networks) -> None:
    """Print the figures of one device."""
    column, fusion, form = PUBLISHED[name]
    ms = networks.latency_ms[column]
    known = np.isfinite(ms)
    of = design(form, *networks.fused(fusion))
    assert networks.names is not None
    folds = fold_of(networks.names)
    seen = of.matrix @ fit_robust(of.matrix[known], ms[known], of.lowest)
    unseen = predict_unseen(of, ms, known, [known & (folds == fold) for fold in range(FOLDS)])
    text = f"equal operators differ by {spread(ms, twins(networks.of_network)):.1%}"
    text += f"; within 10%: {share_near(seen, ms):.1%} by a fit to all"
    text += f", {share_near(unseen, ms):.1%} of names left out"
    if name in _OTHER:
        scaled = scaled_to(networks.latency_ms[_OTHER[name]], ms)
        text += f", {share_near(scaled, ms):.1%} by the times on {_OTHER[name]}"
    print(f"{name}: {text}")
    far = known & ~(np.abs(unseen / ms - 1) <= _NEAR)
    worst = Counter(networks.families[far].tolist()).most_common(10)
    print(f"  {int(far.sum())} of {int(known.sum())} further off:", ", ".join(f"{f} {n}" for f, n in worst))


def show_merged(networks: Networks) -> None:
    """Print how much faster the newer run of one GPU is for networks that it merged, and for all others."""
    old, new = (networks.latency_ms[run] for run in _RUNS)
    merged = np.isin(networks.families, _MERGED)
    for title, rows in ((" and ".join(_MERGED), merged), ("all others", ~merged)):
        ratio = (new / old)[rows & np.isfinite(new / old)]
        low, mid, high = np.quantile(ratio, (0.05, 0.5, 0.95))
        print(f"{_RUNS[1]} / {_RUNS[0]}, {title}: {mid:.2f} ({low:.2f} to {high:.2f}, n {len(ratio)})")


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the measurements")
    networks = read_networks(parser.parse_args().data / "gpu_desktop_models.npz")
    for name in PUBLISHED:
        show_device(name, networks)
    show_merged(networks)


if __name__ == "__main__":
    main()
