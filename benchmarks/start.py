"""The effect of initial depthwise kernels that are concentrated around their centres.

    python benchmarks/start.py --data fashion-mnist:DIR --data cifar10:DIR [--write]

For each kernel size, a network of three blocks with this kernel is trained alone with the recipe of
search_quality.py, from kernels with envelopes of several widths (`nn.blocks.ENVELOPE_TAPS`). The widest is
torch's own initialisation, with the same variance at all taps. `--epochs` trains for other numbers of epochs,
since the effect of an initialisation may vanish in a longer training. Existing results are reused.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from experiments import (
    OUT,
    RESULTS,
    Cache,
    Recipe,
    describe_recipe,
    load_images,
    markdown_table,
    percent,
    tiny_space,
    train_alone,
    write_section,
)
from search_quality import RECIPE, TRAINING_SEED

from qnas.data.image_data import ImageData
from qnas.nn import blocks
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.space import SearchSpace
from qnas.training.loop import set_up_process

# The block of each space, by kernel size.
SPACES = {"quadranet-tiny": "quadra_k{}_e2", "proxyless-tiny": "mbconv_k{}_e3"}
KERNELS = (3, 5, 7)
STARTS = (math.inf, 1.0, 0.7, 0.5)  # taps
BLOCKS_BY_STAGE = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=SPACES)
    parser.add_argument("--kernels", nargs="+", type=int, default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--starts", nargs="+", type=float, default=list(STARTS), help="taps; inf: torch's")
    parser.add_argument("--epochs", nargs="+", type=int, default=[RECIPE.epochs])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    cache = Cache(options.out / "trainings.jsonl")
    sections = []
    for spec in options.data:
        data = load_images(spec, RECIPE.images)
        rows = []
        for name in options.spaces:
            space = tiny_space(name)
            for kernel in options.kernels:
                arch = network(space, SPACES[name].format(kernel))
                for epochs in options.epochs:
                    recipe = replace(RECIPE, epochs=epochs)
                    found = [accuracy(space, arch, data, recipe, start, cache) for start in options.starts]
                    row = [f"{kernel}x{kernel}, {name}", str(epochs), *map(percent, found)]
                    rows.append(row)
        header = ["kernels", "epochs", *(f"{start:g} taps" for start in options.starts)]
        sections.append(f"{data.name}:\n\n{markdown_table(header, rows)}")
    how = (
        f"{describe_recipe(RECIPE)} Epochs as the table says, one seed. Kernels are drawn as torch draws "
        "them, times a Gaussian of the distance from the centre with a standard deviation of so many taps, "
        f"the sum of squares kept; `inf` is torch's own start, {blocks.ENVELOPE_TAPS:g} what qnas takes."
    )
    text = "\n\n".join(["## How depthwise kernels start", how, *sections])
    print(text)
    if options.write:
        write_section(RESULTS, "start", text)


def network(space: SearchSpace, block: str) -> Arch:
    """Return the network with BLOCKS_BY_STAGE of these blocks, at the first positions of each stage."""
    left = list(BLOCKS_BY_STAGE)
    choices = []
    for position in space.positions:
        names = [candidate.name for candidate in position.candidates]
        takes = left[position.stage] > 0 or "identity" not in names
        left[position.stage] -= takes
        choices.append(block if takes else "identity")
    return make_arch(space, tuple(choices))


def accuracy(
    space: SearchSpace, arch: Arch, data: ImageData, recipe: Recipe, taps: float, cache: Cache
) -> float:
    """Train from kernels with an envelope of this width, and return the accuracy on test images."""
    with patch.object(blocks, "ENVELOPE_TAPS", taps):
        found = train_alone(space, arch, data, recipe, TRAINING_SEED, cache)
    return float(found["accuracy"])


if __name__ == "__main__":
    main()
