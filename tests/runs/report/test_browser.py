"""The page in a browser: three widths, both schemes, printed. Debian's package is `chromium`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.chromium import BROWSER, Page, browser
from helpers.finished_runs import make_record
from helpers.run_documents import documents_of, value_at
from PIL import Image

from qnas.runs.names import REPORT_FILE
from qnas.runs.report.page import write_report
from qnas.spaces.space import load_space

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt install chromium)")

WIDTHS = (360, 820, 1400)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a space with many positions, with long names."""
    folder = tmp_path_factory.mktemp("large")
    make_record(folder, load_space("quadranet-mobile"), share=0.4, data="imagefolder:/" + 30 * "a-long-name/")
    write_report(folder)
    return folder


@pytest.fixture(params=["whole", "large"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_nothing_goes_wrong(
    page: Page, folder: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    page.problems.clear()
    page.requests.clear()
    page.open(folder / REPORT_FILE, width=width, dark=dark)
    page.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.value("document.documentElement.scrollWidth") <= width
    # what is wider scrolls by itself, in a table's own box
    wide = page.value(
        "[...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll') && !e.closest('svg') "
        f"&& e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 200))"
    )
    assert wide == []
    assert page.problems == []
    asked = [address for address in page.requests if not address.startswith("data:")]
    assert asked == [(folder / REPORT_FILE).resolve().as_uri()]
    broken = page.value("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width
        brightness = np.asarray(image.convert("L")).mean()
    assert brightness < 70 if dark else brightness > 185


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(page: Page, folder: Path, dark: bool) -> None:
    """At least 4.5 to 1 (WCAG AA) between text and page, by the colours in use."""
    page.open(folder / REPORT_FILE, width=820, dark=dark)

    def bright(name: str) -> float:
        style = "getComputedStyle(document.documentElement)"
        return luminance(page.value(f"{style}.getPropertyValue('{name}')"))

    for name in ("--ink", "--quiet", "--c1"):
        darker, lighter = sorted((bright("--page"), bright(name)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb` (WCAG 2)."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_numbers_that_are_seen_are_those_of_the_files(page: Page, whole: Path) -> None:
    page.open(whole / REPORT_FILE, width=820, dark=False)
    page.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    seen = page.value(
        "[...document.querySelectorAll('data[data-key]')].filter(e => e.checkVisibility())"
        ".map(e => [e.dataset.key, e.value, e.innerText])"
    )
    assert len(seen) > 40
    documents = documents_of(whole)
    for key, value, text in seen:
        assert json.loads(value) == value_at(documents, key)
        assert text.strip()


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_text_is_large_enough_to_read(page: Page, whole: Path, width: int) -> None:
    page.open(whole / REPORT_FILE, width=width, dark=False)
    heights = page.value(
        "[...document.querySelectorAll('.chart text')].map(e => e.getBoundingClientRect().height)"
    )
    rotated = 40  # a label that stands upright is as high as it is long
    assert min(height for height in heights if height < rotated) >= 9


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_written_over_something_else(page: Page, folder: Path, width: int) -> None:
    """Texts of a chart lie apart, and what stands in a table's or a heat map's column stays in it."""
    page.open(folder / REPORT_FILE, width=width, dark=False)
    over = page.value(
        "[...document.querySelectorAll('.chart svg')].flatMap(svg => {"
        "const all = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);"
        "return all.flatMap(([a, p], i) => all.slice(i + 1).filter(([b, q]) => p.left < q.right - 1 && "
        "q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1).map(([b]) => `${a}, ${b}`))})"
    )
    assert over == []
    spilled = page.value(
        "[...document.querySelectorAll('.heat div, .block > span, .tiles div, td, th')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 200))"
    )
    assert spilled == []


def test_it_prints_with_what_is_folded_away(page: Page, whole: Path, tmp_path: Path) -> None:
    page.open(whole / REPORT_FILE, width=820, dark=True)
    tables = "[...document.querySelectorAll('details table')]"
    seen = f"{tables}.filter(e => e.getBoundingClientRect().height > 0 && e.checkVisibility()).length"
    assert page.value(seen) == 0
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.value(seen) == page.value(f"{tables}.length") >= 2
    assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    # dark ink on white paper, whatever the scheme
    assert luminance(page.value("getComputedStyle(document.documentElement).getPropertyValue('--ink')")) < 0.1
    assert page.pdf().startswith(b"%PDF")


def test_a_page_that_asks_for_something_is_caught(page: Page, whole: Path, tmp_path: Path) -> None:
    """The checks themselves: a request, an error and an overflow are seen."""
    shutil.copy(whole / REPORT_FILE, tmp_path / "bad.html")
    text = (tmp_path / "bad.html").read_text()
    bad = '<img src="http://127.0.0.1:9/x.png"><div style="width: 3000px">x</div><script>throw 1</script>'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    (tmp_path / "bad.html").write_text(text.replace(policy, "").replace("</body>", f"{bad}</body>"))
    page.problems.clear()
    page.requests.clear()
    page.open(tmp_path / "bad.html", width=360, dark=False)
    assert page.value("document.documentElement.scrollWidth") > 360
    assert any(address.startswith("http://127.0.0.1:9/") for address in page.requests)
    assert page.problems
    (tmp_path / "bad.html").write_text(text.replace("</body>", f"{bad}</body>"))
    page.problems.clear()
    page.open(tmp_path / "bad.html", width=360, dark=False)
    assert any("Content Security Policy" in problem for problem in page.problems)
