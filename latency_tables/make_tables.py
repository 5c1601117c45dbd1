"""Fit the shipped devices and write their files: DEVICE.json, and DEVICE/SPACE.csv for every space.

    python latency_tables/make_tables.py --data PATH/TO/latency_data
    python latency_tables/make_tables.py --tables-only      # a space was added; needs no data

The data are public measurements (see `source` in each device file) and are not part of qnas. The
same data give the same bytes.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fitting import a100, a100_latency
from fitting.a100_networks import EAGER, OVERLAPPED
from fitting.about import ABOUT, EAGER_INTERVALS, INTERVAL_SOURCE, OVERLAPPED_INTERVALS
from fitting.fit import HELD_OUT, SEED, Design, Fit, design, fit_networks, scaled, summed
from fitting.forms import FORMS
from fitting.layernorm import Block, fit_layernorm, read_blocks
from fitting.operators import MS_PER_ELEMENT, fit_operators, read_operators
from fitting.published import PUBLISHED, fit_published, published_model
from scipy import sparse

from qnas.common.resources import stems
from qnas.latency.device import SCHEMA, Device, Figures, KernelModel, Size, load_device
from qnas.latency.device_table import compute_table
from qnas.latency.evaluation import Networks, evaluate_networks, figures, read_networks
from qnas.latency.grid import Grid
from qnas.latency.intervals import Uncertainty, pooled, relative_errors
from qnas.latency.kernels import Kernel
from qnas.latency.table import write_table
from qnas.spaces.space import load_space

HERE = Path(__file__).resolve().parent
DATE = "2026-11-30"  # of the fit

# Families left out of a fit as a whole, to estimate the accuracy on a new family of networks.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "proxylessnas": ("proxylessnas",),
    "mobilenetv1": ("mobilenetv1",),
    "mobilenetv2": ("mobilenetv2",),
    "mobilenetv3": ("mobilenetv3small", "mobilenetv3large"),
    "shufflenetv2": ("shufflenetv2",),
    "resnet": ("resnet18", "resnet34", "resnet50"),
}

# Further families that are left out, for the intervals only.
FURTHER_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "alexnet": ("alexnet",),
    "densenet": ("densenet",),
    "googlenet": ("googlenet",),
    "squeezenet": ("squeezenet",),
    "vgg": ("vgg11", "vgg13", "vgg16", "vgg19"),
}

# Times that an estimated millisecond is as uncertain as one of a measured kind. Where networks determine the
# cost of an operator that is counted in passes over a map, it is 20 to 40% off that count (a hard swish or a
# scale on the VPU), about three times as far as 80% of the networks of a family that the fit never saw.
ESTIMATED_WEIGHT = 3.0

_ABSENT = "not in the measured networks"

# Operators that no measured network has -> number of passes over a map, and the reason.
UNMEASURED_PASSES: dict[str, tuple[float, str]] = {
    "relu": (1, "by itself"),
    "clip": (1, "as relu"),
    "add_scalar": (1, "one map"),
    "mul_scalar": (1, "one map"),
    "mul": (1.5, "a product of two maps, as add"),
    "square": (1, "a product of a map with itself"),
    "sub": (1.5, "as add"),
    "elementwise": (1.5, "as add"),
    "sigmoid": (2, "an exponential is as dear as a pass of its own"),
    "swish": (3.5, "a sigmoid and a product"),
}

# Passes of a hard swish that a compiler folds into the next convolution; for a GELU nobody measured that.
FOLDED = {"myriad-vpu": 1.0}


def edge_model(
    name: str, fit: Fit, measured: Mapping[str, dict[Size, int]], layernorm: KernelModel
) -> dict[str, KernelModel]:
    """Return the models of all kinds of kernels.

    `measured` has the largest sizes of each kind in the networks of the fit; other kinds are estimates.
    """
    one = {"launch": fit.shared["pass.launch"], "kelements_in": fit.shared["pass.kelements"]}
    passes = {kind: times for (kind, _), times in FORMS[name].shared["pass.launch"].items()}
    model = {}
    for kind, terms in fit.terms.items():
        times = passes.get(kind)
        note = f"{times:g} of the fitted passes over a map" if times else ""
        if kind == "scale" and "strided.launch" in fit.shared:
            note += ", and the broadcast"
        if kind in measured:
            model[kind] = KernelModel(kind="fitted", note=note, terms=terms, measured_up_to=measured[kind])
        else:
            model[kind] = KernelModel(kind="estimated", note=f"{_ABSENT}: {note}", terms=terms)
    as_conv = (
        "kernel = stride is not in the measured networks: by the model of conv, whose kernels enclose it"
    )
    model["patch"] = KernelModel(kind="fitted", note=as_conv, like="conv")
    unmeasured = {
        **UNMEASURED_PASSES,
        "gelu": (max(1.0, passes["hswish"] + FOLDED.get(name, 0.0)), "as the chain of operators of hswish"),
    }
    for kind, (times, why) in unmeasured.items():
        note = f"{_ABSENT}: {times:g} of the fitted passes over a map ({why})"
        model[kind] = KernelModel(kind="estimated", note=note, terms=scaled(one, times))
    for kind, other in (("transpose", "shuffle"), ("slice", "split")):
        model[kind] = KernelModel(kind="estimated", note=f"{_ABSENT}: as {other}", like=other)
    model["layernorm"] = layernorm
    return dict(sorted(model.items()))


def layernorm_of_parts(fit: Fit) -> KernelModel:
    """Return the cost of layer normalisation as the sum of its operators in a graph."""
    note = (
        f"{_ABSENT}: mean and variance as gap, their two broadcasts as scale, the square as one pass over "
        "a map, scale and shift as batchnorm"
    )
    one = {"launch": fit.shared["pass.launch"], "kelements_in": fit.shared["pass.kelements"]}
    gap, scale, norm = (fit.terms[kind] for kind in ("gap", "scale", "batchnorm"))
    terms = summed(gap, gap, scale, scale, one, norm)
    return KernelModel(kind="estimated", note=note, terms=terms)


def layernorm_of_blocks(fit: Fit, blocks: list[Block]) -> KernelModel:
    """Return the cost of layer normalisation by measured blocks with it, at least two passes over a map."""
    note = (
        f"{_ABSENT}: from blocks timed on the same phone with a newer TFLite, scaled by their 1x1 "
        "convolutions (github.com/microsoft/nn-Meter, MIT)"
    )
    cost = KernelModel(kind="fitted", terms=fit.terms["conv1x1"])
    least = {"launch": 2 * fit.shared["pass.launch"], "kelements_in": 2 * fit.shared["pass.kelements"]}
    terms = fit_layernorm(blocks, cost.latency_ms, least)
    return KernelModel(kind="estimated", note=note, terms=terms)


# Timed operator -> operators that were not timed on the GPU, which move as much data or less.
NOT_TIMED: dict[str, tuple[str, ...]] = {
    "relu": ("clip", "sigmoid", "hsigmoid", "swish", "hswish", "add_scalar", "mul_scalar"),
    "mul": ("square",),
    "add": ("sub", "elementwise", "scale", "batchnorm", "gap", "avgpool", "maxpool"),
}
# Operators that copy a map: a view in some runtimes; here they cost at least a launch.
COPIES = ("concat", "split", "reshape", "transpose", "shuffle")


def gpu_model(grids: Mapping[str, Grid]) -> dict[str, KernelModel]:
    """Return the models of all kinds of kernels, including those that were not timed."""
    notes = {
        "conv": "3x3 of stride 1 was timed: others by their output pixels and the inputs of an output",
        "layernorm": "260 channels and more were timed: fewer take as long as 260",
    }
    model = {
        kind: KernelModel(kind="fitted", note=notes.get(kind, ""), grid=grid) for kind, grid in grids.items()
    }
    for kind, rows in (("conv1x1", "pixel"), ("patch", "patch")):
        note = f"as linear with a row for every {rows}"
        model[kind] = KernelModel(kind="fitted", note=note, like="linear")
    for timed, kinds in NOT_TIMED.items():
        for kind in kinds:
            model[kind] = KernelModel(kind="estimated", note=f"not timed: as {timed}", like=timed)
    folds = "not timed: as add; none is left where it folds into the convolution before it"
    model["batchnorm"] = KernelModel(kind="estimated", note=folds, like="add")
    moved = dict.fromkeys(("kelements_in", "kelements_out"), 1e3 * MS_PER_ELEMENT)
    note = "not timed: the launch of {}, and {} once at the 1.3 TB/s that elementwise operators reach"
    copied = {"launch": grids["add"].floor_ms, **moved}
    for kind in COPIES:
        of_kind = note.format("add", "input and output")
        model[kind] = KernelModel(kind="estimated", note=of_kind, terms=scaled(copied, 1))
    # no arithmetic: 49 multiply-adds at 9.75T a second take less than 8 bytes at 1.3 TB/s
    depthwise = {"launch": grids["linear"].floor_ms, **moved, "kweights": 1e3 * MS_PER_ELEMENT}
    note = note.format("linear", "input, output and weights")
    model["dwconv"] = KernelModel(kind="estimated", note=note, terms=scaled(depthwise, 1))
    return dict(sorted(model.items()))


@dataclass(frozen=True)
class EdgeData:
    """The kernels of the measured networks, and how often each network has each: (networks, kernels)."""

    kernels: Sequence[Kernel]
    counts: sparse.csr_matrix

    def predict(
        self, device: Device, rows: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the latencies of networks in ms, and the part of each that is estimated."""
        counts = self.counts[rows]
        of_kernel, estimated = np.zeros((2, len(self.kernels)))
        for j in np.unique(counts.indices).tolist():
            kernel = self.kernels[j]
            of_kernel[j] = device.kernel_ms(kernel)
            estimated[j] = of_kernel[j] * (device.kernel_source(kernel) == "estimated")
        return counts @ of_kernel + device.network_ms, counts @ estimated

    def largest(self, rows: npt.NDArray[np.bool_]) -> dict[str, dict[Size, int]]:
        """Return the kinds of kernels in the networks of these rows, with the largest sizes of each kind."""
        most: dict[str, dict[Size, int]] = {}
        for j in np.unique(self.counts[rows].indices).tolist():
            kernel = self.kernels[j]
            sizes: dict[Size, int] = {
                "resolution_px": kernel.resolution_px,
                "c_in": kernel.c_in,
                "c_out": kernel.c_out,
            }
            if kernel.kind in ("conv", "dwconv"):  # of others it is that of the operator in a graph
                sizes["kernel"] = kernel.kernel
            known = most.setdefault(kernel.kind, sizes)
            most[kernel.kind] = {size: max(value, known[size]) for size, value in sizes.items()}
        return most


