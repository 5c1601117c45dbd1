"""Small data sets of pictures on disk, for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qnas.data.batches import batches
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec

PX = 16


def png(colour: tuple[int, int, int], px: int = PX) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((px, px, 3), colour, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def numbered(root: Path, counts: dict[str, int]) -> Path:
    """Write folders of plain images; image number i of class number c has the colour (i, c, 7)."""
    for c, (folder, count) in enumerate(counts.items()):
        for i in range(count):
            path = root / folder / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png((i, c, 7)))
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_digits(folder: Path, shards: int = 4) -> Path:
    """Write scikit-learn's digits as shards."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    members: list[tuple[str, bytes]] = []
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = io.BytesIO()
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(file, "png")
        members += [(f"{i:04}.png", file.getvalue()), (f"{i:04}.cls", b"%d" % label)]
    size = 2 * -(-len(members) // (2 * shards))
    for number in range(shards):
        write_tar(folder / f"digits-{number:06}.tar", members[number * size : (number + 1) * size])
    return folder


def samples(root: Path, folders: Iterable[str]) -> list[tuple[str, bytes]]:
    """Return class folders as members of a shard, class by class, with names as labels."""
    return [
        member
        for folder in folders
        for image in sorted((root / folder).iterdir())
        for member in (
            (f"{folder.replace('/', '-')}-{image.stem}.png", image.read_bytes()),
            (f"{folder.replace('/', '-')}-{image.stem}.cls", Path(folder).name.encode()),
        )
    ]


def load(where: Path, kind: str = "imagefolder", **options: Any) -> ImageData:
    return load_data(parse_data_spec(f"{kind}:{where}"), **{"resolution_px": PX, "quiet": True, **options})


def numbers(split: Split) -> list[tuple[int, int]]:
    """Return (image, class) as written into the colour by `numbered`."""
    images = split.read(torch.arange(len(split)))
    return [(int(i), int(c)) for i, c in images[:, :2, 0, 0]]


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, quality=95)


def flat(colour: tuple[int, int, int], px: int = PX) -> np.ndarray[Any, Any]:
    return np.full((px, px, 3), colour, dtype=np.uint8)


def pack(root: Path, target: Path, prefix: str = "") -> Path:
    with tarfile.open(target, "w:gz") as tar:
        for path in sorted(root.rglob("*"), reverse=True):
            tar.add(path, f"{prefix}{path.relative_to(root)}", recursive=False)
    return target


def collect(split: Split, batch_size: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches(split, batch_size, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def photo(seed: int, px: int = 96) -> Image.Image:
    """Return a picture with shapes as a photograph has them: smooth noise of many sizes, in colour."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((px, px, 3))
    for size in (3, 6, 12, 24):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((px, px), Image.Resampling.BICUBIC), float) / size
    picture = 255 * (picture - picture.min()) / np.ptp(picture)
    return Image.fromarray(picture.astype(np.uint8))
