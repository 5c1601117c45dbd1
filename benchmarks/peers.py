"""qnas beside other tools: the same small task for each, in an environment that this script makes.

    python benchmarks/peers.py [--data digits] [--peers qnas nni ...] [--work DIR] [--own-torch] [--write]

The task: inverted residuals with kernels of 3, 5 and 7, expansions of 2 and 4, or nothing, at eight positions
of a network with fixed stem, widths and head; a limit on its multiply-adds (MACs); images of digits, or of
Fashion-MNIST with --data fashion-mnist:DIR --images 3000. Each tool gets the same images, batches, rates and
epochs of its own supernet, and its user code is what stands between two comments in benchmarks/peers/.

    seconds     processor time on one thread from the start of Python until the network is found
    memory      peak of the process, with the export
    used        MACs of the network by qnas's count, as a share of the limit; above 1 the limit is broken
    accuracy    the network trained alone by one recipe: tools are compared by their architectures alone
    goes on     killed (SIGKILL) at half of its time and started again, it takes less than a whole run
    same        ... and it finds the same network as without the kill
    ONNX        a written file has the network's outputs in onnxruntime

A tool that cannot be installed, or that stops with an error, has a row with its last line. `random` are
networks drawn from the upper tenth below each limit. Environments lie in --work and are made once. They
reuse the torch of this environment where a tool's versions allow it; --own-torch installs it anew, some 6 GB
a tool. A stopped run continues. How long a whole run takes has not been measured.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from experiments import (
    OUT,
    RESULTS,
    Cache,
    Recipe,
    load_images,
    markdown_table,
    percent,
    train_alone,
    write_section,
)
from packaging.requirements import Requirement

from qnas.common import host
from qnas.common.files import write_text
from qnas.data.image_data import ImageData, Split
from qnas.spaces.arch import Arch, make_arch, sample_arch
from qnas.spaces.lower import count_macs, lower, smallest_and_largest
from qnas.spaces.space import SearchSpace, make_space

CODE = Path(__file__).parent / "peers"
SHARES = (0.25, 0.5, 0.75)  # limits, between the fewest and the most MACs of the space
SEEDS = (0, 1, 2)
IMAGES_PX = {"digits": 8, "fashion-mnist": 28}
RANDOM = "random"
WINDOW = 0.9  # random networks have at least this share of the limit
MOST_DRAWS = 100_000
SHARED = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "scikit-learn", "pandas", "matplotlib")
POLL_S = 0.02
GOES_ON = 0.85  # a run that goes on takes at most this share of a whole one's processor time
TOLERANCE = 1e-3  # of outputs, relative to the largest


@dataclass(frozen=True)
class Peer:
    """A tool: what it is, what pip installs (nothing: this environment), and its program if there is one."""

    what: str
    packages: tuple[str, ...] = ()
    program: str = ""


PEERS = {
    "qnas": Peer("qnas", program="with_qnas.py"),
    "nni": Peer(
        "NNI, one-shot Proxyless",
        # nni 3.0 names none of the others; this Lightning imports pkg_resources, which later setuptools lack,
        # and np.Inf, which later numpy lacks
        ("nni==3.0", "pytorch_lightning==1.9.5", "torchmetrics<1", "setuptools<81", "numpy<2"),
        "with_nni.py",
    ),
    # it imports requests, huggingface_hub and torchprofile, and requires none of them
    "modelopt": Peer(
        "NVIDIA ModelOpt, AutoNAS",
        ("nvidia-modelopt", "requests", "huggingface_hub", "torchprofile==0.0.4"),
        "with_modelopt.py",
    ),
    "archai": Peer("Archai, evolutionary Pareto search", ("archai==1.0.0",), "with_archai.py"),
    "plinio": Peer("PLiNIO", ("plinio",)),
    "naslib": Peer("NASLib", ("naslib",)),
}


@dataclass(frozen=True)
class Length:
    """The length of a search and its rates, the same for all tools."""

    warmup_epochs: int = 5
    search_epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 2e-3
    arch_learning_rate: float = 0.1
    evaluations: int = 200  # of networks, where a tool evaluates them one by one after the training


@dataclass(frozen=True)
class Ended:
    """How a program ended: what it printed, its peak memory, and the last line of its error, if any."""

    lines: tuple[Mapping[str, Any], ...]
    peak_mb: float
    error: str

    def value(self, key: str) -> Any:
        """Return what was printed by this name, None if nothing was."""
        return next((line[key] for line in self.lines if key in line), None)


# ---- the task


def task_space(data: ImageData) -> SearchSpace:
    """Return the space of all tools. The programs of the peers write the same one in their own words."""
    return make_space(
        "peers",
        input={"channels": data.channels, "resolution_px": data.resolution_px},
        norm="batchnorm",
        activation="relu6",
        stem={"channels": 16, "kernel": 3, "stride": stem_stride(data), "activation": True},
        transition="block",
        candidates=[{"block": "mbconv", "kernel": [3, 5, 7], "expansion": [2, 4]}, {"block": "identity"}],
        stages=[
            {"channels": 16, "positions": 2, "stride": 1},
            {"channels": 32, "positions": 3, "stride": 2},
            {"channels": 64, "positions": 3, "stride": 2},
        ],
        head={"channels": 128, "classes": len(data.classes)},
    )


def stem_stride(data: ImageData) -> int:
    return 1 if data.resolution_px <= 8 else 2


def macs_of(space: SearchSpace, arch: Arch) -> int:
    return count_macs(lower(space, arch))


def limit_at(space: SearchSpace, share: float) -> int:
    """Return the limit at a share of the way from the fewest to the most MACs."""
    least, most = (macs_of(space, arch) for arch in smallest_and_largest(space))
    return round(least + share * (most - least))


def random_network(space: SearchSpace, max_macs: int, seed: int) -> Arch:
    """Draw networks until one is within the limit and near it."""
    rng = np.random.default_rng(seed)
    for _ in range(MOST_DRAWS):
        arch = sample_arch(space, rng)
        if WINDOW * max_macs <= macs_of(space, arch) <= max_macs:
            return arch
    raise AssertionError(f"no network of {WINDOW:g} to 1 times {max_macs} MACs in {MOST_DRAWS} draws")


def write_images(data: ImageData, path: Path) -> None:
    """Write the images and labels of all splits for the programs."""

    def both(split: Split, name: str) -> dict[str, np.ndarray[Any, Any]]:
        images = split.read(torch.arange(len(split))).contiguous()
        return {f"{name}_images": images.numpy(), f"{name}_labels": split.labels.numpy()}

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **both(data.train, "train"), **both(data.heldout, "heldout"), **both(data.test, "test"))


# ---- environments


def make_environment(peer: Peer, folder: Path, *, own_torch: bool) -> tuple[Path, str]:
    """Make a peer's environment where it is missing; return its Python, and pip's last error line if any."""
    if not peer.packages:
        return Path(sys.executable), ""
    python, done = folder / "bin" / "python", folder / "installed.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == list(peer.packages):
        return python, ""
    venv.create(folder, with_pip=False, clear=True)
    packages = list(peer.packages)
    if own_torch:
        packages += SHARED
    else:
        shared = folder / "shared"
        link_shared(SHARED, shared)
        write_text(site_packages(folder) / "shared.pth", f"{shared.resolve()}\n")
    # this environment's pip: it runs in the other one, and need not be installed there
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    command += ["install", "--quiet", *packages]
    print(f"pip install {' '.join(packages)}", flush=True)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return python, last_line(ended.stderr)
    write_text(done, json.dumps(list(peer.packages)))
    return python, ""


def site_packages(folder: Path) -> Path:
    """Return where an environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))


