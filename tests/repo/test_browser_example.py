"""The page that classifies an image, in a browser: its pixels, its probabilities, and what it shows."""

import runpy
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chromium import BROWSER, Page, browser
from helpers.odd_images import write_all_kinds
from helpers.photographed import train_on_photos
from helpers.places import ROOT
from PIL import Image

from qnas.deploy.export_run import ExportRequest, export_trained

EXAMPLES = ROOT / "examples"
CLASSIFY = runpy.run_path(str(EXAMPLES / "classify.py"))
NPM = shutil.which("npm")
LOSSLESS = (".png", ".gif", ".bmp")  # of the formats that a browser reads

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt install chromium)")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder to this machine; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        yield found


def prepared(page: Page, path: str, *options: Any) -> Any:
    """Return what the page's own module makes of an image: bytes, or the message of an error."""
    given = ", ".join("true" if o is True else "false" if o is False else str(o) for o in options)
    return page.value(
        "import('./pixels.js').then(async m => {"
        f"const file = await (await fetch('{path}')).blob();"
        f"return m.prepare(file, {given}).then(Array.from, error => error.message)}})"
    )


@pytest.mark.parametrize(("px", "channels", "pads"), [(8, 3, False), (33, 1, True), (96, 3, False)])
def test_the_page_prepares_images_as_the_training_does(
    page: Page, px: int, channels: int, pads: bool, tmp_path: Path
) -> None:
    """Every pixel of every kind of lossless image, also of odd sizes."""
    site = shutil.copytree(EXAMPLES / "browser", tmp_path / "site")
    paths = [path for path in write_all_kinds(site / "images") if path.suffix in LOSSLESS]
    assert len(paths) >= 100
    with served(site) as address:
        page.open(f"{address}/pixels.js")
        for path in paths:
            found = prepared(page, f"/{path.relative_to(site)}", px, channels, 16, pads)
            assert not isinstance(found, str), f"{path.name}: {found}"
            with Image.open(path) as image:
                expected = CLASSIFY["prepare"](image, px, channels, 16, pads)
            # a browser does not tell a colour that happens to be white from grey, which stays 255
            off = 1 if channels == 1 and path.name.startswith("1x1") else 0
            difference = np.abs(np.reshape(found, expected.shape) - expected.astype(int)).max()
            assert difference <= off, path.name


def test_a_photograph_is_decoded_as_in_python_but_for_rounding(page: Page, tmp_path: Path) -> None:
    """A JPEG that is not much larger than needed, which Pillow decodes whole too."""
    site = shutil.copytree(EXAMPLES / "browser", tmp_path / "site")
    paths = [path for path in write_all_kinds(site / "images") if path.suffix in (".jpg", ".jfif")]
    with served(site) as address:
        page.open(f"{address}/pixels.js")
        for path in paths:
            with Image.open(path) as image:
                expected = CLASSIFY["prepare"](image, 96, 3)
            found = prepared(page, f"/{path.relative_to(site)}", 96, 3)
            assert np.abs(np.reshape(found, expected.shape) - expected.astype(int)).max() <= 2, path.name


def test_what_a_browser_cannot_read_as_the_training_did_is_refused(page: Page, tmp_path: Path) -> None:
    site = shutil.copytree(EXAMPLES / "browser", tmp_path / "site")
    (path,) = (path for path in write_all_kinds(site / "images", 12) if path.name == "24x24-deep.png")
    with served(site) as address:
        page.open(f"{address}/pixels.js")
        found = prepared(page, f"/{path.relative_to(site)}", 8, 3, 12)
    assert found == "a browser reads 8 of its 16 bits, of which 12 are significant"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as the guide sets it up: npm's onnxruntime-web, a network and its card; images beside."""
    folder = tmp_path_factory.mktemp("browser")
    site = shutil.copytree(EXAMPLES / "browser", folder / "site")
    if NPM is None:
        pytest.skip("no npm here")
    try:
        subprocess.run([NPM, "install"], cwd=site, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install onnxruntime-web: {str(error.stderr)[-200:]}")
    train_on_photos(folder, 16, 24)
    for precision in ("fp32", "fp16", "int8"):
        # this is no test of accuracy: two classes that differ in nothing
        request = ExportRequest(formats=["onnx"], precision=precision, images=40, max_drop=1.0)
        export_trained(folder / "run", site, request)
    write_all_kinds(site / "images")
    return site


@pytest.mark.slow
@pytest.mark.parametrize("model", ["model.onnx", "model_fp16.onnx", "model_int8.onnx"])
def test_the_page_gives_the_probabilities_of_the_example_in_python(
    page: Page, site: Path, model: str
) -> None:
    network = CLASSIFY["read"](site / model)
    with served(site) as address:
        page.open(f"{address}/index.html?model={model}")
        page.value(
            "import('./classify.js').then(async m => {"
            f"window.network = await m.load(new URL('{model}', location.href)); window.m = m}})"
        )
        for path in sorted((site / "images").rglob("*x*-clear.png")):
            found = page.value(
                f"fetch('/{path.relative_to(site)}').then(answer => answer.blob())"
                ".then(file => m.classify(network, file))"
            )
            expected = CLASSIFY["classify"](network, path)
            assert [each["name"] for each in found] == [name for _, name in expected], path.name
            shares = [each["share"] for each in found]
            assert shares == pytest.approx([share for share, _ in expected], abs=1e-4), path.name


@pytest.mark.slow
def test_a_person_chooses_an_image_and_sees_its_classes(page: Page, site: Path) -> None:
    page.problems.clear()
    page.requests.clear()
    (path,) = (site / "images").rglob("97x40-turned.png")
    with served(site) as address:
        page.open(f"{address}/index.html")
        until(page, "!document.getElementById('choose').disabled")
        said = page.value("document.getElementById('said').textContent")
        assert said == "A network of 2 classes, for images of 24 x 24 pixels."
        page.choose("#choose", path)
        until(page, "document.querySelectorAll('#classes li').length")
        shown = page.value("[...document.querySelectorAll('#classes li')].map(row => row.textContent.trim())")
        assert all(asked.startswith((address, "blob:", "data:")) for asked in page.requests), page.requests
    expected = CLASSIFY["classify"](CLASSIFY["read"](site / "model.onnx"), path)
    assert shown == [f"{share:.2%} {name}" for share, name in expected]
    assert page.problems == []


def until(page: Page, condition: str) -> None:
    """Wait until an expression of the page is true. Fails with what the page says after a minute."""
    end = time.monotonic() + 60
    while not page.value(condition):
        assert time.monotonic() < end, (page.value("document.body.innerText"), page.problems)
        time.sleep(0.1)
