"""QuadraNet36-T compared with ConvNeXt-T, Swin-T and HorNet-T on a CPU: ratios of times and memory.

    python benchmarks/networks.py [--threads 1] [--batch 2] [--rounds 5] [--json FILE]

All networks run at 224 px in float32, in channels_last memory, with random weights. A round runs each network
once for inference and once for a training step (forward and backward, no optimiser). Ratios are medians over
rounds of QuadraNet's time divided by the other network's. `kept` is the memory that autograd holds between
forward and backward, without weights. With one thread, times are processor times. The paper's ratios (Table
I) are for a GPU; `gpu.py` has bars for them.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import tiny_networks
from memory import saved_bytes
from torch import nn

from qnas.common.files import write_text
from qnas.common.host import cpu_name
from qnas.training.loop import set_up_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    set_up_process(options.threads)
    torch.manual_seed(0)
    networks = {
        name: build().to(memory_format=torch.channels_last) for name, build in tiny_networks().items()
    }
    rows = measure(networks, options.batch, options.rounds)
    print(f"{cpu_name()}, threads {options.threads}, batch {options.batch} at 224 px, float32")
    print(
        f"{'':>14} {'inference ms':>13} {'ratio':>6} {'step ms':>8} {'ratio':>6} {'kept MB':>8} {'ratio':>6}"
    )
    for name, row in rows.items():
        print(
            f"{name:>14} {row['inference_ms']:13.0f} {row['inference']:6.2f} {row['step_ms']:8.0f}"
            f" {row['step']:6.2f} {row['kept_bytes'] / 1e6:8.0f} {row['kept']:6.2f}"
        )
    if options.json:
        result = {"cpu": cpu_name(), "torch": torch.__version__, "threads": options.threads}
        write_text(
            options.json, json.dumps({**result, "batch": options.batch, "rows": rows}, indent=1) + "\n"
        )


def measure(networks: dict[str, nn.Module], batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return medians by network: milliseconds, kept bytes, and the ratios of QuadraNet's to them."""
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for turn in range(1 + rounds):  # the first round is a warm-up
        for name, network in networks.items():
            network.eval()
            with torch.inference_mode():
                start = clock()
                network(x)
                inference_s = clock() - start
            network.train().zero_grad()
            start = clock()
            network(x).square().mean().backward()
            if turn:
                times[name].append((inference_s, clock() - start))
    kept = {
        name: saved_bytes(partial(network, x), network.parameters()) for name, network in networks.items()
    }
    own, *_ = networks
    rows = {}
    for name in networks:
        pairs = list(zip(times[own], times[name], strict=True))
        inference_s, step_s = (statistics.median(t[i] for t in times[name]) for i in (0, 1))
        rows[name] = {
            "inference_ms": 1e3 * inference_s,
            "inference": statistics.median(a[0] / b[0] for a, b in pairs),
            "step_ms": 1e3 * step_s,
            "step": statistics.median(a[1] / b[1] for a, b in pairs),
            "kept_bytes": kept[name],
            "kept": kept[own] / kept[name],
        }
    return rows


if __name__ == "__main__":
    main()
