"""The QuadraBlock compared with its plain form and the blocks of ConvNeXt and HorNet, interleaved.

    python benchmarks/block.py [--threads 1] [--rounds 15] [--fresh] [--json FILE]

The forms have the same width, kernel 7 and expansion 4, and run on channels_last maps in float32 on the CPU:
naive (three F.conv2d and torch's modules under autograd), lean (qnas with QNAS_KERNELS=0), native (qnas with
its C++ kernels), nested (the mixture of kernels 3, 5 and 7 and expansions 2 and 4), convnext and hornet
(their papers' blocks). The inverted residual stands beside them with kernels 3, 5 and 7 (mbconv3, mbconv5 and
mbconv7), and of torch's own modules (torch3, torch5 and torch7). They take turns in every round. A time is
given as its ratio to the naive form's in the same round, as median over rounds. With one thread, processor
time is measured, which other programs on the machine disturb less. As in a training run
(`training.loop.set_up_process`), memory freed by tensors is kept for reuse. --fresh is the state of any other
process, where the pages of each large tensor are cleared first, which costs the naive form most. The script
prints a table and PASS or MISS for each bar; the exit status is 1 if a bar is missed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hornet import HorNetBlock
from memory import saved_bytes
from torch import Tensor, nn

from qnas.common.files import atomic_path
from qnas.common.host import cpu_name
from qnas.nn.blocks import QuadraBlock, build_block
from qnas.nn.kernels import native
from qnas.nn.kernels.block import nested_channel_half, nested_mixer_half
from qnas.nn.quadratic import quadratic_conv2d_reference
from qnas.spaces.blocks import Place
from qnas.spaces.lower import make_block
from qnas.training.loop import set_up_process

KERNEL, EXPANSION = 7, 4
SHAPES = [(64, 32, 16), (32, 64, 32), (8, 64, 56), (8, 256, 14)]  # batch, channels, height and width

# Upper bounds for each of SHAPES: ratios to the naive form or to the other form, or multiples of x.
BARS = {
    "native step / naive": (0.48, 0.48, 0.52, 0.80),
    "native forward / naive": (0.80, 0.70, 0.80, 1.05),
    "native saved, x": (2.3, 2.3, 2.3, 2.3),
    "native step / convnext": (1.0, 1.0, 1.0, 1.0),
    "native step / hornet": (0.6, 0.6, 0.6, 0.6),
    "native saved / hornet": (0.15, 0.15, 0.15, 0.15),
    "nested step / native": (1.25, 1.25, 1.25, 1.25),
    "nested saved, x": (3.0, 3.0, 3.0, 3.0),
    "lean step / naive": (0.85, 0.85, 0.85, 1.15),
    "lean saved, x": (2.3, 2.3, 2.3, 2.3),
    # the goal is 0.6; with 256 channels, products of matrices are most of the work
    "mbconv3 step / torch3": (0.60, 0.60, 0.60, 0.75),
    "mbconv5 step / torch5": (0.45, 0.45, 0.45, 0.60),
    "mbconv7 step / torch7": (0.40, 0.40, 0.40, 0.55),
    "mbconv5 saved, x": (10.3, 10.3, 10.3, 10.3),
}


class NaiveBlock(QuadraBlock):
    """Three convolutions and torch's modules, under torch's own autograd."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (conv.weight for conv in (self.conv_a, self.conv_b, self.conv_c))
        x = x + quadratic_conv2d_reference(self.norm1(x), *weights)
        y: Tensor = x + self.project(self.act(self.expand(self.norm2(x))))
        return y


