"""The quadratic convolution compared with three F.conv2d under torch's autograd, interleaved, as ratios.

    python benchmarks/quadratic.py [--threads 1] [--repeats 21] [--small] [--fresh] [--json FILE]

(It is not named operator.py: a script's folder comes first on the path, and Python has a module `operator`.)
The script prints median milliseconds of the reference, ratios of the other forms to it, the memory that
training keeps in multiples of x, and GFLOP/s and GB/s as shares of the rates of a large matrix product and a
large copy in the same run. PASS and MISS say whether a form is within its bar. --small measures the maps of
the search spaces at 32 px instead, which have no bars.

As in a training run (`training.loop.set_up_process`), memory freed by tensors is kept for reuse. By default,
glibc returns large tensors to the system and clears the pages of each new one. This makes the reference,
which allocates most, up to three times slower; --fresh shows this state. The bars are for kept memory, where
the reference is fastest.

Whatever a form really does, operations are those of three convolutions (in a step: three forward, two again
for the factors, three for x and three for the weights), and bytes those of a perfect kernel (forward reads x
and writes y; backward reads x and the gradient and writes the gradient of x).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from memory import saved_bytes
from torch import Tensor

from qnas.common.host import cpu_name
from qnas.nn.kernels import native
from qnas.nn.quadratic import choose_form, quadratic_conv2d, quadratic_conv2d_reference
from qnas.training.loop import set_up_process

Shape = tuple[int, int, int]  # batch, channels, height = width

SHAPES: list[Shape] = [(8, 64, 56), (32, 64, 32), (64, 32, 16)]
# the stages of quadranet-small and of quadranet-mobile at 32 px
SMALL_SHAPES: list[Shape] = [
    (64, 64, 8),
    (64, 128, 4),
    (64, 24, 8),
    (64, 40, 4),
    (64, 80, 2),
    (64, 192, 1),
]
KERNELS = (3, 5, 7)
FORMS = ("reference", "lean", "native")

# Largest ratios to the reference: form -> kernel -> (forward, training step); and multiples of x kept.
BARS: dict[str, dict[int, tuple[float, float]]] = {
    "lean": {3: (1.05, 1.40), 5: (1.05, 0.90), 7: (1.05, 0.75)},
    "native": {3: (0.45, 0.45), 5: (0.50, 0.22), 7: (0.55, 0.22)},
}
SAVED_BAR = 1.1


@dataclass(frozen=True)
class Row:
    """The results of a form at a shape: medians, and the memory that a training step keeps."""

    form: str
    shape: Shape
    kernel: int
    forward_ms: float
    step_ms: float
    saved_x: float  # multiples of x, without the weights
    forward_gflops: float
    forward_gbs: float
    step_gflops: float
    step_gbs: float


@dataclass(frozen=True)
class Ceiling:
    """The rates that the machine reaches with the same number of threads."""

    gflops: float
    gbs: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--small", action="store_true", help="the maps of the search spaces at 32 px")
    parser.add_argument("--fresh", action="store_true", help="memory as in a process that just started")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    options = parser.parse_args()
    if options.fresh:
        torch.set_num_threads(options.threads)
    else:
        set_up_process(options.threads)
    has_native = native.library() is not None
    forms = [form for form in FORMS if form != "native" or has_native]
    ceiling = measure_ceiling()
    print(f"{cpu_name()}, threads {options.threads}, torch {torch.__version__}")
    print(f"matrix product {ceiling.gflops:.0f} GFLOP/s, copy {ceiling.gbs:.1f} GB/s")
    if not has_native:
        print("no C++ kernels: no compiler, a failed build or QNAS_KERNELS=0")
    print(
        f"{'shape':>12} {'k':>1} {'form':>9} {'forward':>8} {'step':>8} {'saved':>6}"
        f" {'forward GFLOP/s':>16} {'GB/s':>11} {'step GFLOP/s':>13} {'GB/s':>11}"
    )
    rows: list[Row] = []
    verdicts: list[str] = []
    for shape in SMALL_SHAPES if options.small else SHAPES:
        for kernel in KERNELS:
            measured = measure(shape, kernel, forms, options.repeats)
            rows += measured
            for row in measured:
                print(line(row, measured[0], ceiling))
                if not options.small and row.form in BARS:
                    verdicts += judge(row, measured[0])
    print(*verdicts, sep="\n")
    if options.json is not None:
        document = {
            "schema": "qnas.benchmark.quadratic/1",
            "cpu": cpu_name(),
            "threads": options.threads,
            "memory": "fresh" if options.fresh else "kept",
            "torch": torch.__version__,
            "ceiling": asdict(ceiling),
            "rows": [asdict(row) for row in rows],
            "verdicts": verdicts,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure_ceiling() -> Ceiling:
    size, places = 1536, 1 << 25
    a, b, c = (torch.randn(size, size) for _ in range(3))
    source, target = torch.zeros(places), torch.zeros(places)
    product_s = fastest_s(lambda: torch.mm(a, b, out=c))
    copy_s = fastest_s(lambda: target.copy_(source))
    return Ceiling(2 * size**3 / product_s / 1e9, 8 * places / copy_s / 1e9)


def fastest_s(call: Callable[[], object], repeats: int = 7) -> float:
    clock = clock_of_threads()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def clock_of_threads() -> Callable[[], float]:
    """Return the clock for measurements, in seconds.

    With one thread it is the thread's processor time, in which other processes do not count.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


