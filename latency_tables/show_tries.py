"""Show what was tried for one image on an A100, and for squeeze-and-excitation on the VPU, with figures.

    python latency_tables/show_tries.py --data PATH/TO/latency_data

A100: how much work a launch hides in the operator timings; then, for each try, how far it is off on the
networks of `fitting.a100_networks`, and what it says of a QuadraNet of as many multiply-adds as the one for
which the paper has 2.9 ms.

VPU: the networks with squeeze-and-excitation (MobileNetV3) by fits that have seen one of its two families or
none, for each way of sharing their cost between it and the hard swish; and by how much each way, and the one
before, change the price of networks that have the first in every block and not the second.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fitting import a100_latency
from fitting.a100_latency import float32_work, tensorrt_kernels
from fitting.a100_networks import OVERLAPPED, Operators, inverted
from fitting.fit import Form, design
from fitting.forms import MYRIAD_VPU
from fitting.operators import fit_operators, read_operators
from make_tables import DATE, EdgeData, fit_rows, gpu_model

from qnas.latency.device import Device
from qnas.latency.evaluation import Array, read_networks
from qnas.latency.features import FEATURES
from qnas.latency.grid import Grid
from qnas.latency.kernels import Kernel, fuse, fuse_operators
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import load_space

Price = Callable[[Kernel], float]  # ms

GRAPH_MS = 0.003  # a kernel of a small block, as a CUDA graph on an H200
GATED = ("mobilenetv3small", "mobilenetv3large")


def show_hidden(kernels: list[Kernel], latency_ms: Array, work: Mapping[str, Mapping[str, float]]) -> None:
    """Print how much work takes no longer than none: it is done while the next launch is prepared."""
    for kind in ("add", "relu", "linear"):
        rows = [i for i, kernel in enumerate(kernels) if kernel.kind == kind]
        shortest = latency_ms[rows].min()
        of_work = np.array(
            [sum(ms * FEATURES[name](kernels[i]) for name, ms in work[kind].items()) for i in rows]
        )
        hidden = of_work[latency_ms[rows] <= 1.1 * shortest]
        most = 1e3 * np.quantile(hidden, 0.9)
        print(
            f"{kind:7} {len(hidden):4} of {len(rows)} take at most a tenth more than the shortest, "
            f"{1e3 * shortest:.0f} us, nine in ten of them with up to {most:.1f} us of work"
        )


def paper_network() -> tuple[Kernel, ...]:
    """Return the kernels of a network of quadranet-gpu, one by one: 5x5 and expansion 4 everywhere."""
    space = load_space("quadranet-gpu")
    chosen = tuple(
        next(
            i
            for i, c in enumerate(p.candidates)
            if (c.parameters.get("expansion"), c.parameters.get("kernel")) == (4, 5)
        )
        for p in space.positions
    )
    blocks = lower(space, arch_from_indices(space, chosen))
    return tuple(kernel for block in blocks for kernel in fuse(block.layers, "eager"))


def show_try(what: str, of_networks: Array, of_paper: float) -> None:
    """Print how far a try is off."""
    measured = np.array([network.latency_ms for network in OVERLAPPED])
    fast = np.array([network.tensor_cores for network in OVERLAPPED])
    off = of_networks / measured - 1
    print(
        f"{what:66} within 20%: {np.sum(np.abs(off) <= 0.2):2} of {len(off)}; "
        f"float32 {np.median(off[~fast]):+.0%}, tensor cores {np.median(off[fast]):+.0%}; "
        f"the paper's 2.9 ms: {of_paper:.2f} ms"
    )


def show_batch_1(data: Path) -> None:
    """Print the tries for one image on an A100."""
    kernels, latency_ms = read_operators(data / "a100_ops.csv")
    grids, _ = fit_operators(kernels, latency_ms)
    work = float32_work(grids)
    show_hidden(kernels, latency_ms, work)
    paper = paper_network()
    eager = Device.model_construct(model=gpu_model(grids), calibration=None)

    def work_ms(kernel: Kernel) -> float:
        return sum(ms * FEATURES[name](kernel) for name, ms in work[kernel.kind].items())

    def above_shortest(kernel: Kernel) -> float:
        return GRAPH_MS + max(0.0, eager.kernel_ms(kernel) - _floor(grids, eager, kernel.kind))

    tries: dict[str, Price] = {
        "3 us a kernel, as a CUDA graph on an H200, and its work": lambda k: GRAPH_MS + work_ms(k),
        "3 us, and what its operator took above the shortest": above_shortest,
        "every kernel launched and waited for (a100-eager)": eager.kernel_ms,
    }
    for what, price in tries.items():
        found = np.array([sum(map(price, tensorrt_kernels(network.operators))) for network in OVERLAPPED])
        show_try(what, found, sum(map(price, paper)))
    costs = a100_latency.fit_costs(work)

    def shipped(kernel: Kernel) -> float:
        sums = FEATURES["kfan_in"](kernel) if kernel.kind in a100_latency.SUMS else 0.0
        return costs.kernel_ms + costs.kfan_in_ms * sums + costs.float32 * work_ms(kernel)

    left_out = a100_latency.left_out(grids)
    show_try("fitted to these networks, each family by the others (a100)", left_out, sum(map(shipped, paper)))
    print(costs)
    for network, ms in zip(OVERLAPPED, left_out, strict=True):
        off = ms / network.latency_ms - 1
        print(f"  {network.name:13} {network.latency_ms:5.2f} ms {ms:5.2f} ms  {off:+.0%}")


def _floor(grids: Mapping[str, Grid], eager: Device, kind: str) -> float:
    """Return the least latency of a kind that was launched by itself."""
    cost = eager.model[kind]
    cost = eager.model[cost.like] if cost.like is not None else cost
    return cost.grid.floor_ms if cost.grid is not None else (cost.terms or {})["launch"]


def with_hard_swish(passes: float) -> Form:
    """Return the form of the VPU with a hard swish of so many passes over its map."""
    shared = {name: dict(columns) for name, columns in MYRIAD_VPU.shared.items()}
    shared["pass.launch"]["hswish", "launch"] = passes
    shared["pass.kelements"]["hswish", "kelements_in"] = passes
    return replace(MYRIAD_VPU, shared=shared)


def with_own_terms(form: Form, kind: str, features: Iterable[str]) -> Form:
    """Return a form whose kind has these features alone for its own."""
    return replace(form, own={**form.own, kind: tuple(features)})


def gated_network(seed: int) -> Operators:
    """Return inverted residuals of random sizes with ReLUs, each with a squeeze-and-excitation."""
    rng = np.random.default_rng(seed)
    px, c = 112, 16
    ops: list[Kernel] = [Kernel("conv", 224, 3, c, 3, 2), Kernel("relu", 112, c, c)]
    for wide, depth, stride in ((24, 2, 2), (40, 3, 2), (80, 4, 2), (112, 2, 1), (160, 3, 2), (320, 1, 1)):
        c_out = 8 * round(wide * rng.uniform(0.3, 1.5) / 8 + 0.5)
        kernel, expansion = int(rng.choice([3, 5, 7])), int(rng.choice([3, 6]))
        for block in range(depth):
            hidden = expansion * c
            part, px = inverted(px, c, c_out, kernel, 1 if block else stride, hidden, hidden // 4)
            c = c_out
            for operator in part:
                hard = (
                    ("add_scalar", "relu", "mul_scalar") if operator.kind == "sigmoid" else (operator.kind,)
                )
                ops += [replace(operator, kind=kind) for kind in hard]
    return (*ops, Kernel("gap", px, c, c), Kernel("linear", 1, c, 1000))


def fitted_vpu(form: Form, edge: EdgeData, latency_ms: Array, rows: npt.NDArray[np.bool_]) -> Device:
    """Return the VPU by a fit of a form to the networks of these rows."""
    of = design(form, edge.kernels, edge.counts)
    return fit_rows("myriad-vpu", of, latency_ms, rows, edge.largest(rows), [], DATE)


def show_gates(data: Path) -> None:
    """Print the tries for squeeze-and-excitation on the VPU."""
    networks = read_networks(data / "edge_models.npz")
    edge = EdgeData(*networks.fused("edge"))
    measured = networks.latency_ms["myriad-vpu"]
    known = np.isfinite(measured)
    alike = [fuse_operators(gated_network(seed), "edge") for seed in range(40)]
    forms = {
        "hard swish of 4.5 passes, scale without lines (before)": with_own_terms(
            with_hard_swish(4.5), "scale", ()
        ),
        "hard swish of 3.5 passes (ships)": MYRIAD_VPU,
        "hard swish of 2.5 passes": with_hard_swish(2.5),
        "scale by channel, too": with_own_terms(MYRIAD_VPU, "scale", ("klines", "kchannels_out")),
    }
    before: Array | None = None
    for what, form in forms.items():
        text = []
        for unseen in ((GATED[0],), (GATED[1],), GATED):
            rows = known & np.isin(networks.families, unseen)
            predicted, _ = edge.predict(fitted_vpu(form, edge, measured, known & ~rows), rows)
            off = predicted / measured[rows] - 1
            text.append(f"{np.mean(np.abs(off) <= 0.1):.1%} ({np.median(off):+.1%})")
        device = fitted_vpu(form, edge, measured, known)
        prices = np.array([sum(map(device.kernel_ms, kernels)) for kernels in alike])
        before = prices if before is None else before
        low, mid, high = np.quantile(prices / before - 1, (0.1, 0.5, 0.9))
        print(
            f"{what:56} within 10% (median) of small, large, both left out: {', '.join(text)}; "
            f"in every block: {mid:+.1%} ({low:+.1%} to {high:+.1%})"
        )


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the measurements")
    data = parser.parse_args().data
    show_batch_1(data)
    show_gates(data)


if __name__ == "__main__":
    main()