class NestedBlock(QuadraBlock):
    """The largest block's weights with shares of all kernels and expansions, which get gradients too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, KERNEL, EXPANSION)
        self.shares = nn.Parameter(torch.full((3,), 1 / 3))
        self.expansions = nn.Parameter(torch.full((2,), 1 / 2))  # 2 and 4

    def forward(self, x: Tensor) -> Tensor:
        mixer, channels, eps = self.halves()
        x = nested_mixer_half(x, *mixer, self.shares, (3, 5, 7), eps=eps)
        half = self.expand.out_channels // 2
        gates = torch.cat([torch.ones(half), self.expansions[1].expand(half)])
        return nested_channel_half(x, *channels, gates, self.expansions.sum(), eps=eps)


class ConvNeXtBlock(nn.Module):
    """x + scale . PW2(GELU(PW1(LN(DW_7(x))))), arXiv 2201.03545, figure 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, EXPANSION * channels)
        self.project = nn.Linear(EXPANSION * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # (B, H, W, C), a view
        rows = self.scale * self.project(nn.functional.gelu(self.expand(rows)))
        return x + rows.permute(0, 3, 1, 2)


def mbconv(channels: int, kernel: int, *, is_stock: bool = False) -> nn.Module:
    place = Place(channels, channels, 1, 1, "batchnorm", "relu6")
    block = build_block(make_block("block", "mbconv", place, kernel=kernel, expansion=EXPANSION))
    if is_stock:
        hidden = EXPANSION * channels
        stock = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        block.set_submodule("depthwise", stock)
    return block


FORMS: dict[str, Callable[[int], nn.Module]] = {
    "naive": lambda channels: NaiveBlock(channels, KERNEL, EXPANSION),
    "lean": lambda channels: QuadraBlock(channels, KERNEL, EXPANSION),
    "native": lambda channels: QuadraBlock(channels, KERNEL, EXPANSION),
    "nested": NestedBlock,
    "convnext": ConvNeXtBlock,
    "hornet": lambda channels: HorNetBlock(channels, order=3),
    "mbconv3": lambda channels: mbconv(channels, 3),
    "torch3": lambda channels: mbconv(channels, 3, is_stock=True),
    "mbconv5": lambda channels: mbconv(channels, 5),
    "torch5": lambda channels: mbconv(channels, 5, is_stock=True),
    "mbconv7": lambda channels: mbconv(channels, 7),
    "torch7": lambda channels: mbconv(channels, 7, is_stock=True),
}
NATIVE = ("native", "nested", "mbconv3", "mbconv5", "mbconv7")
ROOFED = ("naive", "lean", "native", "nested")  # with the operations of a QuadraBlock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fresh", action="store_true", help="memory as in a process that just started")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.fresh:
        torch.set_num_threads(options.threads)
    else:
        set_up_process(options.threads)
    names = [name for name in FORMS if name not in NATIVE or native.library() is not None]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    peak = {"GFLOP/s": measure_gflops(clock), "GB/s": measure_bandwidth(clock)}
    print(f"{cpu_name()}, threads {options.threads}; in this run a product of matrices reaches")
    print(f"{peak['GFLOP/s']:.0f} GFLOP/s and a copy {peak['GB/s']:.1f} GB/s")
    header = f"{'shape':>13} {'form':>11} {'fwd ms':>7} {'step ms':>8} {'fwd':>6} {'step':>6}"
    print(f"{header} {'saved':>6} {'GFLOP/s':>8} {'of peak':>8} {'GB/s':>6} {'of peak':>8}")
    rows, verdicts = [], []
    for i, shape in enumerate(SHAPES):
        measured = measure(shape, names, options.rounds, clock)
        for name, row in measured.items():
            if name in ROOFED:
                row |= roofline(shape, row["step_ms"])
            print(line(shape, name, row, peak))
            rows.append({"shape": shape, "form": name, **row})
        verdicts += [verdict(shape, bar, most[i], measured) for bar, most in BARS.items()]
    print()
    for found in verdicts:
        print("{passed:4}  {shape!s:>13}  {bar:24} {value:6} at most {most}".format(**found))
    if options.json:
        result = {"cpu": cpu_name(), "torch": torch.__version__, "threads": options.threads}
        result |= {"memory": "fresh" if options.fresh else "kept"}
        result |= {"peak": peak, "rows": rows, "bars": verdicts}
        with atomic_path(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(found["passed"] == "MISS" for found in verdicts))


def measure(
    shape: tuple[int, int, int], names: list[str], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Return medians by form: milliseconds, ratios to the naive form, and saved multiples of x."""
    batch, channels, size = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.randn_like(x)
    blocks = {name: FORMS[name](channels).to(memory_format=torch.channels_last) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(1 + rounds):  # the first round is a warm-up
        for name in names if turn % 2 else reversed(names):
            block = blocks[name]
            block.zero_grad()
            x.grad = None
            with kernels(name):
                start = clock()
                y = block(x)
                middle = clock()
                y.backward(grad)
                end = clock()
            del y
            if turn:
                times[name].append((middle - start, end - start))
    results = {}
    for name in names:
        with kernels(name):
            saved = saved_multiples(blocks[name], x)
        forward, step = (statistics.median(t[i] for t in times[name]) for i in (0, 1))
        pairs = list(zip(times[name], times["naive"], strict=True))
        results[name] = {
            "forward_ms": 1e3 * forward,
            "step_ms": 1e3 * step,
            "forward": statistics.median(own[0] / naive[0] for own, naive in pairs),
            "step": statistics.median(own[1] / naive[1] for own, naive in pairs),
            "saved": saved,
        }
    return results


@contextmanager
def kernels(form: str) -> Iterator[None]:
    """Let qnas use its C++ kernels only in the native forms."""
    before = os.environ.pop("QNAS_KERNELS", None)
    if form not in NATIVE:
        os.environ["QNAS_KERNELS"] = "0"
    try:
        yield
    finally:
        os.environ.pop("QNAS_KERNELS", None)
        if before is not None:
            os.environ["QNAS_KERNELS"] = before


def saved_multiples(block: nn.Module, x: Tensor) -> float:
    """Return the memory that autograd keeps for the backward pass, without parameters, in multiples of x."""
    return saved_bytes(lambda: block(x), block.parameters()) / x.untyped_storage().nbytes()


def roofline(shape: tuple[int, int, int], step_ms: float) -> dict[str, float]:
    """Return the rates of a QuadraBlock's training step: its least work, without recomputation, by its time.

    Operations are those of all convolutions, three times (forward and both gradients). Bytes: each half reads
    its input and writes its output, then reads the input and a gradient and writes a gradient.
    """
    batch, channels, size = shape
    places = batch * size * size
    macs = places * channels * (3 * KERNEL**2 + 2 * EXPANSION * channels)
    moved = 2 * 5 * 4 * places * channels
    return {"gflops": 3 * 2 * macs / step_ms / 1e6, "gbytes": moved / step_ms / 1e6}


def measure_gflops(clock: Callable[[], float], size: int = 1024, repeats: int = 9) -> float:
    """Return the GFLOP/s of a float32 product of square matrices, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2e-9 * size**3 / _best(lambda: torch.mm(a, b), clock, repeats)


def measure_bandwidth(clock: Callable[[], float], megabytes: int = 256, repeats: int = 9) -> float:
    """Return the GB/s (read and written) of a copy larger than the caches, the best of several."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    return 2e-9 * 4 * source.numel() / _best(lambda: target.copy_(source), clock, repeats)


def _best(run: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)


def line(shape: tuple[int, int, int], name: str, row: dict[str, float], peak: dict[str, float]) -> str:
    text = f"{shape!s:>13} {name:>11} {row['forward_ms']:7.2f} {row['step_ms']:8.2f}"
    text += f" {row['forward']:6.2f} {row['step']:6.2f} {row['saved']:6.2f}"
    if "gflops" in row:
        text += f" {row['gflops']:8.1f} {row['gflops'] / peak['GFLOP/s']:8.0%}"
        text += f" {row['gbytes']:6.2f} {row['gbytes'] / peak['GB/s']:8.0%}"
    return text


def verdict(
    shape: tuple[int, int, int], bar: str, most: float, measured: dict[str, dict[str, float]]
) -> dict[str, object]:
    """Compare a bar, `form figure / other` or `form figure, x`, with the measurement."""
    form, figure = bar.split()[0], bar.split()[1].rstrip(",")
    if form not in measured:
        return {"passed": "NONE", "shape": shape, "bar": bar, "value": None, "most": most}
    value = measured[form][figure]
    other = bar.rpartition(" / ")[2] if " / " in bar else "naive"
    if other != "naive":
        value /= measured[other][figure]
    passed = "PASS" if value <= most else "MISS"
    return {"passed": passed, "shape": shape, "bar": bar, "value": round(value, 3), "most": most}


if __name__ == "__main__":
    main()
