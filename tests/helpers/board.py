"""A program that plays a board: it "runs" a file and prints, like TFLite's benchmark_model, microseconds.

The time of a file follows from its bytes, so that a test knows it; `--noise` adds that of the run's number. A
log in `--log` counts the runs. At run `--dies-at` the board is gone; at `--hangs-at` it says nothing more.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from subprocess import Popen

WARM_UP = 3  # times the file's time, which the warm-up prints


def time_us(content: bytes) -> float:
    """Return the time that the board takes for a file."""
    return 1000.0 + 7 * len(content)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--dies-at", type=int, default=-1)
    parser.add_argument("--hangs-at", type=int, default=-1)
    parser.add_argument("--says", default="")
    options = parser.parse_args()
    number = len(options.log.read_text().splitlines()) + 1 if options.log.exists() else 1
    with options.log.open("a") as log:
        log.write(f"{options.graph.name}\n")
    print(f"INFO: Loaded model {options.graph}", file=sys.stderr, flush=True)
    if number == options.hangs_at:
        Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # which holds the output open
        time.sleep(600)
    if number == options.dies_at:
        sys.exit("error: device offline")
    took_us = time_us(options.graph.read_bytes()) * (1 + options.noise * random.Random(number).random())
    if options.says:
        print(options.says)
        return
    print(f"count=5 first=9 curr=8 min=7 max=9 avg={WARM_UP * took_us:.6g} std=1")
    print(f"count=50 first=9 curr=8 min=7 max=9 avg={took_us:.6g} std=1")
    print(f"Inference timings in us: Init: 20, First inference: 90, Inference (avg): {took_us:.6g}")


if __name__ == "__main__":
    main()
