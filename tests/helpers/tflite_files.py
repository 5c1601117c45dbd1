"""TFLite files of the small networks, each converted once: the converter takes seconds."""

from collections.abc import Callable
from functools import cache

from qnas.deploy.export import tflite_format
from qnas.deploy.export.product import Product

_convert: Callable[[Product, str], bytes] = tflite_format.convert


@cache
def converted(product: Product, where: str = "file") -> bytes:
    """Return a product in float32 as TFLite."""
    return _convert(product, where)
