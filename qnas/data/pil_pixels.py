"""The pixels of a Pillow image as networks see them: upright, on white, one byte for each channel.

`deploy.export.standalone` writes the same steps into model.py, and examples/classify.py has them in NumPy.

Images of more than 8 bits become bytes by the significant bits of their data set (`significant_bits`), not by
their own brightness: the upper 8 of these are kept, and larger values are white. Pillow reads the upper 8
bits of 16-bit colours, which are therefore refused if fewer than 16 are significant. torchvision reads all 16
of a PNG, but some damaged ones end the process (version 0.29).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

FULL_BITS = 16  # significant bits of an image with more than 8, unless its data set has fewer


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as the orientation in its EXIF says, 1 to 8; one that cannot be read is none."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> Any:
    """Return the orientation in an image's EXIF, 1 if there is none."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF, which raises anything, beside pixels that are whole
        return 1


def on_white(image: Image.Image) -> Image.Image:
    """Compose a transparent image on white: colours that nobody sees do not count."""
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    whole = Image.new("RGB", image.size, "white")
    whole.paste(image, mask=image)
    return whole


def to_bytes(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Keep the upper 8 of the significant bits of whole numbers; larger ones are white."""
    upper: NDArray[np.uint8] = (np.clip(values, 0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)
    return upper


def lacks_bits(image: Image.Image) -> bool:
    """Whether an image that is not yet decoded has 16-bit colours, of which Pillow keeps the upper 8 bits."""
    return ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I")


def pil_pixels(image: Image.Image, bits: int = 16) -> Tensor:
    """Convert a PIL image to uint8 (1 or 3, H, W). Values of more than 8 bits have `bits` significant ones.

    Raises ValueError for more than 16 bits, floats outside 0 to 1, and 16-bit colours if `bits` are fewer,
    since Pillow keeps only the upper 8 of the 16.
    """
    if bits < 16 and lacks_bits(image):
        found = f"Pillow reads 8 of the 16 bits of its colours, of which {bits} are significant"
        raise ValueError(f"{found}: convert it to 8 bits")
    image.load()
    image = upright(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a pixel")
        pixels = to_bytes(values, bits)
        if isinstance(clear := image.info.get("transparency"), int):
            pixels[values == clear] = 255
        return torch.from_numpy(pixels)[None]
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= -0.001 and high <= 1.001):  # also true for NaN
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}, expected 0 to 1")
        return torch.from_numpy((values.clip(0, 1) * 255).round().astype(np.uint8))[None]
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = on_white(image)
    mode = "L" if is_grey else "RGB"
    whole: Tensor = tv.pil_to_tensor(image if image.mode == mode else image.convert(mode))
    return whole
