"""A small network trained on images of every kind."""

from pathlib import Path

from helpers.odd_images import write_all_kinds
from helpers.tiny import TINY_SPACE

from qnas.common.files import write_json
from qnas.data.loading import load_data
from qnas.runs.found_arch import FoundArch
from qnas.spaces.arch import arch_document, make_arch
from qnas.spaces.space import parse_space
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import train_subnet


def train_on_photos(folder: Path, bits: int, px: int) -> None:
    """Write images of two classes into `photos`, and train a network at a resolution on them in `run`."""
    for part in ("train", "test"):
        write_all_kinds(folder / "photos" / part, bits)
    space = parse_space(TINY_SPACE, "tiny.yaml")
    arch = make_arch(space, ("quadra_k3_e2", "quadra_k5_e4", "quadra_k3_e2", "identity"))
    run, given = folder / "run", f"imagefolder:{folder / 'photos'}"
    document = arch_document(space, arch, {})
    write_json(run / "arch.json", document)
    data = load_data(given, resolution_px=px, quiet=True)
    recipe = Recipe(epochs=3, resolution_px=px, batch_size=32, learning_rate=1e-2, warmup_epochs=1)
    train_subnet(
        FoundArch(space, arch, document, run),
        data,
        TrainConfig(recipe=recipe),
        run / "subnet",
        {"data": given, "data_digest": data.digest, "versions": {}},
        from_supernet=False,
    )
