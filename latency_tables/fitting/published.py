"""Devices fitted to networks of which only the whole was timed, and published with its name (timm's results).

Networks of one name at several resolutions are alike, so a network is left out of a fit with all of its name.
The families that are left out whole are those of the file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fitting.desktop import CHIPS, compiled, desktop_cpu, eager
from fitting.fit import HELD_OUT, SEED, Design, Fit, Form, fit_networks, fit_robust
from qnas.latency.device import Figures, KernelModel
from qnas.latency.evaluation import Array, Networks, figures
from qnas.latency.intervals import relative_errors
from qnas.latency.kernels import POINTWISE, chain_kind

Mask = npt.NDArray[np.bool_]

FOLDS = 5

# device -> its name in the file of the measurements, the fusion of its runtime, and its terms
PUBLISHED: dict[str, tuple[str, str, Form]] = {
    "rtx4090": ("rtx4090-nchw", "cuda", eager(CHIPS["rtx4090"].floors(2))),
    "rtx4090-compiled": ("rtx4090-compiled", "triton", compiled(CHIPS["rtx4090"].floors(2))),
    "rtx3090": ("rtx3090-nhwc", "cuda", eager(CHIPS["rtx3090"].floors(2))),
    "rtx5090": ("rtx5090-compiled", "triton", compiled(CHIPS["rtx5090"].floors(2))),
    "i7-12700h": ("i7-12700h-compiled", "inductor", desktop_cpu()),
}
# Families whose figures are given one by one.
NAMED = (
    "convnext",
    "convformer",
    "poolformer",
    "gmlp",
    "mobilenet",
    "efficientnet",
    "regnety",
    "resnet",
    "nfnet",
)

# A kind that no measured network has -> the kind that costs as much.
_ALIKE: dict[str, str] = {
    **dict.fromkeys(("clip", "square", "add_scalar", "mul_scalar"), "relu"),
    "sub": "add",
    **dict.fromkeys(("reshape", "slice"), "transpose"),
    "shuffle": "concat",
}


@dataclass(frozen=True)
class Published:
    """A device's fit to all networks measured on it, and how far off fits were that had left some out.

    The accuracy is of a random fifth by name, of five fifths left out in turn, of every family left out in
    turn, and of some of these by name. The errors are relative, of each family left out.
    """

    fit: Fit
    accuracy: dict[str, dict[str, Figures]]
    errors: dict[str, Array]


def fit_published(networks: Networks, column: str, of: Design) -> Published:
    """Fit a device to the networks that are measured on it."""
    latency_ms = networks.latency_ms[column]
    known = np.isfinite(latency_ms)
    assert networks.names is not None
    names, index = np.unique(networks.names, return_inverse=True)
    fifth = (np.random.default_rng(SEED).random(len(names)) < HELD_OUT)[index]
    families = networks.families.tolist()
    left_out = {family: known & (networks.families == family) for family in sorted(set(families))}
    predicted = predict_unseen(of, latency_ms, known, list(left_out.values()))

    def within_15(rows: Mask) -> Figures:
        error = np.abs(predicted[rows] / latency_ms[rows] - 1.0)
        share = round(100 * float(np.mean(error <= 0.15)), 1)
        return figures(predicted[rows], latency_ms[rows]).model_copy(update={"within_15_pct": share})

    unseen = predict_unseen(of, latency_ms, known, [known & fifth])
    random = known & fifth
    folds = fold_of(networks.names)
    in_turn = predict_unseen(of, latency_ms, known, [known & (folds == fold) for fold in range(FOLDS)])
    accuracy = {
        "unseen networks": {"all": figures(unseen[random], latency_ms[random])},
        "each fifth unseen": {"all": figures(in_turn[known], latency_ms[known])},
        "each family unseen": {"all": within_15(known)},
        "unseen family": {name: within_15(left_out[name]) for name in NAMED if left_out[name].any()},
    }
    errors = {
        # all kernels of these networks are fitted
        family: relative_errors(latency_ms[rows], predicted[rows], np.zeros(int(rows.sum())), weight=1.0)
        for family, rows in left_out.items()
        if rows.any()
    }
    return Published(fit_networks(of, latency_ms, known), accuracy, errors)


def fold_of(names: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
    """Return the fold of each network, 0 to FOLDS - 1; all of one name are in one."""
    different, index = np.unique(names, return_inverse=True)
    return np.asarray(np.random.default_rng(SEED).permutation(len(different)) % FOLDS)[index]


def predict_unseen(of: Design, latency_ms: Array, known: Mask, parts: list[Mask]) -> Array:
    """Predict each part by a fit to the other networks."""
    predicted = np.full(len(latency_ms), np.nan)
    for part in parts:
        if part.any():
            seen = known & ~part
            weights = fit_robust(of.matrix[seen], latency_ms[seen], of.lowest)
            predicted[part] = of.matrix[part] @ weights
    return predicted


def published_model(fit: Fit) -> dict[str, KernelModel]:
    """Return the models of all kinds of kernels, including operators that a fit did not see by themselves."""
    model = {kind: KernelModel(kind="fitted", terms=terms) for kind, terms in fit.terms.items()}
    fused = {name: chain_kind([name]) for name in POINTWISE}
    for kind, other in {**_ALIKE, **({} if "relu" in model else fused)}.items():
        if kind in model:
            continue
        note = f"not timed by itself: as {other}"
        model[kind] = KernelModel(kind="estimated", note=note, like=other)
    return dict(sorted(model.items()))
