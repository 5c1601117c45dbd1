"""The quadratic operator and QuadraNet36-T on a CUDA GPU, compared with bars: PASS or MISS per line.

    python benchmarks/gpu.py [--repeats 30] [--kernels 7] [--batch 64] [--only operator] [--json gpu.json]

Operator, at the stages of the paper's T size: the forward pass is compared with the time to read x and write
y at the bandwidth of a copy. Forward and backward ("step") are compared with three F.conv2d under torch's
autograd (cuDNN or torch's depthwise kernels, as torch chooses). "roof" is the share of the tighter of two
limits: this bandwidth, and the float32 rate of a matrix product without TF32. From k 5 on, arithmetic is the
tighter limit, and 70% of the bandwidth is beyond it.

Networks, at 224 px: images per second, compared with ConvNeXt-T and Swin-T of torchvision and HorNet-T of
hornet.py, and the peak memory of a training step. Weights are random; none are downloaded.

Forms take turns, and medians are compared. Before each call, 1 GiB is written. This empties the L2 cache and
lets the CPU run ahead, so that the GPU's time is measured and not the launch.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from builders import network_builders
from torch import Tensor, nn

from qnas.common.files import write_text
from qnas.nn.kernels.triton_quadratic import available, quadratic_backward, quadratic_forward
from qnas.nn.quadratic import quadratic_conv2d

NETWORKS = ("QuadraNet36-T", "ConvNeXt-T", "Swin-T", "HorNet-T")
STAGES = [(64, 56), (128, 28), (256, 14), (512, 7)]  # (channels, height)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

BANDWIDTH_SHARE = 0.70  # least share of the bandwidth in the forward pass
STEP_SHARE = 0.40  # largest share of the naive training step's time
# the paper's Table I: least ratio of QuadraNet36-T's images per second to the other network's
THROUGHPUT_RATIOS = {"ConvNeXt-T": 1.0, "Swin-T": 1.5, "HorNet-T": 1.57}
MEMORY_SHARES = {"Swin-T": 0.70, "HorNet-T": 0.70}  # largest share of the other network's training memory

DEVICE = "cuda"
FLUSHED_BYTES = 1 << 30
COPIED_BYTES = 1 << 30
PRODUCT_SIZE = 8192

Form = Callable[[], object]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernels", type=int, nargs="+", default=[7])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", choices=["operator", "networks"])
    parser.add_argument("--json", type=Path, help="write what was measured to this file, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none")
    if not available():
        sys.exit("benchmarks/gpu.py needs triton, which is not installed here")
    bandwidth, arithmetic = measure_machine(options.repeats)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: copies at {bandwidth / 1e9:.0f} GB/s, float32 products at")
    print(f"{arithmetic / 1e12:.1f} TFLOP/s\n")
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "repeats": options.repeats,
        "batch": options.batch,
        "copy_bytes_per_s": bandwidth,
        "float32_flops_per_s": arithmetic,
    }
    bars: list[Row] = []
    if options.only != "networks":
        result["operator"] = operator_rows(options, bandwidth, arithmetic)
        bars += operator_bars(result["operator"])
    if options.only != "operator":
        result["networks"] = network_rows(options)
        bars += network_bars(result["networks"])
    print()
    for bar in bars:
        verdict = "PASS" if bar["passed"] else "MISS"
        print(f"{verdict}  {bar['what']}: {bar['value']:.2f}, bar {bar['bar']:.2f}")
    result["bars"] = bars
    if options.json:
        write_text(options.json, json.dumps(result, indent=2) + "\n")


# Timing


def time_in_turns(forms: dict[str, Form], repeats: int) -> dict[str, float]:
    """Return each form's median milliseconds, without the first calls, which compile."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
    for form in forms.values():
        for _ in range(3):
            form()
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start, end = new_event(), new_event()
            flushed.zero_()
            start.record()
            form()
            end.record()
            spans[name].append((start, end))
        torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in pairs) for name, pairs in spans.items()}


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def measure_machine(repeats: int) -> tuple[float, float]:
    """Return bytes per second of a copy (read and written) and float32 operations per second of a product."""
    source = torch.ones(COPIED_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    factor = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=DEVICE)
    with full_float32():
        forms: dict[str, Form] = {"copy": lambda: target.copy_(source), "product": lambda: factor @ factor}
        ms = time_in_turns(forms, repeats)
    return 2e3 * COPIED_BYTES / ms["copy"], 2e3 * PRODUCT_SIZE**3 / ms["product"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn off TF32 in float32 products and convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# The operator


def operator_rows(options: argparse.Namespace, bandwidth: float, arithmetic: float) -> list[Row]:
    """Time the operator at every stage, in both dtypes and layouts, and print a table."""
    print("operator: ms; shares of the bandwidth, of the roof, and of the naive form")
    head = ["forward", "bandw.", "roof", "naive", "share", "step", "naive", "share", "qnas", "compiled"]
    print(f"{'shape':>15} {'k':>2} {'type':>8} {'layout':>13}", *(f"{h:>8}" for h in head))
    rows = []
    for kernel in options.kernels:
        for channels, height in STAGES:
            for dtype in DTYPES:
                for layout in ("channels_last", "contiguous"):
                    shape = (options.batch, channels, height, height)
                    with full_float32():
                        ms = time_operator(shape, kernel, DTYPES[dtype], layout, options.repeats)
                    elements = options.batch * channels * height**2
                    memory_ms = 2e3 * elements * DTYPES[dtype].itemsize / bandwidth
                    arithmetic_ms = 1e3 * elements * (6 * kernel**2 + 2) / arithmetic
                    shares = {
                        "of_bandwidth": memory_ms / ms["forward"],
                        "of_roof": max(memory_ms, arithmetic_ms) / ms["forward"],
                        "forward_of_naive": ms["forward"] / ms["naive forward"],
                        "step_of_naive": ms["step"] / ms["naive step"],
                        "qnas_step_of_naive": ms["qnas step"] / ms["naive step"],
                        "compiled_step_of_naive": ms["compiled step"] / ms["naive step"],
                    }
                    row = {"shape": shape, "kernel": kernel, "dtype": dtype, "layout": layout, "ms": ms}
                    rows.append({**row, **shares})
                    print_operator(rows[-1])
    return rows


def print_operator(row: Row) -> None:
    ms = row["ms"]
    cells = [ms["forward"], row["of_bandwidth"], row["of_roof"], ms["naive forward"], row["forward_of_naive"]]
    cells += [ms["step"], ms["naive step"], row["step_of_naive"]]
    cells += [row["qnas_step_of_naive"], row["compiled_step_of_naive"]]
    shape = "({},{},{},{})".format(*row["shape"])
    place = f"{shape:>15} {row['kernel']:>2} {row['dtype']:>8} {row['layout']:>13}"
    print(place, *(f"{cell:8.3f}" for cell in cells), flush=True)


def time_operator(
    shape: tuple[int, int, int, int], kernel: int, dtype: torch.dtype, layout: str, repeats: int
) -> dict[str, float]:
    """Return median milliseconds of the kernels alone, of qnas's operator and of the naive form."""
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, grad = (
        torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=memory) for _ in range(2)
    )
    weights = [
        torch.randn(shape[1], 1, kernel, kernel, device=DEVICE, dtype=dtype) / kernel for _ in range(3)
    ]
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    torch.compiler.reset()
    compiled = torch.compile(quadratic_conv2d)

    def kernels() -> object:
        return quadratic_forward(x, *weights), quadratic_backward(grad, x, *weights)

    def step(operator: Callable[..., Tensor]) -> Form:
        return lambda: torch.autograd.grad(operator(*leaves), leaves, grad)

    forms: dict[str, Form] = {
        "forward": lambda: quadratic_forward(x, *weights),
        "naive forward": lambda: naive(x, *weights),
        "step": kernels,
        "naive step": step(naive),
        "qnas step": step(quadratic_conv2d),
        "compiled step": step(compiled),
        "naive compiled step": step(torch.compile(naive)),
    }
    return time_in_turns(forms, repeats)