def link_shared(names: Sequence[str], folder: Path) -> None:
    """Link packages of this environment, with all that they need, into a folder for a path file.

    The folder has nothing else of this environment: tools import what they find, and would find extras.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for found in with_requirements(names):
        for top in sorted({file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}):
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))).resolve())


def with_requirements(names: Sequence[str]) -> list[Distribution]:
    """Return installed distributions with all that they require. One that is not installed is left out."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen = set()
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        # its own setuptools, as tools want different ones
        if name == "setuptools" or (name, *sorted(one.extras)) in seen:
            continue
        seen.add((name, *sorted(one.extras)))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for needed in map(Requirement, found[name].requires or ()):
            if any(not needed.marker or needed.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                waiting.append(needed)
    return list(found.values())


# ---- programs


def run_program(
    python: Path, program: str, task: Path, *, most_s: float, kill_at_s: float | None = None
) -> Ended:
    """Run a peer's program on a task, and kill it at this processor time, if given.

    A program that takes more than `most_s` seconds is killed too, which is an error.
    """
    out, err = task.with_suffix(".out"), task.with_suffix(".err")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if python != Path(sys.executable):
        environment.pop("PYTHONPATH", None)
    start = time.monotonic()
    error, peak_mb = "", 0.0
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(
            [str(python), str(CODE / program), str(task)],
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=task.parent,
        )
        try:
            while child.poll() is None:
                peak_mb = max(peak_mb, peak_memory_mb(child.pid))
                if kill_at_s is not None and processor_s(child.pid) >= kill_at_s:
                    child.kill()
                if time.monotonic() - start > most_s:
                    child.kill()
                    error = f"killed after {most_s / 60:.0f} minutes"
                time.sleep(POLL_S)
        finally:  # after Ctrl-C too: no program is left running
            child.kill()
            child.wait()
    if child.returncode and not error:
        error = last_line(err.read_text(encoding="utf-8", errors="replace")) or f"exit {child.returncode}"
    return Ended(printed(out.read_text(encoding="utf-8", errors="replace")), peak_mb, error)


def processor_s(pid: int) -> float:
    """Return the processor time of a process so far; 0 once it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak_memory_mb(pid: int) -> float:
    """Return the peak of a process's resident memory so far; 0 once it has ended.

    Not what wait4 and getrusage say: that begins with the memory of the process that started it.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)