def make_device(
    name: str,
    model: Mapping[str, KernelModel],
    date: str,
    *,
    fixed_ms: float = 0.0,
    accuracy: Mapping[str, Mapping[str, Figures]] | None = None,
    uncertainty: Uncertainty | None = None,
) -> Device:
    """Return a fitted model as a device."""
    return Device.model_validate(
        {
            "schema": SCHEMA,
            "name": name,
            "batch": 1,
            **ABOUT[name],
            "unit": "ms",
            "kind": "fitted",
            "date": date,
            "accuracy": accuracy or {},
            "fixed_ms": float(f"{fixed_ms:.6g}"),
            "model": model,
            "uncertainty": uncertainty,
        }
    )


def fit_edge(name: str, networks: Networks, data: EdgeData, blocks: list[Block], date: str) -> Device:
    """Fit an edge device to all networks but a random fifth, which gives its accuracy.

    Its accuracy on an unseen family is that of a fit without this family, and so are its intervals.
    """
    latency_ms = networks.latency_ms[name]
    known = np.isfinite(latency_ms)
    held_out = np.zeros_like(known)
    held_out[known] = np.random.default_rng(SEED).random(int(known.sum())) < HELD_OUT
    of = design(FORMS[name], data.kernels, data.counts)
    shipped = fit_rows(name, of, latency_ms, known & ~held_out, data.largest(known), blocks, date)
    errors, families = left_out_errors(name, networks, data, blocks, date)
    accuracy = {
        "unseen networks": evaluate_networks(shipped, networks.only(held_out)),
        "unseen family": families,
    }
    uncertainty = pooled(errors, weight=ESTIMATED_WEIGHT, source=INTERVAL_SOURCE)
    return shipped.model_copy(update={"accuracy": accuracy, "uncertainty": uncertainty})


