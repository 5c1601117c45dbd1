"""Tables I, II, IV and V of QuadraNet (arXiv 2311.17956): what is measured here, beside the paper's figures.

    python benchmarks/quadranet_tables.py --tables I II [--torch-device cuda] [--write]
    python benchmarks/quadranet_tables.py --tables IV V --data cifar10:DIR [--write]

I: parameters and multiply-adds of all shipped QuadraNets, counted from their layers, beside ConvNeXt, Swin
and HorNet, counted on their modules; and images per second at 224 px (eager, channels_last, random weights).
The networks take turns in every round. A ratio to Swin-T is the median over rounds. With one CPU thread,
times are processor times. On a CUDA device, the GPU's time is measured, and ratios are those of medians
(`gpu.py`).

II: the memory that a training step of 24 equal blocks needs, with qnas's backward pass and with torch's. On a
CPU, it is what autograd keeps from the forward pass for the backward pass, without parameters (`memory.py`).
What the backward pass itself allocates, for one block after the other, is not in it. On a CUDA device it is
the peak of all memory. Memory kept is linear in the batch, so that a small --batch does; the table is for 64.

IV: the layout of quadranet-tiny with kernel 3 to 9 at every position, trained from scratch with several
seeds: accuracy and processor time. Kernels take turns within a seed.

V: quadratic 1x1 convolutions. Parameters and multiply-adds are those of the paper's networks. With --data,
the layout of quadranet-tiny is trained with them, and with linear ones that have as many parameters because
they are wider. All run their 1x1 convolutions and norms module by module, since qnas's kernels have no
quadratic ones.

Results are JSON lines, and existing ones are reused, so that a stopped run continues. Figures of a device
that is not here are taken from there. --write writes each table into a section of RESULTS.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from builders import (
    RESOLUTION_PX,
    SPACES,
    TABLE_I,
    ZOOS,
    Builder,
    count,
    default_zoo,
    network_builders,
)
from experiments import (
    OUT,
    RESULTS,
    TRAINED_PX,
    Cache,
    Recipe,
    describe_recipe,
    load_images,
    markdown_table,
    mean_and_sd,
    percent,
    tiny_space,
    train_alone,
    train_once,
    training_parts,
    write_section,
)
from gpu import DTYPES, inference, time_in_turns, training_bytes
from hornet import HorNetBlock
from memory import saved_bytes
from torch import Tensor, nn

from qnas.common import host
from qnas.data.image_data import ImageData
from qnas.deploy.timing import host_stopwatch, sample_rounds
from qnas.nn.blocks import ChannelLayerNorm, QuadraBlock
from qnas.nn.kernels import native
from qnas.nn.quadratic import KEPT_ELEMENTS, quadratic_conv2d, quadratic_conv2d_reference
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import only_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace, check_space, load_space
from qnas.training.loop import set_up_process

Row = dict[str, Any]

RATIO_TO = "Swin-T"
OWN = "QuadraNet36-T"
FILE = "quadranet_tables.jsonl"
KERNEL, EXPANSION = 7, 4
PAPER_BATCH = 64  # of table II
NOT_TRAINED = "Not trained here yet: `--data` trains the layout of quadranet-tiny with them."
NOT_RUN = "not run"
ALIKE = 0.05  # ratios of images per second that are nearer to 1 are not told apart
ON = {"cpu": "the CPU", "cuda": "the GPU"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=["I", "II", "V"], choices=["I", "II", "IV", "V"])
    parser.add_argument("--torch-device", default="cpu", choices=["cpu", "cuda"], help="of I and II")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of I and II; bfloat16 by autocast"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2, help="of I and II")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of I")
    parser.add_argument("--networks", nargs="+", help="to be timed in I; all if not given")
    parser.add_argument("--zoo", default=default_zoo(), choices=ZOOS, help="of ConvNeXt and Swin in I")
    parser.add_argument("--channels", nargs="+", type=int, default=[64, 128], help="of II")
    parser.add_argument("--px", type=int, default=56, help="height and width of the maps of II")
    parser.add_argument("--layers", type=int, default=24, help="blocks of II")
    parser.add_argument("--data", help="of IV and V: fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("--images", type=int, default=Recipe.images, help="training images of IV and V")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="of IV and V")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of IV and V")
    parser.add_argument("--kernels", nargs="+", type=int, default=[3, 5, 7, 9], help="of IV")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of {FILE}")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {RESULTS.name}")
    options = parser.parse_args()
    if options.torch_device == "cuda" and not torch.cuda.is_available():
        parser.error("--torch-device cuda: torch finds no CUDA device")
    if "IV" in options.tables and not options.data:
        parser.error("table IV trains networks: --data is missing")
    least = KEPT_ELEMENTS // (min(options.channels) * options.px**2) + 1
    is_lean = options.torch_device == "cpu" and native.library() is None
    if "II" in options.tables and is_lean and options.batch < least:
        parser.error(
            f"--batch: without C++ kernels, so small maps keep more than their share: at least {least}"
        )
    set_up_process(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in gpu.py
    cache = Cache(options.out / FILE)
    data = load_images(options.data, options.images) if options.data else None
    recipe = Recipe(images=options.images, epochs=options.epochs)
    tables: dict[str, Callable[[], str]] = {
        "I": lambda: table_1(options, cache),
        "II": lambda: table_2(options, cache),
        "IV": lambda: table_4(options.kernels, data, recipe, options.seeds, cache),
        "V": lambda: table_5(data, recipe, options.seeds, cache),
    }
    for name in options.tables:
        text = tables[name]()
        print(text, end="\n\n", flush=True)
        if options.write:
            write_section(RESULTS, f"quadranet_table_{name}", text)


def measured_at(options: argparse.Namespace, table: str) -> dict[str, Any]:
    """Return what the figures of table I or II depend on, whatever the networks or blocks."""
    is_cuda = options.torch_device == "cuda"
    return {
        "table": table,
        "torch_device": options.torch_device,
        "machine": torch.cuda.get_device_name() if is_cuda else host.cpu_name(),
        "torch": torch.__version__.split("+")[0],
        "threads": options.threads,
        "batch": options.batch,
        "dtype": options.dtype + (" with TF32" if is_cuda and options.dtype == "float32" else ""),
    }


def both_sessions(cache: Cache, measured: Row) -> dict[str, Row | None]:
    """Return what was measured now, and for the other kind of device what was stored last, by kind."""
    found: dict[str, Row | None] = {}
    for torch_device in ON:
        stored = cache.matching({"table": measured["table"], "torch_device": torch_device})
        found[torch_device] = stored[-1] if stored else None
    return found | {measured["torch_device"]: measured}


def describe_session(row: Row | None, torch_device: str) -> str:
    """Return a sentence on where and how figures were measured, or that they were not."""
    where = ON[torch_device]
    if row is None:
        return f"On {where}: {NOT_RUN}" + (", no GPU was at hand." if torch_device == "cuda" else ".")
    rounds = f"{row['repeats']} rounds, " if "repeats" in row else ""
    shared = f", threads {row['threads']}, of a shared machine" if torch_device == "cpu" else ""
    return (
        f"On {where}: {row['machine']}{shared}, torch {row['torch']}, batch {row['batch']}, {row['dtype']}, "
        f"{rounds}{row['date']}."
    )


# ---- table I: networks


def table_1(options: argparse.Namespace, cache: Cache) -> str:
    measured = measure_rates(options, cache)
    return render_1(network_counts(options.zoo), both_sessions(cache, measured), options.zoo)


def render_1(counts: Mapping[str, tuple[int, int]], sessions: Mapping[str, Row | None], zoo: str) -> str:
    header = ["network", "parameters, M", "paper", "MACs, G", "paper"]
    header += [f"{what}, {where}" for where in ("CPU", "GPU") for what in ("images/s", f"x {RATIO_TO}")]
    header += ["images/s, paper's A100", f"x {RATIO_TO}"]
    rows = [network_row(name, found, list(sessions.values())) for name, found in counts.items()]
    lines = [
        "## QuadraNet's table I: networks",
        "`python benchmarks/quadranet_tables.py --tables I --write`, with the batch and rounds below, and "
        "`--networks` where some were not run; the head of the script says how. ConvNeXt and Swin are "
        f"those of {zoo}. All networks of a session take turns: their ratios can be trusted more than "
        "their images per second.",
        *(describe_session(row, device) for device, row in sessions.items()),
        markdown_table(header, rows),
        *(verdict_1(row) for row in sessions.values() if row is not None),
    ]
    return "\n\n".join(line for line in lines if line)


def network_counts(zoo: str) -> dict[str, tuple[int, int]]:
    """Return parameters and multiply-adds by network: of QuadraNets from their layers."""
    found = {}
    for name, build in network_builders(zoo).items():
        found[name] = quadranet_counts(name) if name in SPACES else count(build)
    return found


def quadranet_counts(name: str) -> tuple[int, int]:
    space = load_space(SPACES[name])
    blocks = lower(space, only_arch(space))
    return count_params(blocks), count_macs(blocks)


def network_row(name: str, counts: tuple[int, int], sessions: Sequence[Row | None]) -> list[str]:
    paper = TABLE_I.get(name)
    cells = [name, f"{counts[0] / 1e6:.2f}", f"{paper.params_m:g}" if paper else "-"]
    cells += [f"{counts[1] / 1e9:.2f}", f"{paper.macs_g:g}" if paper else "-"]
    for session in sessions:
        if session is None or name not in session["ms"]:
            cells += [NOT_RUN, NOT_RUN]
        else:
            cells += [f"{1e3 * session['batch'] / session['ms'][name]:.3g}", f"{session['ratio'][name]:.2f}"]
    if paper is None:
        return [*cells, "-", "-"]
    return [*cells, f"{paper.images_per_s:g}", f"{paper_ratio(name, RATIO_TO):.2f}"]


def paper_ratio(name: str, other: str) -> float:
    """Return the ratio of two networks' images per second in the paper's table I."""
    return TABLE_I[name].images_per_s / TABLE_I[other].images_per_s


def measure_rates(options: argparse.Namespace, cache: Cache) -> Row:
    """Time the networks in turns: `ms` of a batch, and `ratio` of images per second to `RATIO_TO`'s."""
    builders = network_builders(options.zoo)
    names = options.networks or list(builders)
    names = [name for name in builders if name in {*names, RATIO_TO}]
    parts = measured_at(options, "I") | {"zoo": options.zoo, "repeats": options.repeats, "networks": names}
    known = cache.get(parts)
    if known is not None:
        return known
    torch.manual_seed(0)
    device, dtype = torch.device(options.torch_device), DTYPES[options.dtype]
    x = torch.randn(options.batch, 3, RESOLUTION_PX, RESOLUTION_PX, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    calls = {
        name: inference(builders[name]().to(device).to(memory_format=torch.channels_last).eval(), x, dtype)
        for name in names
    }
    if device.type == "cuda":
        ms = time_in_turns(calls, options.repeats)
        ratio = {name: ms[RATIO_TO] / ms[name] for name in names}
    else:
        clock_ns = time.process_time_ns if options.threads == 1 else time.perf_counter_ns
        *_, samples = sample_rounds(calls, options.repeats, host_stopwatch(clock_ns), warm_up=1)
        ms, ratio = medians(samples, RATIO_TO)
    return cache.put(parts, {"ms": ms, "ratio": ratio, "date": date.today().isoformat()})


def medians(samples: Mapping[str, Sequence[float]], other: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return median milliseconds, and the median over rounds of the other's time divided by each one's."""
    return (
        {name: statistics.median(times) for name, times in samples.items()},
        {
            name: statistics.median(b / a for a, b in zip(times, samples[other], strict=True))
            for name, times in samples.items()
        },
    )


def verdict_1(session: Row) -> str:
    """Say in a sentence which networks of its size QuadraNet36-T is slower than, and what the paper has."""
    others = [n for n in ("ConvNeXt-T", "Swin-T", "HorNet-T") if n in session["ms"]]
    if OWN not in session["ms"] or not others:
        return ""
    ratios = {name: session["ratio"][OWN] / session["ratio"][name] for name in others}
    figures = ", ".join(f"{ratios[n]:.2f} of {n}'s (paper {paper_ratio(OWN, n):.2f})" for n in others)
    slower = [name for name in others if ratios[name] < 1 - ALIKE]
    faster = [name for name in others if ratios[name] > 1 + ALIKE]
    outcome = f"it loses to {' and '.join(slower) or 'none'} and beats {' and '.join(faster) or 'none'}"
    short = sum(ratios[n] < paper_ratio(OWN, n) for n in others)
    return (
        f"For a user on {ON[session['torch_device']]}: {OWN} has {figures} images per second: {outcome} "
        f"by more than {ALIKE:.0%}, and {short} of {len(others)} ratios fall short of the paper's."
    )


# ---- table II: memory of training blocks


class PlainChannels(nn.Module):
    """x + PW2(GELU(PW1(LN(x)))) by torch's modules: the paper's SkipBlock, and the second half of others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, EXPANSION * channels, 1)
        self.act = nn.GELU()
        self.project = nn.Conv2d(EXPANSION * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.project(self.act(self.expand(self.norm(x))))
        return y


class ConvMixer(nn.Module):
    """x + DW_7(LN(x)), the first half of the paper's ConvBlock."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels, eps=1e-6)
        self.conv = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv(self.norm(x))
        return y


class QuadraticMixer(nn.Module):
    """x + the quadratic convolution of LN(x), the first half of a QuadraBlock."""

    def __init__(self, channels: int, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.norm = ChannelLayerNorm(channels, eps=1e-6)
        self.weights = nn.ParameterList(torch.randn(channels, 1, KERNEL, KERNEL) / KERNEL for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.operator(self.norm(x), *self.weights)


class SwinBlock(nn.Module):
    """The block of Swin (arXiv 2103.14030) on maps (B, C, H, W): windows of 7 x 7, 32 channels a head."""

    def __init__(self, channels: int, shift: int) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformerBlock

        self.block = SwinTransformerBlock(channels, max(channels // 32, 1), [7, 7], [shift, shift])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x.permute(0, 2, 3, 1))  # in channels_last memory a view
        return y.permute(0, 3, 1, 2)


def hornet_order(channels: int) -> int:
    """Return the order of HorNet-T's gnconv at this width: 2 at 64 channels, one more at each doubling."""
    return max(2, (channels // 64).bit_length() + 1)


# Each builds the i-th block. "lean" is qnas's backward pass: in the quadratic convolution alone, or in the
# whole block; with a linear neuron, this shows how much of it has nothing to do with a quadratic term.
FORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "Skip": lambda channels, i: PlainChannels(channels),
    "Conv": lambda channels, i: nn.Sequential(ConvMixer(channels), PlainChannels(channels)),
    "Swin": lambda channels, i: SwinBlock(channels, 3 * (i % 2)),
    "Hor": lambda channels, i: HorNetBlock(channels, hornet_order(channels)),
    "Quadra, torch's backward": lambda channels, i: nn.Sequential(
        QuadraticMixer(channels, quadratic_conv2d_reference), PlainChannels(channels)
    ),
    "Quadra, lean convolution": lambda channels, i: nn.Sequential(
        QuadraticMixer(channels, quadratic_conv2d), PlainChannels(channels)
    ),
    "Conv, lean block": lambda channels, i: QuadraBlock(channels, KERNEL, EXPANSION, neuron="linear"),
    "Quadra, lean block": lambda channels, i: QuadraBlock(channels, KERNEL, EXPANSION),
}
PLAIN, LEAN = "Quadra, torch's backward", "Quadra, lean block"


def stack(form: str, channels: int, layers: int) -> nn.Module:
    """Return blocks of a form one after the other, in channels_last memory."""
    blocks = nn.Sequential(*(FORMS[form](channels, i) for i in range(layers)))
    return blocks.to(memory_format=torch.channels_last)


def step_bytes(form: str, shape: tuple[int, int, int, int], layers: int, device: str, dtype: str) -> int:
    """Return the memory of a training step with maps (B, C, H, W): kept on a CPU, the peak on a GPU."""
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    build = partial(stack, form, shape[1], layers)
    if device == "cuda":
        return training_bytes(build, x, DTYPES[dtype])
    blocks = build().train()

    def call() -> Tensor:
        with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
            y: Tensor = blocks(x)
            return y

    return saved_bytes(call, blocks.parameters())


def table_2(options: argparse.Namespace, cache: Cache) -> str:
    measured = measure_memory(options, cache)
    sessions = both_sessions(cache, measured)
    header = ["block"]
    for session, where in zip(sessions.values(), ("CPU", "GPU"), strict=True):
        for channels in (session or measured)["channels"]:
            header += [f"GB, {where}, {channels} channels", "x Swin"]
    rows = [[form, *memory_cells(form, sessions.values(), measured["channels"])] for form in FORMS]
    layers, px, batch = (measured[key] for key in ("layers", "px", "batch"))
    lines = [
        "## QuadraNet's table II: memory of a training step",
        f"`python benchmarks/quadranet_tables.py --tables II --batch {batch} --write`: {layers} blocks on "
        f"maps of {px} x {px}, scaled to batch {PAPER_BATCH}. On the CPU it is what autograd keeps, to "
        "which comes what the backward pass allocates for one block at a time; on a GPU it is the peak of "
        "a step. `torch's backward` computes three convolutions under autograd; `lean` is qnas's backward "
        "pass, of the quadratic convolution alone or of the whole block. Hor has the orders of HorNet-T "
        "at these widths. The paper does not say the size of its maps, and the figures of its table are "
        "missing in the copy at hand. Its text says that QuadraBlock needs less than SwinBlock and "
        "HorBlock, and still less with QuadraLib; its abstract says 30% less.",
        *(describe_session(row, device) for device, row in sessions.items()),
        markdown_table(header, rows),
        *(verdict_2(row) for row in sessions.values() if row is not None),
    ]
    return "\n\n".join(lines)


def measure_memory(options: argparse.Namespace, cache: Cache) -> Row:
    """Return the `bytes` of a training step by channels and form, at the batch that was measured."""
    parts = measured_at(options, "II") | {
        "channels": options.channels,
        "px": options.px,
        "layers": options.layers,
    }
    known = cache.get(parts)
    if known is not None:
        return known
    found: dict[str, dict[str, int]] = {}
    for channels in options.channels:
        shape = (options.batch, channels, options.px, options.px)
        found[str(channels)] = {
            form: step_bytes(form, shape, options.layers, options.torch_device, options.dtype)
            for form in FORMS
        }
    return cache.put(parts, {"bytes": found, "date": date.today().isoformat()})


def memory_cells(form: str, sessions: Iterable[Row | None], channels: Sequence[int]) -> list[str]:
    cells = []
    for session in sessions:
        if session is None:
            cells += [NOT_RUN] * (2 * len(channels))
            continue
        for kept in session["bytes"].values():
            gigabytes = kept[form] * PAPER_BATCH / session["batch"] / 1e9
            cells += [f"{gigabytes:.2f}", f"{kept[form] / kept['Swin']:.2f}"]
    return cells


def verdict_2(session: Row) -> str:
    """Say in a sentence what the backward pass brings, and how much other blocks need without it."""
    parts = []
    for channels, kept in session["bytes"].items():
        shares = ", ".join(f"{kept[PLAIN] / kept[form]:.2f} of {form}'s" for form in ("Swin", "Hor"))
        less = [form for form in ("Skip", "Conv", "Swin", "Hor") if kept[form] < kept[PLAIN]]
        behind = f"{shares}, and more than {' and '.join(less)}" if less else shares
        parts.append(
            f"to {kept[LEAN] / kept[PLAIN]:.0%} at {channels} channels (with torch's it is {behind})"
        )
    return (
        f"For a user on {ON[session['torch_device']]}: qnas's backward pass cuts the memory of QuadraBlocks "
        f"{', and '.join(parts)}."
    )


# ---- table IV: kernels

PAPER_KERNELS = {3: (80.6, 81.1), 5: (81.3, 86.9), 7: (82.2, 94.4), 9: (82.2, 123.3)}  # accuracy, hours


def tiny_layout(name: str, expansion: int = EXPANSION, kernel: int = KERNEL) -> SearchSpace:
    """Return the layout of quadranet-tiny as a fixed network, with one QuadraBlock at every position."""
    candidate = {"block": "quadra", "kernel": kernel, "expansion": expansion}
    content = tiny_space("quadranet-tiny").written() | {"name": name, "candidates": [candidate]}
    return check_space(content, name)


def kernel_layout(kernel: int) -> SearchSpace:
    return tiny_layout(f"quadranet-tiny-k{kernel}", kernel=kernel)


def table_4(
    kernels: Sequence[int], data: ImageData | None, recipe: Recipe, seeds: Sequence[int], cache: Cache
) -> str:
    assert data is not None
    layouts = {kernel: kernel_layout(kernel) for kernel in kernels}
    found: dict[int, list[Row]] = {kernel: [] for kernel in kernels}
    for seed in seeds:  # kernels take turns
        for kernel, space in layouts.items():
            found[kernel].append(train_alone(space, only_arch(space), data, recipe, seed, cache))
    first = kernels[0]
    rows = []
    for kernel, space in layouts.items():
        blocks = lower(space, only_arch(space))
        paper = PAPER_KERNELS.get(kernel)
        rows.append(
            [
                f"{kernel} x {kernel}",
                f"{count_params(blocks) / 1e3:.1f}",
                f"{count_macs(blocks) / 1e6:.2f}",
                *training_cells(found[kernel], found[first]),
                f"{paper[0]}%" if paper else "-",
                f"{paper[1] / PAPER_KERNELS[first][1]:.2f}" if paper and first in PAPER_KERNELS else "-",
            ]
        )
    header = ["kernel", "parameters, K", "MACs, M", "accuracy", "processor s", f"x kernel {first}"]
    header += ["accuracy, paper", f"hours x kernel {first}, paper"]
    lines = [
        "## QuadraNet's table IV: kernels",
        f"`python benchmarks/quadranet_tables.py --tables IV --data {data.name}:DIR --write`: "
        f"quadranet-tiny at {TRAINED_PX} px with one kernel at every position and expansion {EXPANSION} "
        f"(maps of 16, 8 and 4 pixels), {len(seeds)} seeds; {host.cpu_name()}, a shared machine. The "
        f"paper's are QuadraNet36-T on ImageNet and four A100. {describe_recipe(recipe)}",
        markdown_table(header, rows),
        verdict_4(found),
    ]
    return "\n\n".join(lines)


def training_cells(found: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Return accuracy, mean processor seconds, and the median over seeds of their ratio to others'."""
    ratios = [row["seconds"] / other["seconds"] for row, other in zip(found, others, strict=True)]
    return [
        percent(*mean_and_sd([row["accuracy"] for row in found])),
        f"{statistics.fmean(row['seconds'] for row in found):.0f}",
        f"{statistics.median(ratios):.2f}",
    ]


def verdict_4(found: Mapping[int, Sequence[Row]]) -> str:
    """Say in a sentence which kernel is the most accurate, and whether others can be told from it."""
    best, rest = best_of(found)
    return (
        f"For a user: kernel {best} is the most accurate on images of {TRAINED_PX} px, {rest}; the paper's "
        "gain up to kernel 7 is on maps of 56 pixels and less."
    )


def best_of(found: Mapping[Any, Sequence[Row]]) -> tuple[Any, str]:
    """Return the key of the most accurate trainings, and words on those within the spread of its seeds."""
    figures = {key: mean_and_sd([row["accuracy"] for row in rows]) for key, rows in found.items()}
    best = max(figures, key=lambda key: figures[key][0])
    mean, sd = figures[best]
    near = [str(key) for key, (value, _) in figures.items() if key != best and mean - value <= sd]
    if len(found[best]) < 2:
        return best, "of one seed each, which tells little"
    return best, f"and within the spread of its seeds is {', '.join(near) if near else 'no other'}"


# ---- table V: quadratic pointwise convolutions


class QuadraticPointwise(nn.Module):
    """(W_a x + b_a) . (W_b x + b_b) + W_c x + b_c, the paper's neuron (equation 5) as a 1x1 convolution.

    The paper writes no biases; with three, the parameters come nearest to its own.
    """

    def __init__(self, c_in: int, c_out: int, device: torch.device) -> None:
        super().__init__()
        self.conv_a, self.conv_b, self.conv_c = (nn.Conv2d(c_in, c_out, 1, device=device) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        y: Tensor = self.conv_a(x) * self.conv_b(x) + self.conv_c(x)
        return y


def with_quadratic_pointwise(network: nn.Module, roles: Sequence[str]) -> nn.Module:
    """Replace the 1x1 convolutions of QuadraBlocks that have these roles by quadratic ones.

    Returns the network. Its blocks then run module by module, also without roles, so that times compare.
    """
    for block in [module for module in network.modules() if isinstance(module, QuadraBlock)]:
        block.has_kernels = False
        for role in roles:
            conv = block.get_submodule(role)
            assert isinstance(conv, nn.Conv2d)
            block.set_submodule(
                role, QuadraticPointwise(conv.in_channels, conv.out_channels, conv.weight.device)
            )
    return network


ROLES = {
    "QuadraNet": (),
    "+ quadratic 1x1 conv 1": ("expand",),
    "+ quadratic 1x1 conv 2": ("expand", "project"),
}
# parameters (M), multiply-adds (G), accuracy (%)
TABLE_V = {
    "QuadraNet36-T": ((23.6, 4.1, 82.2), (44.6, 7.8, 82.3), (65.6, 11.5, 82.7)),
    "QuadraNet36-B": ((90.4, 15.8, 84.1), (174.3, 30.6, 83.9), (258.2, 45.4, 84.2)),
}
# in the tiny layout: expansion and quadratic 1x1 convolutions; a quadratic one has the parameters of three
TRAINED: dict[str, tuple[int, tuple[str, ...]]] = {
    **{name: (EXPANSION, roles) for name, roles in ROLES.items()},
    "expansion 8, as many parameters as conv 1": (2 * EXPANSION, ()),
    "expansion 12, as many as conv 2": (3 * EXPANSION, ()),
}


def quadratic_builder(space: SearchSpace, classes: int, roles: Sequence[str]) -> Builder:
    """Return a function that builds the network of a fixed space with quadratic 1x1 convolutions."""
    return lambda: with_quadratic_pointwise(build_subnet(space, only_arch(space), classes), roles)


def table_5(data: ImageData | None, recipe: Recipe, seeds: Sequence[int], cache: Cache) -> str:
    rows = []
    for network, papers in TABLE_V.items():
        space = load_space(SPACES[network])
        for (name, roles), paper in zip(ROLES.items(), papers, strict=True):
            params, macs = count(quadratic_builder(space, space.head.classes, roles))
            shown = network if not roles else name
            rows.append(
                [
                    shown,
                    f"{params / 1e6:.2f}",
                    f"{paper[0]}",
                    f"{macs / 1e9:.2f}",
                    f"{paper[1]}",
                    f"{paper[2]}%",
                ]
            )
    header = ["network", "parameters, M", "paper", "MACs, G", "paper", "accuracy, paper"]
    lines = [
        "## QuadraNet's table V: quadratic 1x1 convolutions",
        "`python benchmarks/quadranet_tables.py --tables V --data cifar10:DIR --write`. The paper's "
        "networks, counted:",
        markdown_table(header, rows),
    ]
    if data is None:
        lines += [f"{NOT_TRAINED} {verdict_on_paper()}"]
        return "\n\n".join(lines)
    found = train_quadratic(data, recipe, seeds, cache)
    first, *_ = found
    trained = []
    for name, (expansion, roles) in TRAINED.items():
        params, macs = count(
            quadratic_builder(pointwise_layout(expansion), len(data.classes), roles), TRAINED_PX
        )
        cells = training_cells(found[name], found[first])
        trained.append([name, f"{params / 1e3:.1f}", f"{macs / 1e6:.2f}", *cells])
    lines += [
        f"Trained here: the layout of quadranet-tiny at {TRAINED_PX} px with kernel {KERNEL} and expansion "
        f"{EXPANSION}, on {data.name}, {len(seeds)} seeds; {host.cpu_name()}, a shared machine. "
        f"{describe_recipe(recipe)}",
        markdown_table(
            ["network", "parameters, K", "MACs, M", "accuracy", "processor s", "x first"], trained
        ),
        verdict_5(found),
    ]
    return "\n\n".join(lines)


def verdict_on_paper() -> str:
    """Say in a sentence what quadratic 1x1 convolutions cost and bring by the paper's own figures."""
    costs, gains = [], []
    for (params, _, accuracy), *others in TABLE_V.values():
        costs += [other[0] / params for other in others]
        gains += [other[2] - accuracy for other in others]
    return (
        f"For a user: by the paper's figures they take {min(costs):.1f} to {max(costs):.1f} times the "
        f"parameters and change the accuracy by {min(gains):+.1f} to {max(gains):+.1f} points, so that "
        "QuadraBlocks have none."
    )


def pointwise_layout(expansion: int) -> SearchSpace:
    return tiny_layout(f"quadranet-tiny-e{expansion}", expansion)


def train_quadratic(
    data: ImageData, recipe: Recipe, seeds: Sequence[int], cache: Cache
) -> dict[str, list[Row]]:
    """Train each of `TRAINED` with each seed, in turns."""
    found: dict[str, list[Row]] = {name: [] for name in TRAINED}
    for seed in seeds:
        for name, (expansion, roles) in TRAINED.items():
            space = pointwise_layout(expansion)
            parts = training_parts(space, only_arch(space), data, recipe, seed)
            parts |= {"table": "V", "quadratic_pointwise": list(roles)}
            build = quadratic_builder(space, len(data.classes), roles)
            found[name].append(train_once(build, parts, data, recipe, seed, cache))
    return found


def verdict_5(found: Mapping[str, Sequence[Row]]) -> str:
    """Say in a sentence what is the most accurate, and what linear networks of as many parameters reach."""
    plain, one, two, wide, wider = (
        statistics.fmean(row["accuracy"] for row in rows) for rows in found.values()
    )
    best, rest = best_of(found)
    return (
        f"For a user: quadratic 1x1 convolutions change the accuracy by {100 * (one - plain):+.1f} points "
        f"(the first) and {100 * (two - plain):+.1f} (both), at two and three times the parameters, and "
        f"wider linear ones with as many parameters by {100 * (wide - plain):+.1f} and "
        f"{100 * (wider - plain):+.1f}; the most accurate is `{best}`, {rest}."
    )


if __name__ == "__main__":
    main()