@contextmanager
def chosen(form: str) -> Iterator[Callable[..., Tensor]]:
    """Yield the function of a form, and select the form that it runs."""
    if form == "reference":
        yield quadratic_conv2d_reference
        return
    before = os.environ.get("QNAS_KERNELS")
    os.environ["QNAS_KERNELS"] = "1" if form == "native" else "0"
    try:
        yield quadratic_conv2d
    finally:
        if before is None:
            del os.environ["QNAS_KERNELS"]
        else:
            os.environ["QNAS_KERNELS"] = before


def measure(shape: Shape, kernel: int, forms: list[str], repeats: int) -> list[Row]:
    """Return one row per form, the reference first."""
    batch, channels, size = shape
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(channels, 1, kernel, kernel, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(x)
    clock = clock_of_threads()
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    saved: dict[str, float] = {}
    for form in forms:
        with chosen(form) as function:
            if form != "reference":
                assert choose_form(x, *weights) == form
            saved[form] = multiples_saved(function, x, weights)
    for repeat in range(-2, repeats):
        for form in forms:
            with chosen(form) as function:
                start = clock()
                y = function(x, *weights)
                middle = clock()
                gradients = torch.autograd.grad(y, [x, *weights], grad)
                end = clock()
            del y, gradients
            if repeat >= 0:  # the first two are warm-ups
                times[form].append((middle - start, end - start))
    convolution_gflop = 2 * x.numel() * kernel**2 / 1e9
    pass_gb = 4 * x.numel() / 1e9
    rows = []
    for form in forms:
        forward_s, step_s = (statistics.median(column) for column in zip(*times[form], strict=True))
        rows.append(
            Row(
                form,
                shape,
                kernel,
                1e3 * forward_s,
                1e3 * step_s,
                saved[form],
                3 * convolution_gflop / forward_s,
                2 * pass_gb / forward_s,
                11 * convolution_gflop / step_s,
                5 * pass_gb / step_s,
            )
        )
    return rows


def multiples_saved(function: Callable[..., Tensor], x: Tensor, weights: list[Tensor]) -> float:
    return saved_bytes(lambda: function(x, *weights), weights) / x.nbytes


def line(row: Row, reference: Row, ceiling: Ceiling) -> str:
    shape = "({},{},{})".format(*row.shape)
    if row is reference:
        times = f"{row.forward_ms:5.2f} ms {row.step_ms:5.1f} ms"
    else:
        times = f"{row.forward_ms / reference.forward_ms:8.2f} {row.step_ms / reference.step_ms:8.2f}"
    roofline = (
        f"{row.forward_gflops:9.1f} ({row.forward_gflops / ceiling.gflops:4.0%})"
        f" {row.forward_gbs:4.1f} ({row.forward_gbs / ceiling.gbs:4.0%})"
        f" {row.step_gflops:6.1f} ({row.step_gflops / ceiling.gflops:4.0%})"
        f" {row.step_gbs:4.1f} ({row.step_gbs / ceiling.gbs:4.0%})"
    )
    return f"{shape:>12} {row.kernel} {row.form:>9} {times} {row.saved_x:6.2f} {roofline}"


def judge(row: Row, reference: Row) -> list[str]:
    """Return a line for each bar of a form: PASS or MISS, the value and the bar."""
    forward_bar, step_bar = BARS[row.form][row.kernel]
    checks = {
        "forward": (row.forward_ms / reference.forward_ms, forward_bar),
        "step": (row.step_ms / reference.step_ms, step_bar),
        "saved": (row.saved_x, SAVED_BAR),
    }
    where = "({},{},{})".format(*row.shape) + f" k {row.kernel}"
    return [
        f"{'PASS' if value <= bar else 'MISS'} {row.form:>6} {where:>14} {name:>7} {value:.2f}, bar {bar:.2f}"
        for name, (value, bar) in checks.items()
    ]


if __name__ == "__main__":
    main()
