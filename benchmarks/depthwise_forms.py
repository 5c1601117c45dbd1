"""Ways to compute the depthwise convolutions of a quadratic neuron in deployed files, by their latencies.

    python benchmarks/depthwise_forms.py [--rounds 15] [--write]

The block is an inverted residual as it is deployed, norms folded, with the product of two depthwise
convolutions. The forms differ in how these are written:

- separate: two depthwise convolutions, as qnas exports them: for LiteRT, those of 7x7 as sums of four;
- whole: the same with every convolution as one operator, where that is another form;
- multiplier: one depthwise convolution with two outputs a channel, split by strided slices, since runtimes
  put the outputs of a channel next to each other;
- grouped: the same convolution, split behind a reshape to (channels, 2);
- doubled: the map twice, one after the other, one depthwise convolution of it, split in the middle.

`linear` has one depthwise convolution and no product: what a quadratic term costs is the ratio to it. All
forms take turns in every round, on one thread at batch 1, in onnxruntime, OpenVINO and LiteRT (XNNPACK). The
table has the median over rounds of the ratio to `separate` in the same round. The forms are checked to have
equal outputs.

A second table has the TFLite files of whole networks, the largest of two spaces, with 7x7 convolutions as
sums of four (as exported) and whole.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from experiments import RESULTS, markdown_table, write_section
from torch import Tensor, nn

from qnas.common import host
from qnas.deploy.export import tflite_format
from qnas.deploy.export.lowering import CHANNELS_LAST, SplitDepthwise, lowered
from qnas.deploy.export.product import Variant
from qnas.deploy.export.tracing import silence
from qnas.deploy.runtimes import open_runtime
from qnas.deploy.timed_files import random_product
from qnas.deploy.timing import host_stopwatch, sample_rounds
from qnas.spaces.lower import smallest_and_largest
from qnas.spaces.space import load_space

SHAPES = ((24, 4, 56), (40, 4, 28), (80, 4, 14))  # channels, expansion, height and width
KERNELS = (3, 5, 7)
FORMS = ("separate", "whole", "multiplier", "grouped", "doubled", "linear")
RUNTIMES = ("onnxruntime", "openvino", "litert")
TOLERANCE = 1e-4

NETWORKS = ("quadranet-small", "quadranet-mobile")
TEXT = """## Forms of depthwise convolutions

A block with two depthwise convolutions and their product, at batch 1 on one thread of a shared machine
({cpu}). Ratios are to `separate`, which is what qnas exports
(`python benchmarks/depthwise_forms.py --write`).

{table}

One convolution with two outputs a channel is slower than what qnas exports in every runtime, so qnas has no
such form. In LiteRT, blocks whose depthwise convolutions of 7x7 are written as one operator take several
times as long as with the sum of four smaller ones that qnas writes instead. Whole TFLite files:

{networks}
"""

Call = Callable[[], object]


class Block(nn.Module):
    """An inverted residual with folded norms, whose depthwise convolutions are written in one of FORMS."""

    def __init__(self, channels: int, expansion: int, kernel: int, form: str) -> None:
        super().__init__()
        hidden, padding = expansion * channels, kernel // 2
        self.form, self.hidden = form, hidden
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.project = nn.Conv2d(hidden, channels, 1)
        self.conv_a, conv_b = (
            nn.Conv2d(hidden, hidden, kernel, padding=padding, groups=hidden) for _ in range(2)
        )
        if form in ("separate", "whole"):
            self.conv_b = conv_b
        elif form != "linear":
            self.both = self._joined(self.conv_a, conv_b)
            del self.conv_a

    def _joined(self, a: nn.Conv2d, b: nn.Conv2d) -> nn.Conv2d:
        """Return one convolution with the outputs of two."""
        doubles, hidden = self.form == "doubled", self.hidden
        inputs = 2 * hidden if doubles else hidden
        both = nn.Conv2d(inputs, 2 * hidden, a.kernel_size, padding=a.padding, groups=inputs)
        # of two outputs a channel, output 2i + j is the j-th of channel i
        weights, biases = (torch.stack(pair, 0 if doubles else 1).flatten(0, 1) for pair in _pairs(a, b))
        both.weight, both.bias = nn.Parameter(weights), nn.Parameter(biases)
        return both

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.expand(x).clamp(0, 6)
        y = self.mix(y).clamp(0, 6)
        out: Tensor = x + self.project(y)
        return out

    def mix(self, y: Tensor) -> Tensor:
        """Apply the depthwise convolutions and the product: (B, hidden, H, W) -> (B, hidden, H, W)."""
        if self.form == "linear":
            mixed: Tensor = self.conv_a(y)
            return mixed
        if self.form in ("separate", "whole"):
            a, b = self.conv_a(y), self.conv_b(y)
        elif self.form == "doubled":
            a, b = self.both(torch.cat([y, y], 1)).chunk(2, 1)
        elif self.form == "multiplier":
            y = self.both(y)
            a, b = y[:, 0::2], y[:, 1::2]
        else:
            a, b = self.both(y).unflatten(1, (self.hidden, 2)).unbind(2)
        product: Tensor = a * b
        return product


def _pairs(a: nn.Conv2d, b: nn.Conv2d) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the weights and the biases of two convolutions."""
    assert a.bias is not None
    assert b.bias is not None
    return (a.weight.detach(), b.weight.detach()), (a.bias.detach(), b.bias.detach())


