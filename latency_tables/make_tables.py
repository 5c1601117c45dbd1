"""Fit the shipped devices and write their files: DEVICE.json, and DEVICE/SPACE.csv for every space.

    python latency_tables/make_tables.py --data PATH/TO/latency_data
    python latency_tables/make_tables.py --tables-only      # a space was added; needs no data

The data are public measurements (see `source` in each device file) and are not part of qnas. The
same data give the same bytes.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from qnas.latency.device import SCHEMA, Device, KernelModel, load_device
from qnas.latency.fit import (
    PASS,
    PASSES,
    Fit,
    Terms,
    fit_networks,
    fit_operators,
    read_networks,
    read_operators,
    scaled,
)
from qnas.latency.table import compute_table, write_table
from qnas.resources import stems
from qnas.space import load_space

HERE = Path(__file__).resolve().parent
DATE = "2026-11-21"  # of the fit

# The families most like our blocks: what the accuracy is when nothing of the kind was seen.
LEFT_OUT = ("proxylessnas", "mobilenetv2")

# Least milliseconds of a launch, and of a thousand elements read and written by an operator
# without weights: well below what these devices' memory can do, so that they bind only where the
# measurements leave a cost undetermined.
FLOORS: dict[str, dict[str, float]] = {
    "cortex-a76": {"launch": 0.001, "kelements_in": 0.0004},  # 12 bytes an element at 30 GB/s
    "myriad-vpu": {"launch": 0.02, "kelements_in": 0.0006},  # 6 bytes (float16) at 10 GB/s
    "a100": {"launch": 0.005},
}

EDGE_SOURCE = (
    "fitted to end-to-end measurements of networks published with nn-Meter "
    "(MobiSys 2021, github.com/microsoft/nn-Meter, MIT)"
)
ABOUT: dict[str, dict[str, object]] = {
    "cortex-a76": {
        "aliases": ["cpu"],
        "title": "Cortex-A76 CPU of a Pixel 4",
        "runtime": "TFLite 2.1",
        "precision": "float32",
        "source": EDGE_SOURCE,
        "fusion": "edge",
    },
    "myriad-vpu": {
        "aliases": ["vpu"],
        "title": "Myriad X VPU, Intel Neural Compute Stick 2",
        "runtime": "OpenVINO 2019R2",
        "precision": "float16 on the device, from float32 networks",
        "source": EDGE_SOURCE,
        "fusion": "edge",
    },
    "a100": {
        "aliases": ["gpu"],
        "title": "NVIDIA A100, one image at a time, every operator launched and waited for by itself",
        "runtime": "PyTorch 2.1 eager, CUDA 12.1",
        "precision": "float32",
        "source": (
            "fitted to operator measurements published with NeuSight "
            "(ASPLOS 2025, github.com/sitar-lab/NeuSight, MIT)"
        ),
        "fusion": "eager",
    },
}


def edge_model(terms: Terms) -> dict[str, KernelModel]:
    """Return the models of all kinds of kernels, those that no measured network has included."""
    one = terms[PASS]
    model = {
        kind: KernelModel(kind="fitted", terms=weights) for kind, weights in terms.items() if kind != PASS
    }
    for kind, passes in PASSES.items():
        note = f"{passes} of the fitted elementwise passes over a map"
        model[kind] = KernelModel(kind="fitted", note=note, terms=terms[kind])
    as_conv = (
        "kernel = stride is not in the measured networks: by the model of conv, whose kernels enclose it"
    )
    model["patch"] = KernelModel(kind="fitted", note=as_conv, terms=terms["conv"])
    for kind, passes, why in (
        ("mul", 1, "a product of two maps, as add"),
        ("relu", 1, "by itself"),
        ("clip", 1, "as relu"),
        ("gelu", PASSES["hswish"], "as the chain of operators of hswish"),
        ("layernorm", 3, "mean, variance, scale and shift"),
    ):
        note = f"not in the measured networks: {passes} of the fitted elementwise passes over a map ({why})"
        model[kind] = KernelModel(kind="estimated", note=note, terms=scaled(one, passes))
    return dict(sorted(model.items()))


def gpu_model(terms: Terms) -> dict[str, KernelModel]:
    """Return the models of all kinds of kernels, those that were not timed included."""
    model = {kind: KernelModel(kind="fitted", terms=weights) for kind, weights in terms.items()}
    linear = terms["linear"]
    for kind, rows in (("conv1x1", "pixel"), ("patch", "patch")):
        note = f"as linear with a row for every {rows}"
        model[kind] = KernelModel(kind="fitted", note=note, terms=linear)
    # 4 bytes an element at the 1.3 TB/s that elementwise operators reach
    ms_per_kelement = 4e3 / 1.3e12 * 1e3
    bandwidth = {
        "launch": linear["launch"],
        "kelements_in": ms_per_kelement,
        "kelements_out": ms_per_kelement,
        "kweights": ms_per_kelement,
    }
    note = "not timed: the launch of linear, and reading and writing at 1.3 TB/s"
    model["dwconv"] = KernelModel(kind="estimated", note=note, terms=scaled(bandwidth, 1))
    for kind, note in (
        ("gap", "not timed: as add, which moves more"),
        ("hswish", "not timed: as add"),
        ("batchnorm", "not timed: as add; none is left where it folds into the convolution before it"),
    ):
        model[kind] = KernelModel(kind="estimated", note=note, terms=terms["add"])
    model["clip"] = KernelModel(kind="estimated", note="not timed: as relu", terms=terms["relu"])
    return dict(sorted(model.items()))


def make_device(name: str, fit: Fit, model: Mapping[str, KernelModel], date: str) -> Device:
    """Put a fit into a device file."""
    return Device.model_validate(
        {
            "schema": SCHEMA,
            "name": name,
            **ABOUT[name],
            "batch": 1,
            "unit": "ms",
            "kind": "fitted",
            "date": date,
            "accuracy": fit.accuracy,
            "fixed_ms": fit.fixed_ms,
            "model": model,
        }
    )


def fit_devices(data: Path, date: str) -> list[Device]:
    """Fit all shipped devices to the measurements in a folder."""
    networks = read_networks(data / "edge_models.npz")
    devices = []
    for name in ("cortex-a76", "myriad-vpu"):
        fit = fit_networks(networks, name, floors=FLOORS[name], left_out=LEFT_OUT)
        devices.append(make_device(name, fit, edge_model(fit.terms), date))
    fit = fit_operators(*read_operators(data / "a100_ops.csv"), floors=FLOORS["a100"])
    devices.append(make_device("a100", fit, gpu_model(fit.terms), date))
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
    """Print how well a device's model does on what it has not seen."""
    for held_out, groups in device.accuracy.items():
        for group, f in groups.items():
            print(
                f"{device.name:12} {held_out:16} {group:17} n {f.n:5}  RMSPE {f.rmspe_pct:5.1f}%  "
                f"within 5% {f.within_5_pct:5.1f}%  within 10% {f.within_10_pct:5.1f}%  "
                f"bias {f.bias_pct:+5.1f}%  Spearman {f.spearman:.3f}"
            )


def main() -> None:
    """Parse the command line, fit, write."""
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