def printed(text: str) -> tuple[Mapping[str, Any], ...]:
    """Return the JSON objects among the lines of an output: tools print much else."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return tuple(found)


def last_line(text: str) -> str:
    """Return the last line with text, at most 160 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def user_lines(program: str) -> int:
    """Count the lines of user code: between its two comments, neither empty nor a comment."""
    text = (CODE / program).read_text(encoding="utf-8")
    _, begin, rest = text.partition("# user code\n")
    code, end, _ = rest.partition("# end of user code\n")
    assert begin, program
    assert end, program
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in code.splitlines())


def onnx_error(path: Path) -> str:
    """Return why a file has not the outputs that were written beside it, an empty text if it has."""
    try:
        with np.load(path.with_suffix(".npz")) as arrays:
            images, wanted = arrays["images"], arrays["outputs"]
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {session.get_inputs()[0].name: images})
    except Exception as error:  # of onnxruntime, which has a type for each of its codes
        return last_line(str(error))
    off = float(np.abs(outputs - wanted).max() / np.abs(wanted).max())
    return "" if off <= TOLERANCE else f"outputs differ by {off:.1%}"


# ---- figures


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    data: ImageData
    spec: str
    space: SearchSpace
    length: Length
    images: Path
    work: Path
    own_torch: bool
    most_s: float

    def parts(self, name: str) -> dict[str, Any]:
        """Return all on which a peer's figures depend, but for the limit and the seed."""
        peer = PEERS[name]
        code = b"".join((CODE / file).read_bytes() for file in ("harness.py", peer.program) if peer.program)
        return {
            "peer": name,
            "packages": list(peer.packages),
            "code": hashlib.sha256(code).hexdigest()[:16],
            "data": self.data.digest,
            "kept": len(self.data.train_and_heldout),
            "space": self.space.digest,
            "length": asdict(self.length),
        }

    def task(self, folder: Path, max_macs: int, seed: int, *, resume: bool) -> Path:
        """Write a task beside the folder of its run."""
        (mean,), (std,) = set(self.data.mean), set(self.data.std)
        values = {
            "data": str(self.images.resolve()),
            "folder": str(folder.resolve()),
            "mean": mean,
            "std": std,
            "px": self.data.resolution_px,
            "channels": self.data.channels,
            "stem_stride": stem_stride(self.data),
            "max_macs": max_macs,
            **asdict(self.length),
            "seed": seed,
            "resume": resume,
        }
        path = folder.with_name(f"{folder.name}{'-again' * resume}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values, indent=1))
        return path


def searched(name: str, python: Path, setting: Setting, share: float, seed: int, known: Cache) -> None:
    """Search with a tool for a limit, unless the result is known."""
    parts = setting.parts(name) | {"what": "search", "share": share, "seed": seed}
    if known.get(parts) is not None:
        return
    max_macs = limit_at(setting.space, share)
    folder = fresh(setting.work / "runs" / f"{setting.data.name}-{name}-{share:g}-{seed}")
    task = setting.task(folder, max_macs, seed, resume=False)
    ended = run_program(python, PEERS[name].program, task, most_s=setting.most_s)
    found: dict[str, Any] = {"limit": max_macs, "peak_mb": ended.peak_mb, "error": ended.error}
    if (network := ended.value("found")) is not None:
        arch = make_arch(setting.space, tuple(network["blocks"]))
        found |= {
            "blocks": network["blocks"],
            "macs": macs_of(setting.space, arch),
            "own_macs": network["macs"],
            "seconds": ended.value("seconds"),
            "wall_s": ended.value("wall_s"),
        }
    if (written := ended.value("written")) is not None:
        found |= {"onnx_by": written["by"], "onnx_error": onnx_error(Path(written["path"]))}
    known.put(parts, found)
    print(f"{name}, {share:g}, seed {seed}: {json.dumps(found)}", flush=True)


def resumed(name: str, python: Path, setting: Setting, share: float, seed: int, known: Cache) -> None:
    """Kill a tool at half of its known time, start it again, and compare, unless the result is known."""
    parts = setting.parts(name) | {"what": "resume", "share": share, "seed": seed}
    whole = known.get(setting.parts(name) | {"what": "search", "share": share, "seed": seed})
    if known.get(parts) is not None or whole is None or "blocks" not in whole:
        return
    folder = fresh(setting.work / "runs" / f"{setting.data.name}-{name}-{share:g}-{seed}-killed")
    first, again = (setting.task(folder, whole["limit"], seed, resume=resume) for resume in (False, True))
    killed_s = whole["seconds"] / 2
    program = PEERS[name].program
    killed = run_program(python, program, first, most_s=setting.most_s, kill_at_s=killed_s)
    assert killed.value("found") is None, f"{name} had ended before it was killed"
    ended = run_program(python, program, again, most_s=setting.most_s)
    network = ended.value("found")
    found: dict[str, Any] = {"killed_s": killed_s, "whole_s": whole["seconds"], "error": ended.error}
    if network is not None:
        found |= {"seconds": ended.value("seconds"), "same": network["blocks"] == whole["blocks"]}
    known.put(parts, found)
    print(f"{name}, resumed: {json.dumps(found)}", flush=True)


def fresh(folder: Path) -> Path:
    """Return a folder for a run that nothing is in: a former one is moved away."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-{time.time_ns()}"))
    return folder


def measure(name: str, setting: Setting, options: argparse.Namespace, known: Cache) -> None:
    """Install a tool and run all its searches. What fails is stored with its error."""
    peer = PEERS[name]
    python, error = make_environment(peer, setting.work / name, own_torch=setting.own_torch)
    if not error and not peer.program:
        error = "installed, but there is no program for it here"
    if error:
        if known.get(setting.parts(name) | {"what": "install", "error": error}) is None:
            known.put(setting.parts(name) | {"what": "install", "error": error}, {})
        print(f"{name}: {error}", flush=True)
        return
    for seed in options.seeds:
        for share in options.shares:
            searched(name, python, setting, share, seed, known)
    middle = options.shares[len(options.shares) // 2]
    resumed(name, python, setting, middle, options.seeds[0], known)


def accuracy_of(row: Mapping[str, Any], setting: Setting, recipe: Recipe, seed: int, known: Cache) -> float:
    """Return the accuracy of a network that was found, trained alone."""
    arch = make_arch(setting.space, tuple(row["blocks"]))
    return float(train_alone(setting.space, arch, setting.data, recipe, seed, known)["accuracy"])


# ---- the report


@dataclass(frozen=True)
class Row:
    """The figures of a tool: of its searches by limit, of the kill, and the error if there is one."""

    name: str
    lines: int
    searches: Mapping[float, Sequence[Mapping[str, Any]]]  # by share, each with `accuracy`
    resume: Mapping[str, Any] | None
    error: str

    @property
    def every(self) -> list[Mapping[str, Any]]:
        return [row for rows in self.searches.values() for row in rows]

    @property
    def used(self) -> list[float]:
        return [row["macs"] / row["limit"] for row in self.every]

    @property
    def seconds(self) -> float:
        """The median processor time of a search; 0 for what has none."""
        return statistics.median(row.get("seconds", 0.0) for row in self.every)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(row["accuracy"] for row in self.every)

    @property
    def broken(self) -> int:
        """How many networks are above the limit."""
        return sum(share > 1 for share in self.used)


def row_of(
    name: str, setting: Setting, options: argparse.Namespace, recipe: Recipe, known: Cache, trained: Cache
) -> Row:
    """Collect a tool's figures, and train its networks alone."""
    if name == RANDOM:
        found = {share: random_rows(setting, share, options.seeds) for share in options.shares}
    else:
        parts = setting.parts(name)
        found = {
            share: known.matching({**parts, "what": "search", "share": share}) for share in options.shares
        }
    ended = {
        share: [
            {**row, "accuracy": accuracy_of(row, setting, recipe, row["seed"], trained)}
            for row in rows
            if "blocks" in row and row["seed"] in options.seeds
        ]
        for share, rows in found.items()
    }
    if name == RANDOM:
        return Row(name, 0, ended, None, "")
    errors = [row["error"] for rows in found.values() for row in rows if row["error"]]
    errors += [row["error"] for row in known.matching({"peer": name, "what": "install"})]
    resume = known.matching({**parts, "what": "resume"})
    lines = user_lines(PEERS[name].program) if PEERS[name].program else 0
    return Row(name, lines, ended, resume[-1] if resume else None, errors[-1] if errors else "")


def random_rows(setting: Setting, share: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return random networks near a limit, one for each seed."""
    max_macs = limit_at(setting.space, share)
    rows = []
    for seed in seeds:
        arch = random_network(setting.space, max_macs, seed)
        rows.append(
            {
                "seed": seed,
                "limit": max_macs,
                "blocks": list(arch.choices),
                "macs": macs_of(setting.space, arch),
                "error": "",
            }
        )
    return rows


def cells(row: Row, shares: Sequence[float]) -> list[str]:
    """Return a tool's cells of the table."""
    what = PEERS[row.name].what if row.name in PEERS else "random networks"
    if not row.every:
        return [what, *[""] * (len(shares) + 7), f"`{row.error}`"]
    is_tool = row.name != RANDOM
    peaks = [each["peak_mb"] for each in row.every] if is_tool else []
    return [
        what,
        str(row.lines) if is_tool else "",
        f"{row.seconds:.0f}" if is_tool else "",
        f"{statistics.median(peaks):.0f}" if peaks else "",
        f"{min(row.used):.2f} to {max(row.used):.2f}",
        f"{row.broken} of {len(row.used)}",
        *[accuracies(row.searches[share]) for share in shares],
        resume_cell(row.resume) if is_tool else "",
        onnx_cell(row.every) if is_tool else "",
        f"`{row.error}`" if row.error else "",
    ]


def accuracies(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean accuracy over seeds with its spread."""
    found = [row["accuracy"] for row in rows]
    if not found:
        return ""
    return percent(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else float("nan"))


def resume_cell(resume: Mapping[str, Any] | None) -> str:
    """Say whether a killed search went on, and whether it came to the same network."""
    if resume is None:
        return ""
    if "seconds" not in resume:
        return f"no: `{resume['error']}`"
    goes_on = resume["seconds"] <= GOES_ON * resume["whole_s"]
    return f"{'yes' if goes_on else 'from the start'}, {'the same' if resume['same'] else 'another'} network"


def onnx_cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say who wrote the ONNX files and how many have the network's outputs."""
    written = [row for row in rows if "onnx_by" in row]
    if not written:
        return "none"
    right = sum(not row["onnx_error"] for row in written)
    return f"{right} of {len(rows)}, by `{written[0]['onnx_by']}`"


def own_counts(rows: Sequence[Row]) -> str:
    """Say how the tools' own counts of MACs, which their limits are in, compare with qnas's."""
    texts = []
    for row in rows:
        ratios = [each["own_macs"] / each["macs"] for each in row.every if each.get("own_macs")]
        if ratios and row.name != "qnas":
            texts.append(f"{PEERS[row.name].what} counts {min(ratios):.3f} to {max(ratios):.3f} times")
    return f" By their own counts, {listed(texts)} what qnas counts." if texts else ""


def meaning(rows: Sequence[Row]) -> str:
    """Return one sentence on what the figures mean for a user of qnas, and where it loses."""
    by_name = {row.name: row for row in rows if row.every}
    own = by_name.get("qnas")
    others = [row for row in by_name.values() if row.name in PEERS and row.name != "qnas"]
    if own is None or not others:
        return "For a user: there is nothing to compare yet."
    clauses = [
        f"qnas broke the limit in {own.broken} of {len(own.used)} searches, "
        + listed([f"{PEERS[row.name].what} in {row.broken} of {len(row.used)}" for row in others])
    ]
    figures = (
        ("lines of user code", lambda row: row.lines, 1, "{:.0f}"),
        ("seconds", lambda row: row.seconds, 1, "{:.0f}"),
        ("peak MB", lambda row: statistics.median(each["peak_mb"] for each in row.every), 1, "{:.0f}"),
        ("mean accuracy", lambda row: row.accuracy, -1, "{:.1%}"),
    )
    wins, losses = [], []
    for what, figure, sign, form in figures:
        best = min(others, key=lambda row, figure=figure, sign=sign: sign * figure(row))
        ends = [form.format(figure(row)) for row in (own, best)]
        text = f"{what} ({ends[0]} against {ends[1]} of {PEERS[best.name].what})"
        (wins if sign * figure(own) < sign * figure(best) else losses).append(text)
    clauses += [f"it is ahead of the best of them in {listed(wins)}"] if wins else []
    clauses += [f"it loses in {listed(losses)}"] if losses else []
    if chance := by_name.get(RANDOM):
        clauses.append(
            f"random networks near the limit have {chance.accuracy:.1%}, qnas's {own.accuracy:.1%}"
        )
    return f"For a user: {'; '.join(clauses)}."


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def describe(rows: Sequence[Row], setting: Setting, options: argparse.Namespace, recipe: Recipe) -> str:
    """Return the section of a data set."""
    header = ["tool", "lines of user code", "s", "MB", "MACs used of the limit", "limit broken"]
    header += [f"accuracy at {share:g}" for share in options.shares]
    header += ["goes on after a kill", "ONNX as the network", "error"]
    limits = ", ".join(f"{limit_at(setting.space, share) / 1e6:.2f}M" for share in options.shares)
    length = setting.length
    name = setting.spec.partition(":")[0]
    given = "" if options.images is None else f" --images {options.images}"
    shared = (
        "each with its own torch" if setting.own_torch else "with this environment's torch where pip allows"
    )
    return (
        f"## qnas beside other tools, on {name}\n\n"
        f"`python benchmarks/peers.py --data {name}{':DIR' * (':' in setting.spec)}{given} --write`, one "
        f"thread of {host.cpu_name()}; the head of the script says what the columns are. Limits at "
        f"{listed([f'{share:g}' for share in options.shares])} of the way from the smallest to the largest "
        f"network: {limits} MACs; {len(options.seeds)} seeds. {length.warmup_epochs} epochs of weights alone "
        f"and {length.search_epochs} of searching, batches of {length.batch_size}, AdamW at "
        f"{length.learning_rate:g}, architecture at {length.arch_learning_rate:g}; where a tool evaluates "
        f"networks after the training, {length.evaluations} of them. NNI's penalty has a scale of 1 and is "
        f"not tuned. Environments: {shared}. Networks trained alone: {recipe.images} images, {recipe.epochs} "
        f"epochs.{own_counts(rows)}\n\n"
        f"{markdown_table(header, [cells(row, options.shares) for row in rows])}\n\n{meaning(rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or fashion-mnist:DIR")
    parser.add_argument("--images", type=int, help="how many training images to keep; default: all")
    parser.add_argument("--peers", nargs="+", choices=[*PEERS], default=[*PEERS], metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="environments and runs")
    parser.add_argument("--own-torch", action="store_true", help="install torch for each tool")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="limits, from 0 to 1")
    parser.add_argument("--warmup-epochs", type=int, default=Length.warmup_epochs)
    parser.add_argument("--search-epochs", type=int, default=Length.search_epochs)
    parser.add_argument("--epochs", type=int, default=20, help="of networks trained alone")
    parser.add_argument("--most-minutes", type=float, default=20, help="for one search")
    parser.add_argument("--results", type=Path, default=OUT / "peers.jsonl")
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    options.work = options.work.resolve()  # programs run in folders of their own
    torch.set_num_threads(1)
    name, _, folder = options.data.partition(":")
    if folder and not Path(folder).is_dir():
        raise SystemExit(f"{options.data}: there is no such folder, so there is nothing to measure")
    data = load_images(options.data, options.images or 10**9, resolution_px=IMAGES_PX[name])
    setting = Setting(
        data=data,
        spec=options.data,
        space=task_space(data),
        length=Length(warmup_epochs=options.warmup_epochs, search_epochs=options.search_epochs),
        images=options.work / f"{name}-{len(data.train_and_heldout)}.npz",
        work=options.work,
        own_torch=options.own_torch,
        most_s=60 * options.most_minutes,
    )
    write_images(data, setting.images)
    known = Cache(options.results)
    for peer in options.peers:
        measure(peer, setting, options, known)
    recipe = Recipe(images=len(data.train_and_heldout), epochs=options.epochs)
    names = [*options.peers, RANDOM]
    rows = [row_of(peer, setting, options, recipe, known, known) for peer in names]
    text = describe(rows, setting, options, recipe)
    print(text)
    if options.write:
        write_section(RESULTS, f"peers-{name}", text)


if __name__ == "__main__":
    main()
