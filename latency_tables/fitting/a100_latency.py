"""An A100 at batch 1, with launches that overlap with work, from the published latencies of whole networks.

Operators timed one by one do not show what a small kernel takes: launching hides it (`show_tries.py`). The
networks of OVERLAPPED do. A kernel takes, in this model,

- a fixed time, whatever is in it;
- a time for each input that one output sums up: at batch 1 few blocks run at once, and each walks its sum
  alone;
- its work at full batches (`a100.work_of`), times a factor: small maps do not fill the chip. It is one factor
  in float32, which ships, and one for products on tensor cores.

TensorRT joins a convolution with its norm, its activation and the sum after it, and writes what is
concatenated in its place; in a device's own spaces every operator but a norm behind a convolution is a
kernel, as PyTorch runs it. These four numbers are all that is fitted. Which products of the toolkit's
baselines ran on tensor cores is not published: only the ResNets are so slow that they cannot have. That, the
terms and what TensorRT joins were chosen by the errors on families left out, with the GPU column of
QuadraNet's table III in sight.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fitting.a100 import LIKE, PRODUCTS, Terms, moved_terms, note_of, work_of
from fitting.a100_networks import EAGER, OVERLAPPED, Operators, TimedNetwork
from fitting.fit import fit_relative, scaled
from qnas.latency.device import Figures, KernelModel, Size
from qnas.latency.evaluation import Array, figures
from qnas.latency.features import FEATURES
from qnas.latency.grid import Grid
from qnas.latency.intervals import LEVELS, Uncertainty, pooled, relative_errors
from qnas.latency.kernels import Kernel, fuse_operators

# What TensorRT joins with the convolution before it, or does not run at all.
_JOINED = ("add", "addrelu", "concat")
SUMS = (*PRODUCTS, "dwconv", "conv1x1", "patch")


@dataclass(frozen=True)
class Costs:
    """What a kernel takes at batch 1, and how many times as long its work takes as at full batches."""

    kernel_ms: float
    kfan_in_ms: float  # for a thousand inputs of one output
    float32: float
    tensor_cores: float

    def total_ms(self, sums: Array) -> Array:
        """Return the latency of networks of the columns of `_sums`."""
        costs = (self.kernel_ms, self.kfan_in_ms, self.float32, self.tensor_cores)
        return np.asarray(sums @ np.array(costs), dtype=np.float64)


def tensorrt_kernels(operators: Operators) -> tuple[Kernel, ...]:
    """Return the kernels that TensorRT runs for the operators of a network."""
    return tuple(k for k in fuse_operators(operators, "edge") if k.kind not in _JOINED)


def float32_work(grids: Mapping[str, Grid]) -> dict[str, Terms]:
    """Return the work of each kind in float32, in ms by feature."""
    products = {
        kind: {"mmacs": 1e6 * grids[kind].beyond["rows*fan_in*channels"], **moved_terms("kweights")}
        for kind in PRODUCTS
    }
    work = work_of(grids, products)
    return work | {kind: work[other] for kind, other in LIKE.items()}


def fit_costs(work: Mapping[str, Terms], networks: Sequence[TimedNetwork] = OVERLAPPED) -> Costs:
    """Fit the costs of kernels to networks, each with its relative error."""
    measured = np.array([network.latency_ms for network in networks])
    found = fit_relative(_sums(work, networks), measured, np.zeros(4))
    return Costs(*found.tolist())


def _sums(work: Mapping[str, Terms], networks: Iterable[TimedNetwork]) -> Array:
    """Return kernels, their inputs of an output, and their work by precision. -> (networks, 4)"""
    rows = []
    for network in networks:
        kernels = tensorrt_kernels(network.operators)
        kfan_in = sum(FEATURES["kfan_in"](k) for k in kernels if k.kind in SUMS)
        work_ms = sum(ms * FEATURES[name](k) for k in kernels for name, ms in work[k.kind].items())
        by_precision = (0.0, work_ms) if network.tensor_cores else (work_ms, 0.0)
        rows.append((len(kernels), kfan_in, *by_precision))
    return np.array(rows, dtype=np.float64)


def latency_model(grids: Mapping[str, Grid]) -> dict[str, KernelModel]:
    """Return the kernels at batch 1 in float32: a fixed time, its longest sum, its work."""
    work = float32_work(grids)
    costs = fit_costs(work)
    seen = largest(kernel for network in OVERLAPPED for kernel in tensorrt_kernels(network.operators))
    model = {}
    for kind, of_kind in sorted(work.items()):
        terms = {"launch": costs.kernel_ms, **{name: costs.float32 * ms for name, ms in of_kind.items()}}
        if kind in SUMS:
            terms["kfan_in"] = costs.kfan_in_ms
        absent, rests_on = "not in the measured networks: ", note_of(kind) or "its work as timed by itself"
        model[kind] = KernelModel(
            kind="fitted" if kind in seen else "estimated",
            note=rests_on if kind in seen else absent + rests_on,
            terms=scaled(terms, 1),
            measured_up_to=seen.get(kind),
        )
    return model


def largest(kernels: Iterable[Kernel]) -> dict[str, dict[Size, int]]:
    """Return the kinds of kernels with the largest sizes of each."""
    most: dict[str, dict[Size, int]] = {}
    for kernel in kernels:
        sizes: dict[Size, int] = {
            "resolution_px": kernel.resolution_px,
            "c_in": kernel.c_in,
            "c_out": kernel.c_out,
        }
        if kernel.kind in ("conv", "dwconv"):
            sizes["kernel"] = kernel.kernel
        known = most.setdefault(kernel.kind, sizes)
        most[kernel.kind] = {size: max(value, known[size]) for size, value in sizes.items()}
    return most


def left_out(grids: Mapping[str, Grid]) -> Array:
    """Return the latency of each network of OVERLAPPED by a fit to the other families."""
    work = float32_work(grids)
    sums = _sums(work, OVERLAPPED)
    families = np.array([network.family for network in OVERLAPPED])
    predicted = np.zeros(len(families))
    for family in dict.fromkeys(families.tolist()):
        others = [network for network in OVERLAPPED if network.family != family]
        predicted[families == family] = fit_costs(work, others).total_ms(sums[families == family])
    return predicted


def eager_ms(grids: Mapping[str, KernelModel]) -> Array:
    """Return the networks of EAGER by a model of single operators, all of which are launched, norms too."""

    def of_kernel(kernel: Kernel) -> float:
        cost = grids[kernel.kind]
        return (grids[cost.like] if cost.like is not None else cost).latency_ms(kernel)

    alone = ((fuse_operators([operator], "eager") for operator in network.operators) for network in EAGER)
    return np.array([sum(of_kernel(kernel) for (kernel,) in network) for network in alone])


def overlapped_accuracy(predicted_ms: Array) -> dict[str, dict[str, Figures]]:
    """Return how predictions of OVERLAPPED that a fit had not seen compare with what is published."""
    measured = np.array([network.latency_ms for network in OVERLAPPED])
    families = np.array([network.family for network in OVERLAPPED])

    def of(rows: npt.NDArray[np.bool_]) -> Figures:
        near = np.abs(predicted_ms[rows] / measured[rows] - 1) <= 0.15
        share = round(100 * float(np.mean(near)), 1)
        return figures(predicted_ms[rows], measured[rows]).model_copy(update={"within_15_pct": share})

    by_family = {family: of(families == family) for family in dict.fromkeys(families.tolist())}
    return {"each family unseen": {"all": of(measured > 0)}, "unseen family": by_family}


def eager_accuracy(predicted_ms: Array) -> dict[str, dict[str, Figures]]:
    """Return how predictions of EAGER, of which no fit has seen any, compare with what is published."""
    return {"unseen networks": {"all": figures(predicted_ms, [n.latency_ms for n in EAGER])}}


def network_uncertainty(
    networks: Sequence[TimedNetwork], predicted_ms: Array, source: str, weight: float
) -> Uncertainty:
    """Return the intervals from predictions of networks that took no part; there are too few for 95%."""
    errors = {}
    for family in dict.fromkeys(network.family for network in networks):
        rows = [i for i, network in enumerate(networks) if network.family == family]
        measured = np.array([networks[i].latency_ms for i in rows])
        errors[family] = relative_errors(measured, predicted_ms[rows], np.zeros(len(rows)), 1.0)
    return pooled(errors, weight=weight, source=source, levels=LEVELS[:3])
