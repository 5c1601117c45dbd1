"""Make the pictures of the README and the site: a run's page, and its Pareto front.

    python docs/make_pictures.py [RUN] [--out docs/images]

Without RUN, the demo is searched and trained first (minutes). Needs Chromium (`apt install chromium`).
RUN itself is not changed: the script works on a copy.
"""

import argparse
import base64
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.chromium import browser  # noqa: E402  # of the tests, which no installation has

DEMO = (("search", "--device", "vpu", "--budget", "30ms", "--out"), ("train-subnet",))
PARETO_DEVICES = "cpu,vpu"
PAGE_WIDTH_PX, PAGE_HEIGHT_PX = 1000, 1250
COLOURS = 128  # a palette keeps a screenshot below 200 kB
LARGEST_BYTES = 200_000


def run_qnas(*words: str | Path) -> None:
    """Run a command of qnas with this Python."""
    subprocess.run([sys.executable, "-m", "qnas.commands", *map(str, words)], check=True)


def write_small(png: bytes, path: Path) -> None:
    """Write a picture with a palette, as small as PNG makes it."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS)
    picture.save(path, optimize=True)
    size = path.stat().st_size
    assert size <= LARGEST_BYTES, f"{path}: {size} bytes, more than {LARGEST_BYTES}"
    print(f"{path}: {picture.width} x {picture.height} px, {size // 1000} kB")


def screenshot(page: Path) -> bytes:
    """Return the top of a page as a PNG."""
    with browser() as tab:
        tab.open(page, width=PAGE_WIDTH_PX, dark=False)
        clip = {"x": 0, "y": 0, "width": PAGE_WIDTH_PX, "height": PAGE_HEIGHT_PX, "scale": 1}
        shown = tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    return base64.b64decode(shown["data"])


def make_pictures(run: Path | None, out: Path) -> None:
    """Write run-page.png and pareto-front.png."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "union-mobile-vpu-30ms"
        if run is None:
            for words in DEMO:
                run_qnas(*words, work)
        else:
            shutil.copytree(run, work)
        run_qnas("pareto", work, "--device", PARETO_DEVICES, "--force", "--quiet")
        write_small((work / "pareto" / "pareto.png").read_bytes(), out / "pareto-front.png")
        run_qnas("report", work)
        write_small(screenshot(work / "report.html"), out / "run-page.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="?", type=Path, help="a finished search; default: the demo, searched anew"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    make_pictures(given.run, given.out)
