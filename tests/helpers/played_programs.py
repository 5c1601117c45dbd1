"""Programs of other machines, played: adb, ssh, scp and trtexec, which print a time as the real ones do.

The lines are those of TFLite's benchmark_model, of OpenVINO's benchmark_app (2022 and newer; -api sync: 2021)
and of TensorRT 8 to 10.
"""

import os
import sys
from pathlib import Path

_BENCHMARK_MODEL = """\
count=12 first=21000 curr=19000 min=18000 max=21000 avg=19500 std=900
count=50 first=18100 curr=18000 min=17900 max=18400 avg=18050.5 std=90
Inference timings in us: Init: 5000, First inference: 21000, Warmup (avg): 19500, Inference (avg): 18050.5
"""
_TRTEXEC = """\
[I] Latency: min = 1.2 ms, max = 1.9 ms, mean = 1.3 ms, median = 1.29 ms, percentile(90%) = 1.4 ms
[I] GPU Compute Time: min = 1.1 ms, max = 1.8 ms, mean = 1.2 ms, median = 1.19 ms, percentile(90%) = 1.3 ms
"""
_BENCHMARK_APP = """\
[ INFO ] Latency:
[ INFO ]    Median:           5.17 ms
[ INFO ]    Average:          5.24 ms
"""
_BENCHMARK_APP_2021 = "Count:      204 iterations\nDuration:   10066.76 ms\nLatency:    48.9 ms\n"


def write_programs(folder: Path) -> None:
    """Write the programs into a folder for PATH. Each takes the file that it copies from this machine."""
    folder.mkdir(parents=True)
    for name in ("adb", "ssh", "scp", "trtexec"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n', encoding="utf-8")
        path.chmod(0o755)


def main(program: str, *words: str) -> None:
    """Play a program."""
    if program == "scp" or words[0] == "push":
        assert os.path.getsize(words[-2]) > 0, words
        return
    shown = " ".join(words)
    if program == "trtexec":
        (onnx,) = (word.removeprefix("--onnx=") for word in words if word.startswith("--onnx="))
        assert os.path.getsize(onnx) > 0, words
        print(_TRTEXEC)
    elif program == "adb":
        assert "benchmark_model" in shown, words
        print(_BENCHMARK_MODEL)
    else:
        print(_BENCHMARK_APP_2021 if "-api sync" in shown else _BENCHMARK_APP)


if __name__ == "__main__":
    main(*sys.argv[1:])
