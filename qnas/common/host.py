"""Facts about this machine that latencies depend on, recorded with each measurement."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def cpu_name(info: Path = _CPU_INFO) -> str:
    """Return the processor's name, or its architecture where it has none."""
    return _cpu_fact("model name", info) or platform.processor() or platform.machine()


def cpu_clock(info: Path = _CPU_INFO, clock: Path = _CPU_CLOCK) -> str:
    """Describe the processor's clock: its governor and its present frequency."""
    governor = _read(clock / "scaling_governor").strip()
    khz, highest_khz = (_read(clock / f"scaling_{name}_freq").strip() for name in ("cur", "max"))
    if khz.isdigit() and highest_khz.isdigit():
        speed = f"at {int(khz) / 1e6:.2f} of {int(highest_khz) / 1e6:.2f} GHz"
    else:
        mhz = _cpu_fact("cpu MHz", info)
        speed = f"at {float(mhz) / 1e3:.2f} GHz" if mhz else "not readable"
    return f"clock {f'governed by {governor!r}, ' if governor else ''}{speed}"


def gpu_clock() -> str:
    """Describe the clock of the first NVIDIA GPU: its present and its highest frequency."""
    tool = shutil.which("nvidia-smi")
    query = ["--id=0", "--query-gpu=clocks.sm,clocks.max.sm,persistence_mode", "--format=csv,noheader"]
    if tool is None:
        return "clock not readable"
    done = subprocess.run([tool, *query], capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in done.stdout.split(",")]
    if done.returncode or len(values) != 3:
        return "clock not readable"
    return f"clock at {values[0]} of {values[1]}, persistence mode {values[2]}"


def load() -> str:
    """Describe the load of the machine: its cores, and the load average over a minute."""
    cores = os.cpu_count()
    if not hasattr(os, "getloadavg"):
        return f"{cores} cores"
    return f"{cores} cores, load {os.getloadavg()[0]:.1f}"


def _cpu_fact(key: str, info: Path) -> str:
    for line in _read(info).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # another operating system, or no permission
        return ""
