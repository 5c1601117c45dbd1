"""The whole loop for a user's own device: sample, time, fit, calibrate, search, export, time again.

    python benchmarks/closed_loop.py [--out runs/closed-loop] [--first-part]

The device is this machine with onnxruntime on one thread. 120 networks of quadranet-small are timed. A
model is fitted to 80 of them and calibrated on the other 40. Then `qnas search` runs for ten budgets on this
device, and the exported networks are timed. As a harder test of the margin, ten random networks that use up
their budget are timed too.

The last timing includes networks of the calibration. The ratio of their times to the former ones gives the
machine's current speed, and measurements are shown both unchanged and at the calibration's speed. Existing
results are reused, so a stopped run continues. On an idle machine, the first part (--first-part stops after
it) takes two minutes, and ten with the searches.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from qnas.common import host
from qnas.common.files import write_bytes, write_text
from qnas.deploy.assembly import assemble, export_block
from qnas.deploy.measurement import Here, measure_sample, time_files
from qnas.deploy.sampling import CSV_FILE, choose_networks, write_sample
from qnas.deploy.timed_files import PLAIN
from qnas.deploy.timing import Timing
from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.evaluation import figures
from qnas.latency.fitting.calibration import calibrate, write_calibrated
from qnas.latency.fitting.measurements import Measured, read_measured
from qnas.latency.fitting.own_device import fit_own, own_device
from qnas.latency.table import RUNTIME, LatencyTable
from qnas.runs.found_arch import find_arch
from qnas.solver.distributions import sample_near
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space

SPACE = "quadranet-small"
NETWORKS, FITTED = 120, 80
BUDGETS = 10
LEVEL = 0.95  # confidence level of the calibration
REFERENCES = 12  # networks of the calibration to time again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/closed-loop"))
    parser.add_argument("--first-part", action="store_true", help="no searches")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    space = load_space(SPACE)
    print(f"{host.cpu_name()}, {host.load()}, {host.cpu_clock()}")
    held_out = first_part(space, options.out, options.repeats, options.seed)
    if not options.first_part:
        second_part(space, options, held_out)


def first_part(space: SearchSpace, out: Path, repeats: int, seed: int) -> list[Measured]:
    """Sample, time, fit and calibrate. Return the networks held out of the fit."""
    file = out / "sample" / CSV_FILE
    if not file.exists():
        table = load_table(load_device("cpu"), space)
        networks = choose_networks(space, table, NETWORKS, seed)
        write_sample(space, networks, file.parent, kind=PLAIN, seed=seed)
    measure_sample(file, space, Here("onnxruntime", threads=1), repeats=repeats)
    rows = read_measured(file, space)
    order = np.random.default_rng(seed).permutation(len(rows))
    fitted, held_out = [rows[i] for i in order[:FITTED]], [rows[i] for i in order[FITTED:]]
    fit = fit_own(space, [row.arch for row in fitted], times(fitted), str(file))
    own = own_device(fit, name="own", space=space, networks=FITTED, runtime=rows[0].runtime, day=date.today())
    write_text(out / "own.json", own.to_json())
    table = load_table(load_device(out / "own.json"), space)
    predicted = [predict(table, space, row.arch) for row in held_out]
    found = figures(np.array(predicted), np.array(times(held_out)))
    print(f"\n{NETWORKS} networks of {SPACE}: {min(times(rows)):.3f} to {max(times(rows)):.3f} ms")
    print(f"cross-validated on {FITTED}: {fit.accuracy.within_10_pct:.1f}% within 10%, ", end="")
    print(f"{fit.accuracy.within_5_pct:.1f}% within 5%, RMSPE {fit.accuracy.rmspe_pct:.2f}%")
    print(f"the other {found.n}: {found.within_10_pct:.1f}% within 10%, {found.within_5_pct:.1f}% ", end="")
    print(f"within 5%, RMSPE {found.rmspe_pct:.2f}%, bias {found.bias_pct:+.2f}%")
    judge("at least 95% of the networks left out are within 10%", found.within_10_pct >= 95)
    done = calibrate(
        predicted,
        times(held_out),
        LEVEL,
        fixed_ms=dict(table.fixed)[RUNTIME].latency_ms,
        source=f"{len(held_out)} networks of {SPACE}",
        where=str(file),
        day=date.today(),
    )
    write_calibrated(own, done, out / "calibrated.json", name="own-calibrated", force=True)
    c = done.calibration
    print(
        f"calibrated: times {c.scale:.4f}, {c.offset_ms * 1e3:+.2f} us, margin {c.margin:.2%} at {LEVEL:.0%}"
    )
    return held_out


def second_part(space: SearchSpace, options: argparse.Namespace, held_out: Sequence[Measured]) -> None:
    """Search for ten budgets, export, and time the files together with networks of the calibration."""
    out: Path = options.out
    table = load_table(load_device(out / "calibrated.json"), space)
    # from slightly above the fastest network to slightly below the slowest, including the margin
    low, high = (ms * (1 + table.margin) for ms in (1.3 * table.fastest_ms, 0.95 * table.slowest_ms))
    budgets_ms = [round(float(ms), 3) for ms in np.linspace(low, high, BUDGETS)]
    searched = {}
    for budget_ms in budgets_ms:
        run = out / f"search-{budget_ms * 1e3:.0f}us"
        if not (run / "export" / "model.onnx").exists():
            asked = {
                "device": out / "calibrated.json",
                "budget": f"{budget_ms}ms",
                "space": SPACE,
                "out": run,
                "warmup-epochs": options.warmup_epochs,
                "epochs": options.epochs,
                "random-networks": 0,
                "seed": options.seed,
            }
            qnas("search", *(word for key, value in asked.items() for word in (f"--{key}", value)), "--force")
            qnas("train-subnet", run, "--epochs", 1, "--force")
            qnas("export", run, "--format", "onnx", "--force")
        searched[budget_ms] = run / "export" / "model.onnx"
    used_up = write_used_up(space, table, budgets_ms, out / "used-up", options.seed)
    chosen = held_out[:: max(1, len(held_out) // REFERENCES)]
    files = {
        **{f"search {ms}": file for ms, file in searched.items()},
        **{f"used up {ms}": file for ms, (_, file) in used_up.items()},
        **{row.name: out / "sample" / f"{row.name}.onnx" for row in chosen},
    }
    timings = time_files(files, repeats=options.repeats)
    ratios = [timings[row.name].median_ms / (row.latency_ms or 0.0) for row in chosen]
    speed = statistics.median(ratios)
    print(f"\nthe calibration's networks take {speed:.3f} of what they took ", end="")
    print(f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} of them); {host.load()}")
    archs = {ms: find_arch(file.parent.parent).arch for ms, file in searched.items()}
    report(
        "searched",
        {ms: (predict(table, space, archs[ms]), timings[f"search {ms}"]) for ms in searched},
        speed,
    )
    report(
        "random networks that use their budget up",
        {ms: (predict(table, space, arch), timings[f"used up {ms}"]) for ms, (arch, _) in used_up.items()},
        speed,
    )


def write_used_up(
    space: SearchSpace, table: LatencyTable, budgets_ms: Sequence[float], folder: Path, seed: int
) -> dict[float, tuple[Arch, Path]]:
    """Write a random network for each budget, with a predicted latency just below the limit."""
    rng = np.random.default_rng(seed)
    graphs = {}
    found = {}
    for budget_ms in budgets_ms:
        limit_ms = table.limit_ms(budget_ms)
        # small budgets have few networks: take the nearest one below
        near = (sample_near(table, share * limit_ms, limit_ms, 1, rng) for share in (0.99, 0.97, 0.9, 0.5))
        arch = arch_from_indices(space, next(filter(None, near))[0])
        blocks = lower(space, arch)
        for block in blocks:
            if block.layers and block.layers not in graphs:
                graphs[block.layers] = export_block(block)
        path = folder / f"{budget_ms * 1e3:.0f}us.onnx"
        write_bytes(path, assemble(blocks, graphs, rng).SerializeToString())
        found[budget_ms] = arch, path
    return found


def report(title: str, rows: dict[float, tuple[float, Timing]], speed: float) -> None:
    """Print predictions and measurements, both unchanged and at the calibration's speed."""
    print(f"\n{title}: milliseconds")
    header = f"{'budget':>8} {'predicted':>9} {'measured':>9} {'p95':>7} {'off':>6} {'of budget':>9}"
    print(f"{header}   at the calibration's speed")
    counts = {"within 5%": [0, 0], "not above the budget": [0, 0]}
    for budget_ms, (predicted_ms, timing) in rows.items():
        cells = []
        for i, measured_ms in enumerate((timing.median_ms, timing.median_ms / speed)):
            off, share = measured_ms / predicted_ms - 1, measured_ms / budget_ms
            counts["within 5%"][i] += abs(off) <= 0.05
            counts["not above the budget"][i] += share <= 1
            cells.append(f"{off:+6.1%} {share:9.1%}")
        print(f"{budget_ms:8.3f} {predicted_ms:9.4f} {timing.median_ms:9.4f} {timing.p95_ms:7.3f} ", end="")
        print(f"{cells[0]}   {cells[1]}")
    for what, (raw, corrected) in counts.items():
        judge(
            f"{what}: {raw} of {len(rows)}, at the calibration's speed {corrected}",
            corrected >= 0.9 * len(rows),
        )


def predict(table: LatencyTable, space: SearchSpace, arch: Arch) -> float:
    return table.latency_ms(arch.indices(space))


def times(rows: Sequence[Measured]) -> list[float]:
    found = [row.latency_ms for row in rows if row.latency_ms is not None]
    assert len(found) == len(rows), "not all measured"
    return found


def qnas(*arguments: object) -> None:
    command = [sys.executable, "-m", "qnas.commands.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    facts = json.loads(done.stdout)
    print(f"  {arguments[0]}: {facts.get('run') or facts.get('folder') or facts.get('path')}", flush=True)


def judge(what: str, holds: bool) -> None:
    print(f"{'PASS' if holds else 'MISS'}  {what}")


if __name__ == "__main__":
    main()
