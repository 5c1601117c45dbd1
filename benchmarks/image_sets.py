"""Large sets of images, made in seconds, and what qnas needs to start with one and to read it.

    python benchmarks/image_sets.py shards:DIR --resolution 64 [--limit 0] [--batches 40] [--batch 128]

Measures one set in a fresh process and prints a JSON object, for `benchmarks/scale.py`.

Of a set, some images are drawn and encoded. The rest of a folder are links to them, those of a shard have the
same bytes, and the shards are links to one shard. Each image has a name of its own: qnas lists, checks and
decodes each by itself. The files are read from the system's memory: the disk is not measured.
"""

import argparse
import io
import itertools
import json
import os
import resource
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIFFERENT = 1000  # images that are drawn
CLASSES = 100
SHARD = 10_000  # images of a shard
ROUNDS = 3


def draw_images(count: int, size: tuple[int, int], seed: int = 0) -> list[bytes]:
    """Draw smooth images of this width and height with some noise, and return them as JPEG files."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = pixels + rng.normal(0, 6, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        found.append(file.getvalue())
    return found


def make_shards(folder: Path, images: int, drawn: list[bytes]) -> str:
    """Write tar shards with this many images, a multiple of a shard's or fewer; return the kind of data."""
    folder.mkdir(parents=True)
    each = min(images, SHARD)
    assert images % each == 0, images
    first = folder / f"{0:06}.tar"
    with tarfile.open(first, "w") as shard:
        for number in range(each):
            members = {"jpg": drawn[number % len(drawn)], "cls": str(number % CLASSES).encode()}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{number:06}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    for number in range(1, images // each):
        os.link(first, folder / f"{number:06}.tar")
    return f"shards:{folder}"


def make_folder(folder: Path, images: int, drawn: list[bytes]) -> str:
    """Write class folders with this many images; return the kind of data."""
    (folder / "drawn").mkdir(parents=True)
    sources = []
    for number, content in enumerate(drawn):
        sources.append(folder / "drawn" / f"{number}.jpg")
        sources[-1].write_bytes(content)
    for label in range(CLASSES):
        (folder / "set" / f"{label:03}").mkdir(parents=True)
    for number, source in zip(range(images), itertools.cycle(sources), strict=False):
        os.link(source, folder / "set" / f"{number % CLASSES:03}" / f"{number:07}.jpg")
    return f"imagefolder:{folder / 'set'}"


MAKERS = {"shards": make_shards, "imagefolder": make_folder}


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(
    spec: str, resolution_px: int, limit_bytes: int | None, batch: int, batches: int
) -> dict[str, Any]:
    """Open a set and read some batches of a search, of which the first needs the order of an epoch."""
    from qnas.data.lazy_images import LazyImages
    from qnas.data.loading import MEMORY_LIMIT_BYTES, load_data
    from qnas.data.sources import parse_data_spec
    from qnas.training.loop import set_up_process, stream

    set_up_process(1)  # decoding has threads of its own
    before, start, used = peak_bytes(), time.perf_counter(), time.process_time()
    limit = MEMORY_LIMIT_BYTES if limit_bytes is None else limit_bytes
    data = load_data(parse_data_spec(spec), resolution_px=resolution_px, memory_limit_bytes=limit, quiet=True)
    found: dict[str, Any] = {
        "start_s": time.perf_counter() - start,
        "start_core_s": time.process_time() - used,
        "images": sum(data.counts.values()),
        "in_memory": not isinstance(data.train.images, LazyImages),
    }
    pipeline, start = stream(data.train, batch, 0, 0, augment=True), time.perf_counter()
    next(pipeline)
    found["first_batch_s"] = time.perf_counter() - start
    rates = []
    for _ in range(ROUNDS):
        start, used = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(pipeline)
        spent = time.perf_counter() - start, time.process_time() - used
        rates.append([batch * batches / seconds for seconds in spent])
    found["images_per_s"], found["images_per_core_s"] = (
        sorted(row)[ROUNDS // 2] for row in zip(*rates, strict=True)
    )
    return found | {"held_bytes": peak_bytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--limit", type=int, help="bytes of decoded images that are kept; default: qnas's")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40, help="of each of the rounds")
    options = parser.parse_args()
    found = measure(options.data, options.resolution, options.limit, options.batch, options.batches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