def interpreter_of(**model: Any) -> Any:
    """Return LiteRT's interpreter of a file or its content, on one thread."""
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(**model, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def litert_call(block: Block, shape: tuple[int, int, int]) -> Call:
    """Return a call of a block in LiteRT, on a random image (1, H, W, C)."""
    channels, height, width = shape
    images = torch.randn(1, height, width, channels)
    exported = block if block.form == "whole" else lowered(block, CHANNELS_LAST)
    litert_torch = importlib.import_module("litert_torch")  # slow
    last = litert_torch.to_channel_last_io(exported, args=[0], outputs=[0])
    with silence():
        content = litert_torch.convert(last.eval(), (images,)).model_content()
    interpreter = interpreter_of(model_content=content)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images.numpy())
    call: Call = interpreter.invoke
    return call


def calls_of(runtime: str, channels: int, expansion: int, kernel: int, px: int) -> dict[str, Call]:
    """Return a call of each form in a runtime, with equal weights in all."""
    shape, calls, outputs = (channels, px, px), {}, {}
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    is_split = runtime == "litert" and SplitDepthwise.can_split(Block(8, 1, kernel, "linear").conv_a)
    for form in FORMS:
        if form == "whole" and not is_split:
            continue
        torch.manual_seed(0)
        block = Block(channels, expansion, kernel, form).eval()
        with torch.no_grad():
            outputs[form] = block(x)
        if runtime == "litert":
            calls[form] = litert_call(block, shape)
        else:
            calls[form] = open_runtime(runtime).compile(block, shape)()
    for form, output in outputs.items():
        assert form == "linear" or torch.allclose(output, outputs["separate"], atol=TOLERANCE), form
    return calls


def network_rows(rounds: int) -> list[list[str]]:
    """Return the milliseconds of TFLite files of large networks, exported and with whole convolutions."""
    rows = []
    for name, precision in product(NETWORKS, ("fp32", "int8-dynamic")):
        space = load_space(name)
        network = random_product(space, smallest_and_largest(space)[1], seed=0)
        calls: dict[str, Call] = {}
        with TemporaryDirectory() as folder:
            for form, on_gpu in (("split", False), ("whole", True)):
                path = Path(folder) / f"{form}.tflite"
                variant = Variant(precision, every_layer=True)
                tflite_format.write(replace(network, on_gpu=on_gpu), variant, path, form)
                calls[form] = interpreter_of(model_path=str(path)).invoke
            *_, samples = sample_rounds(calls, rounds, host_stopwatch())
        split, whole = (statistics.median(samples[form]) for form in ("split", "whole"))
        rows.append([name, precision, f"{split:.2f}", f"{whole:.2f}", f"{whole / split:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for runtime, kernel, (channels, expansion, px) in product(RUNTIMES, KERNELS, SHAPES):
        calls = calls_of(runtime, channels, expansion, kernel, px)
        *_, samples = sample_rounds(calls, options.rounds, host_stopwatch())
        ratios = {
            form: statistics.median(
                own / other for own, other in zip(samples[form], samples["separate"], strict=True)
            )
            for form in calls
        }
        ms = statistics.median(samples["separate"])
        place = f"{expansion * channels} channels, {px} px"
        cells = (f"{ratios[form]:.2f}" if form in ratios else "same" for form in FORMS[1:])
        row = [runtime, str(kernel), place, f"{ms:.3f}", *cells]
        rows.append(row)
        print(" | ".join(row), flush=True)
    table = markdown_table(["runtime", "kernel", "map", "separate, ms", *FORMS[1:]], rows)
    titles = ["largest network of", "precision", "as exported, ms", "whole, ms", "ratio"]
    networks = markdown_table(titles, network_rows(options.rounds))
    if options.write:
        write_section(
            RESULTS, "depthwise_forms", TEXT.format(cpu=host.cpu_name(), table=table, networks=networks)
        )


if __name__ == "__main__":
    main()
