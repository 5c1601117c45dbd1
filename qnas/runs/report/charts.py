"""Charts as SVG and small pictures as PNG data URIs, which a page can show without scripts or other files.

Charts use the colours of the page's style sheet. They are drawn for a width of 360, so that the text is
readable at the size of a phone.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import compress
from statistics import fmean
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 8, 36  # margins around the plot
TICKS = 5
HEAT = (42, 120, 214)  # visible on white and on black
Points = Sequence[tuple[float, float]]
Mark = Literal["line", "step", "dots", "rings", "star"]


@dataclass(frozen=True)
class Series:
    """A series of points. `colour` is the number of a colour in the style sheet."""

    name: str
    points: Points
    colour: int = 1
    mark: Mark = "line"
    titles: Sequence[str] = ()  # one per point, shown when the pointer is on it


@dataclass(frozen=True)
class Level:
    """A line across the chart at a value of y or x."""

    value: float
    name: str
    across: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class Band:
    """A strip of the chart between two values of x or y."""

    low: float
    high: float
    name: str
    of: Literal["x", "y"] = "x"


def nice_ticks(low: float, high: float, n: int = TICKS) -> list[float]:
    """Return about n round values in [low, high]: multiples of 1, 2 or 5 times a power of ten.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        return [low]
    rough = (high - low) / n
    if not rough > 0:  # too close for a number between them
        return [low]
    scale = 10.0 ** math.floor(math.log10(rough))
    step = min((k * scale for k in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [round(k * step, digits) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values in [low, high] for a logarithmic axis: 1, 2 and 5 times powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    wanted = [k * 10.0**e for e in range(first, last + 1) for k in (1, 2, 5)]
    found = [float(f"{value:.6g}") for value in wanted if low <= value <= high]
    return found if len(found) > 1 else [float(f"{end:.3g}") for end in (low, high)]


@dataclass(frozen=True)
class _Axis:
    """The scale of an axis, from values to coordinates of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, -0.1), 1.1) * (self.end - self.start), 1)


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    bands: Sequence[Band] = (),
    log_x: bool = False,
    percent: bool = False,
    y_ends: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """Return a figure with a chart and its legend, or nothing if no series has points.

    With `percent`, y values are fractions shown in percent. `y_ends` are ends that the y axis must reach.
    """
    drawn = [each for each in map(_finite, series) if each.points]
    if not drawn:
        return Markup("")
    x_values = [x for each in drawn for x, _ in each.points] + [v.value for v in levels if v.across == "x"]
    y_values = [y for each in drawn for _, y in each.points] + [v.value for v in levels if v.across == "y"]
    y_values += [end for end in y_ends if end is not None]
    margin = 0 if all(each.mark == "line" for each in drawn) else 8  # room for points at the ends
    x = _Axis(*_ends(x_values, log=log_x), LEFT + margin, WIDTH - RIGHT - margin, log_x)
    low, high = _ends(y_values, log=False)
    pad = 0.04 * (high - low)
    y = _Axis(
        low if y_ends[0] is not None else low - pad,
        high if y_ends[1] is not None else high + pad,
        HEIGHT - BOTTOM,
        TOP,
    )
    parts = [_band(band, x, y) for band in bands]
    parts += _grid(x, y, percent=percent)
    parts += [_level(level, x, y) for level in levels]
    parts += [_series(each, x, y) for each in drawn]
    middle_y = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">{escape(x_label)}</text>'
    )
    if y_label:
        upright = f"translate(9 {middle_y}) rotate(-90)"
        parts.append(f'<text class="label" transform="{upright}">{escape(y_label)}</text>')
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
    legend = _legend(drawn, levels, bands)
    return Markup(f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}{legend}</figure>')


def _finite(series: Series) -> Series:
    """Return a series without the points of a network that diverged."""
    keep = [all(map(math.isfinite, point)) for point in series.points]
    return replace(
        series,
        points=list(compress(series.points, keep)),
        titles=list(compress(series.titles, keep)),
    )


def _ends(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return (low / 1.05, high * 1.05) if log else (low, high)
    return (low / 2, low * 2) if log else (low - max(abs(low), 1) / 10, low + max(abs(low), 1) / 10)


def _grid(x: _Axis, y: _Axis, *, percent: bool) -> list[str]:
    parts = []
    ticks = nice_ticks(y.low, y.high)
    # as many digits as needed to distinguish neighbours
    digits = 1 if len(ticks) > 1 and ticks[1] - ticks[0] < 0.0099 else 0
    for value in ticks:
        at = y.place(value)
        text = f"{value:.{digits}%}" if percent else f"{value:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 4}" y="{at + 3.5}">{text}</text>')
    for value in log_ticks(x.low, x.high) if x.log else nice_ticks(x.low, x.high):
        at = x.place(value)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 13}">{value:g}</text>')
    return parts


def _band(band: Band, x: _Axis, y: _Axis) -> str:
    if band.of == "x":
        left, right = (min(max(x.place(v), LEFT), WIDTH - RIGHT) for v in (band.low, band.high))
        box: tuple[float, ...] = (left, TOP, right - left, HEIGHT - BOTTOM - TOP)
    else:
        bottom, top = (min(max(y.place(v), TOP), HEIGHT - BOTTOM) for v in (band.low, band.high))
        box = (LEFT, top, WIDTH - RIGHT - LEFT, bottom - top)
    sizes = zip(("x", "y", "width", "height"), box, strict=True)
    attributes = " ".join(f'{name}="{value:.4g}"' for name, value in sizes)
    return f'<rect class="band" {attributes}/>'


def _level(level: Level, x: _Axis, y: _Axis) -> str:
    if level.across == "y":
        return f'<path class="level" d="M{LEFT} {y.place(level.value)}H{WIDTH - RIGHT}"/>'
    return f'<path class="level" d="M{x.place(level.value)} {TOP}V{HEIGHT - BOTTOM}"/>'


def _series(series: Series, x: _Axis, y: _Axis) -> str:
    places = [(x.place(a), y.place(b)) for a, b in series.points]
    if series.mark in ("line", "step"):
        first, *rest = places
        words = [f"M{first[0]:g} {first[1]:g}"]
        for a, b in rest:
            words.append(f"H{a:g}V{b:g}" if series.mark == "step" else f"L{a:g} {b:g}")
        return f'<path class="line c{series.colour}" d="{"".join(words)}"/>'
    titles = series.titles or [""] * len(places)
    return "".join(
        _dot(series, a, b, f"<title>{escape(title)}</title>" if title else "")
        for (a, b), title in zip(places, titles, strict=True)
    )


def _dot(series: Series, a: float, b: float, title: str) -> str:
    if series.mark == "star":
        return f'<path class="dot c{series.colour}" d="{_star(a, b)}">{title}</path>'
    kind = "ring" if series.mark == "rings" else "dot"
    return f'<circle class="{kind} c{series.colour}" cx="{a:g}" cy="{b:g}" r="3.5">{title}</circle>'


def _star(a: float, b: float) -> str:
    corners = []
    for i in range(10):
        radius, angle = (8.0, 3.4)[i % 2], math.pi * (i / 5 - 0.5)
        corners.append(f"{a + radius * math.cos(angle):.1f} {b + radius * math.sin(angle):.1f}")
    return f"M{'L'.join(corners)}Z"


def _legend(series: Sequence[Series], levels: Sequence[Level], bands: Sequence[Band]) -> str:
    entries = [(f"{each.mark} c{each.colour}", each.name) for each in series]
    entries += [("level", each.name) for each in levels] + [("band", each.name) for each in bands]
    named = [(kind, name) for kind, name in dict.fromkeys(entries) if name]
    items = "".join(f'<li><i class="key {kind}"></i>{escape(name)}</li>' for kind, name in named)
    return f'<ul class="legend">{items}</ul>' if items else ""


def thin(points: Points, most: int = 200) -> list[tuple[float, float]]:
    """Reduce to at most `most` points: means over equally many neighbours, and the last point itself."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups[:-1]]
    return [*means, points[-1]]


def heat_map(shares: NDArray[np.float64]) -> str:
    """Return shares (rows, columns) in [0, 1] as a picture with one pixel each, more opaque if higher.

    It has one colour on a transparent background, which suits both light and dark pages.
    """
    rows, columns = shares.shape
    pixels = np.empty((rows, columns, 4), np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = np.rint(255 * np.clip(shares, 0, 1))
    return _data_uri(Image.fromarray(pixels, "RGBA"))


def photograph(image: NDArray[np.uint8]) -> str:
    """Return an image (C, H, W) as a picture, grey or of its first three channels."""
    channels = image[:3] if len(image) >= 3 else image[:1]
    if len(channels) == 1:
        return _data_uri(Image.fromarray(channels[0], "L"))
    return _data_uri(Image.fromarray(np.ascontiguousarray(channels.transpose(1, 2, 0)), "RGB"))


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