def naive(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor) -> Tensor:
    """Compute the operator in the obvious way. qnas's reference may be tuned."""
    padding, groups = w_a.shape[-1] // 2, x.shape[1]
    a, b, c = (F.conv2d(x, w, padding=padding, groups=groups) for w in (w_a, w_b, w_c))
    return a * b + c


def operator_bars(rows: list[Row]) -> list[Row]:
    bars = []
    for row in rows:
        shape = "({},{},{},{})".format(*row["shape"])
        where = f"{shape} k {row['kernel']} {row['dtype']} {row['layout']}"
        bars.append(
            at_least(f"forward, share of the bandwidth, {where}", row["of_bandwidth"], BANDWIDTH_SHARE)
        )
        for what, key in (
            ("kernels", "step_of_naive"),
            ("qnas, eager", "qnas_step_of_naive"),
            ("qnas, compiled", "compiled_step_of_naive"),
        ):
            bars.append(at_most(f"step, share of naive, {what}, {where}", row[key], STEP_SHARE))
    return bars


# Whole networks


def network_rows(options: argparse.Namespace) -> list[Row]:
    """Measure inference and training of each network at 224 px, and print a table."""
    print(
        f"\nnetworks at 224 px, batch {options.batch}, channels_last; float32 with TF32, bfloat16 by autocast"
    )
    print(f"{'':>14} {'type':>8} {'images/s':>9} {'training GB':>12}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    x = torch.randn(options.batch, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
    rows = []
    builders = tiny_networks()
    for dtype in DTYPES:
        memory = {name: training_bytes(build, x, DTYPES[dtype]) for name, build in builders.items()}
        networks = {
            name: build().to(DEVICE).to(memory_format=torch.channels_last).eval()
            for name, build in builders.items()
        }
        forms = {name: inference(network, x, DTYPES[dtype]) for name, network in networks.items()}
        ms = time_in_turns(forms, options.repeats)
        for name in builders:
            rate = 1e3 * options.batch / ms[name]
            rows.append(
                {"network": name, "dtype": dtype, "images_per_s": rate, "training_bytes": memory[name]}
            )
            print(f"{name:>14} {dtype:>8} {rate:9.0f} {memory[name] / 1e9:12.2f}", flush=True)
        del networks, forms
    return rows


def tiny_networks() -> dict[str, Callable[[], nn.Module]]:
    """Return functions that build the networks of the T size with random weights."""
    builders = network_builders("torchvision")
    return {name: builders[name] for name in NETWORKS}


def inference(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Form:
    @torch.inference_mode()
    def run() -> object:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return network(x)

    return run


def training_bytes(build: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype) -> int:
    """Return the peak memory of a training step: weights, gradients, activations and workspaces."""
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()
    network = build().to(DEVICE).to(memory_format=torch.channels_last).train()
    for _ in range(2):  # the first step allocates the gradients
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = network(x).float().square().mean()
        loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - others


def network_bars(rows: list[Row]) -> list[Row]:
    bars = []
    for dtype in DTYPES:
        here = {row["network"]: row for row in rows if row["dtype"] == dtype}
        own = here["QuadraNet36-T"]
        for other, bar in THROUGHPUT_RATIOS.items():
            if other in here:
                ratio = own["images_per_s"] / here[other]["images_per_s"]
                bars.append(at_least(f"images a second, multiple of {other}'s, {dtype}", ratio, bar))
        for other, bar in MEMORY_SHARES.items():
            if other in here:
                share = own["training_bytes"] / here[other]["training_bytes"]
                bars.append(at_most(f"training memory, share of {other}'s, {dtype}", share, bar))
    return bars


def at_least(what: str, value: float, bar: float) -> Row:
    return {"what": what, "value": value, "bar": bar, "passed": value >= bar}


def at_most(what: str, value: float, bar: float) -> Row:
    return {"what": what, "value": value, "bar": bar, "passed": value <= bar}


if __name__ == "__main__":
    main()