def fit_rows(
    name: str,
    of: Design,
    latency_ms: npt.NDArray[np.float64],
    rows: npt.NDArray[np.bool_],
    measured: Mapping[str, dict[Size, int]],
    blocks: list[Block],
    date: str,
) -> Device:
    """Fit an edge device to the networks of these rows; `measured` as in `edge_model`."""
    fit = fit_networks(of, latency_ms, rows)
    layernorm = layernorm_of_blocks(fit, blocks) if name == "cortex-a76" else layernorm_of_parts(fit)
    return make_device(name, edge_model(name, fit, measured, layernorm), date, fixed_ms=fit.fixed_ms)


def left_out_errors(
    name: str, networks: Networks, data: EdgeData, blocks: list[Block], date: str
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, Figures]]:
    """Return the errors of each family by a fit without it, and the accuracy for those in LEFT_OUT."""
    latency_ms = networks.latency_ms[name]
    known = np.isfinite(latency_ms)
    of = design(FORMS[name], data.kernels, data.counts)
    families, errors = {}, {}
    for group, names in {**LEFT_OUT, **FURTHER_LEFT_OUT}.items():
        family = known & np.isin(networks.families, names)
        if family.any():
            seen = known & ~family
            device = fit_rows(name, of, latency_ms, seen, data.largest(seen), blocks, date)
            predicted_ms, estimated_ms = data.predict(device, family)
            errors[group] = relative_errors(latency_ms[family], predicted_ms, estimated_ms, ESTIMATED_WEIGHT)
            if group in LEFT_OUT:
                families[group] = figures(predicted_ms, latency_ms[family])
    return errors, families


