"""The effect of a slow start of quadratic weights on divergence and accuracy.

    python benchmarks/relinear.py --data fashion-mnist:DIR --data cifar10:DIR [--write]

The largest network of quadranet-tiny is trained from scratch with one recipe, at 1, 3 and 10 times its
learning rate, with several seeds, and in several forms: `off` (all weights are treated alike), `linear start`
(quadratic products are zero at first), the same with a tenth of the learning rate for quadratic weights
(`gamma`), and with L1 shrinkage in addition (`beta`).

A training counts as diverged if its loss is NaN or infinite, if the mean loss of its last epoch is that of
guessing, or if this loss has risen from the lowest epoch's by as much as `search.diagnostics` considers
unstable. Accuracies are on all test images, for trainings that have not diverged.

Existing results are reused, so a stopped run continues. --write writes the table to RESULTS.md.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from experiments import (
    OUT,
    RESULTS,
    Cache,
    load_images,
    markdown_table,
    mean_and_sd,
    percent,
    tiny_space,
    write_section,
)

from qnas.common import host
from qnas.common.errors import TrainingError
from qnas.data.image_data import ImageData
from qnas.nn import blocks
from qnas.nn.blocks import start_linear
from qnas.nn.subnet import build_subnet
from qnas.search.diagnostics import GUESSING, RISEN
from qnas.spaces.arch import Arch
from qnas.spaces.lower import smallest_and_largest
from qnas.spaces.space import SearchSpace
from qnas.training.loop import set_up_process
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import SubnetTrainer

BASE = Recipe(epochs=5, batch_size=64, resolution_px=32, learning_rate=3e-3, warmup_epochs=0.5)
RATES = (1.0, 3.0, 10.0)  # multiples of the recipe's learning rate
FORMS: dict[str, dict[str, Any]] = {
    "off": {},
    "linear start": {"linear_start": True},
    "linear start, gamma 0.1": {"linear_start": True, "quadratic_gamma": 0.1},
    "linear start, gamma 0.1, beta 0.01": {
        "linear_start": True,
        "quadratic_gamma": 0.1,
        "quadratic_beta": 0.01,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="times the recipe's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5000, help="training images")
    parser.add_argument("--epochs", type=int, default=BASE.epochs)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    space = tiny_space("quadranet-tiny")
    arch = smallest_and_largest(space)[1]
    cache = Cache(options.out / "relinear.jsonl")
    sections = []
    for spec in options.data:
        data = load_images(spec, options.images)
        rows = []
        for form in options.forms:
            cells = []
            for rate in options.rates:
                changes = {
                    **FORMS[form],
                    "epochs": options.epochs,
                    "learning_rate": BASE.learning_rate * rate,
                }
                recipe = BASE.override(changes)
                found = [train(space, arch, data, recipe, seed, cache) for seed in options.seeds]
                cells += describe_runs(found)
            rows.append([form, *cells])
        header = [
            "",
            *(f"{what} at {rate:g}x" for rate in options.rates for what in ("diverged", "accuracy")),
        ]
        sections.append(f"{data.name}:\n\n{markdown_table(header, rows)}")
    how = (
        f"{options.images} training images, {options.epochs} epochs of batches of {BASE.batch_size}, AdamW "
        f"at {BASE.learning_rate:g} and multiples of it, gradients clipped at {BASE.gradient_clip:g}, "
        f"{len(options.seeds)} seeds; {host.cpu_name()}, one thread."
    )
    text = "\n\n".join(["## Quadratic weights let in slowly", how, *sections])
    print(text)
    if options.write:
        write_section(RESULTS, "relinear", text)


def train(
    space: SearchSpace, arch: Arch, data: ImageData, recipe: Recipe, seed: int, cache: Cache
) -> dict[str, Any]:
    """Train the network from scratch. Return whether it `diverged`, and its `accuracy`."""
    parts = {
        "space": space.digest,
        "choices": list(arch.choices),
        "data": data.digest,
        "images": len(data.train_and_heldout),
        "recipe": recipe.values(),
        "start_taps": blocks.ENVELOPE_TAPS,
        "seed": seed,
    }
    known = cache.get(parts)
    if known is not None:
        return known
    begun = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_subnet(space, arch, len(data.classes))
        if recipe.linear_start:
            start_linear(network)
        trainer = SubnetTrainer(network, data, TrainConfig(recipe=recipe, torch_device="cpu", seed=seed))
        losses: list[float] = []
        failed = None
        try:
            while trainer.steps_done < trainer.total_steps:
                row = trainer.step()
                losses += [row["train_loss"]] if "train_loss" in row else []
        except TrainingError:
            failed = trainer.steps_done + 1
    found = {
        "diverged": failed is not None or has_diverged(losses, len(data.classes)),
        "no_number_at_step": failed,
        "losses": losses,
        "accuracy": trainer.accuracy if failed is None else None,
        "seconds": time.process_time() - begun,
    }
    shown = "no number" if failed else percent(trainer.accuracy)
    print(
        f"{data.name}, seed {seed}, rate {recipe.learning_rate:g}: {shown}, {found['seconds']:.0f} s",
        flush=True,
    )
    return cache.put(parts, found)


def has_diverged(losses: Sequence[float], classes: int) -> bool:
    """Whether the mean loss of the last epoch is that of guessing, or far above the lowest one."""
    return losses[-1] > GUESSING * math.log(classes) or losses[-1] > RISEN * min(losses)


def describe_runs(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the number of diverged trainings, and the accuracies of the others."""
    diverged = sum(row["diverged"] for row in found)
    accuracies = [row["accuracy"] for row in found if not row["diverged"]]
    shown = percent(*mean_and_sd(accuracies)) if accuracies else "-"
    return [f"{diverged} of {len(found)}", shown]


if __name__ == "__main__":
    main()
