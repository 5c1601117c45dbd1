"""Small PNG pictures as data URIs: heat maps of probabilities, and images of a data set."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOUR = (42, 120, 214)  # seen on white and on black


def heat_map(shares: NDArray[np.float64]) -> str:
    """Return shares (rows, columns) in [0, 1] as a picture of as many pixels, the higher the denser.

    One colour on nothing, so that it suits a light page and a dark one.
    """
    rows, columns = shares.shape
    pixels = np.empty((rows, columns, 4), np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = np.rint(255 * np.clip(shares, 0, 1))
    return _data_uri(Image.fromarray(pixels, "RGBA"))


def photograph(image: NDArray[np.uint8]) -> str:
    """Return an image (C, H, W) of one, three or other channels, of which the first three are shown."""
    channels = image[:3] if len(image) >= 3 else image[:1]
    if len(channels) == 1:
        return _data_uri(Image.fromarray(channels[0], "L"))
    return _data_uri(Image.fromarray(np.ascontiguousarray(channels.transpose(1, 2, 0)), "RGB"))


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