def fit_devices(data: Path, date: str) -> list[Device]:
    """Fit all shipped devices to the measurements in a folder."""
    networks = read_networks(data / "edge_models.npz")
    blocks = read_blocks(data / "pixel4_blocks.json.gz")
    edge = EdgeData(*networks.fused("edge"))
    devices = [fit_edge(name, networks, edge, blocks, date) for name in FORMS]
    return [*devices, *fit_a100(data, date), *fit_desktops(data, date)]


def fit_a100(data: Path, date: str) -> list[Device]:
    """Fit the A100: operators launched one by one, overlapped at batch 1, and at large batches."""
    kernels, latency_ms = read_operators(data / "a100_ops.csv")
    grids, of_operators = fit_operators(kernels, latency_ms)
    eager, throughput = gpu_model(grids), a100.throughput_model(grids)
    eager_ms, overlapped_ms = a100_latency.eager_ms(eager), a100_latency.left_out(grids)
    return [
        make_device(
            "a100-eager",
            eager,
            date,
            accuracy=of_operators | a100_latency.eager_accuracy(eager_ms),
            uncertainty=a100_latency.network_uncertainty(EAGER, eager_ms, EAGER_INTERVALS, 1.0),
        ),
        make_device(
            "a100",
            a100_latency.latency_model(grids),
            date,
            accuracy=a100_latency.overlapped_accuracy(overlapped_ms),
            uncertainty=a100_latency.network_uncertainty(
                OVERLAPPED, overlapped_ms, OVERLAPPED_INTERVALS, ESTIMATED_WEIGHT
            ),
        ),
        make_device(
            "a100-throughput",
            throughput,
            date,
            accuracy=a100.published_accuracy(throughput),
            uncertainty=a100.published_uncertainty(throughput),
        ),
    ]


def fit_desktops(data: Path, date: str) -> list[Device]:
    """Fit the GPUs and desktop CPUs to the networks that timm publishes."""
    networks = read_networks(data / "gpu_desktop_models.npz")
    fusions = {fusion for _, fusion, _ in PUBLISHED.values()}
    fused = {fusion: networks.fused(fusion) for fusion in sorted(fusions)}
    devices = []
    for name, (column, fusion, form) in PUBLISHED.items():
        found = fit_published(networks, column, design(form, *fused[fusion]))
        devices.append(
            make_device(
                name,
                published_model(found.fit),
                date,
                fixed_ms=found.fit.fixed_ms,
                accuracy=found.accuracy,
                uncertainty=pooled(found.errors, weight=ESTIMATED_WEIGHT, source=INTERVAL_SOURCE),
            )
        )
    return devices


def write_tables(device: Device, folder: Path) -> list[Path]:
    """Write a device's tables of all shipped spaces that have more than one network."""
    written = []
    for name in stems("search_spaces", ".yaml"):
        space = load_space(name)
        if not space.is_fixed:
            path = folder / device.name / f"{name}.csv"
            write_table(compute_table(device, space), space, path)
            written.append(path)
    return written


def print_accuracy(device: Device) -> None:
    """Print the accuracy of a device's model on held-out measurements."""
    for held_out, groups in device.accuracy.items():
        for group, f in groups.items():
            print(
                f"{device.name:12} {held_out:16} {group:17} n {f.n:5}  RMSPE {f.rmspe_pct:5.1f}%  "
                f"within 5% {f.within_5_pct:5.1f}%  within 10% {f.within_10_pct:5.1f}%  "
                + ("" if f.within_15_pct is None else f"within 15% {f.within_15_pct:5.1f}%  ")
                + f"bias {f.bias_pct:+5.1f}%"
            )
    if device.uncertainty is not None:
        ends = (f"{e.level:g}: {e.low:+.1%} to {e.high:+.1%}" for e in device.uncertainty.errors)
        print(f"{device.name:12} errors of left-out families, level {', '.join(ends)}")


def main() -> None:
    """Parse the command line, fit the devices, write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="folder of the measurements: fit the devices anew")
    what.add_argument("--tables-only", action="store_true", help="tables from the device files as they are")
    parser.add_argument("--date", default=DATE, help="date of the fit, for the device files (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (where this script is)")
    args = parser.parse_args()
    if args.tables_only:
        devices = [load_device(path) for path in sorted(args.out.glob("*.json"))]
    else:
        devices = fit_devices(args.data, args.date)
        args.out.mkdir(parents=True, exist_ok=True)
        for device in devices:
            (args.out / f"{device.name}.json").write_text(device.to_json(), encoding="utf-8")
    for device in devices:
        print_accuracy(device)
        for path in write_tables(device, args.out):
            print(f"wrote {path.relative_to(args.out)}")


if __name__ == "__main__":
    main()
