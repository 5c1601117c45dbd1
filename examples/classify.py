"""Classify one image with an exported network: NumPy, Pillow and the file's own runtime, no qnas.

python examples/classify.py MODEL IMAGE

MODEL is .onnx (onnxruntime), .xml (openvino), .tflite (ai-edge-litert) or .pt2 (torch); model.py classifies
by itself. The image becomes the same pixels as in the training. HEIC needs the package pillow-heif, and
`pillow_heif.register_heif_opener()` before.
"""

from __future__ import annotations  # Python 3.9, the last with a plugin for the Neural Compute Stick

import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# by the orientations 2 to 8
TURNS = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"),
    *("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)


class Network(NamedTuple):
    """A loaded file: the shape of its input, what it says of itself, and the function that it computes."""

    shape: tuple[int, int, int]  # channels, height and width of an image
    known: Mapping[str, str]  # its metadata; lists as JSON
    run: Callable[[np.ndarray], np.ndarray]  # (1, C, H, W), normalised float32 -> logits (1, classes)


def read_onnx(path: Path) -> Network:
    """Load an .onnx with onnxruntime."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    known = session.get_modelmeta().custom_metadata_map
    return Network(tuple(wanted.shape[1:]), known, lambda images: session.run(None, {wanted.name: images})[0])


def read_openvino(path: Path) -> Network:
    """Load an .xml, with the .bin beside it, with OpenVINO."""
    core = importlib.import_module("openvino").Core()
    model = core.read_model(str(path))
    shape = tuple(size.get_length() for size in list(model.input(0).partial_shape)[1:])
    known = {key: value.astype(str) for key, value in model.rt_info["model_info"].items()}
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return Network(shape, known, lambda images: compiled(images)[0])


def read_tflite(path: Path) -> Network:
    """Load a .tflite with LiteRT; its input is (1, H, W, C)."""
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(path))
    interpreter.allocate_tensors()
    (wanted,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(path.read_bytes())
    entries = (model.Metadata(number) for number in range(model.MetadataLength()))
    (entry,) = (entry for entry in entries if entry.Name() == b"qnas")
    known = json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(wanted["index"], images.transpose(0, 2, 3, 1))
        interpreter.invoke()
        logits: np.ndarray = interpreter.get_tensor(given["index"])
        return logits

    _, height, width, channels = wanted["shape"].tolist()
    return Network((channels, height, width), known, run)


def read_torch(path: Path) -> Network:
    """Load a .pt2 with torch."""
    extra = {"metadata.json": ""}
    program = importlib.import_module("torch").export.load(path, extra_files=extra)
    (wanted,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    known = json.loads(extra["metadata.json"])
    return Network(tuple(wanted.meta["val"].shape[1:]), known, by_torch(program.module()))


def read_aot(path: Path) -> Network:
    """Load an _aot.pt2, which is compiled for one kind of processor, with torch."""
    compiled = importlib.import_module("torch._inductor").aoti_load_package(str(path))
    known = compiled.get_metadata()
    px = int(known["input"].removesuffix(" px").rpartition(" ")[2])  # it does not tell its shapes
    return Network((len(json.loads(known["mean"])), px, px), known, by_torch(compiled))


def by_torch(network: Callable[..., Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of arrays that computes what a function of tensors does."""
    torch = importlib.import_module("torch")

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = network(torch.from_numpy(images)).numpy()
        return logits

    return run


READERS: dict[str, Callable[[Path], Network]] = {
    ".onnx": read_onnx,
    ".xml": read_openvino,
    ".tflite": read_tflite,
    "_aot.pt2": read_aot,
    ".pt2": read_torch,
}


def read(path: Path) -> Network:
    """Load an exported file with the runtime of its format."""
    for ending, reader in READERS.items():
        if path.name.endswith(ending):
            return reader(path)
    raise SystemExit(f"{path}: expected a file that ends in {', '.join(READERS)}")


def classify(network: Network, image: str | Path) -> list[tuple[float, str]]:
    """Return each class with its probability, the most probable first."""
    channels, px, _ = network.shape
    known = {"significant_bits": "16", "pads": "false"} | dict(network.known)
    keys = ("classes", "mean", "std", "significant_bits", "pads")
    classes, mean, std, bits, pads = (json.loads(known[key]) for key in keys)
    with Image.open(image) as picture:
        pixels = prepare(picture, px, channels, bits, pads).astype(np.float32) / 255
    pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    logits = network.run(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))[0]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return sorted(zip(shares.tolist(), classes, strict=True), reverse=True)


def prepare(picture: Image.Image, px: int, channels: int, bits: int = 16, pads: bool = False) -> np.ndarray:
    """Return the central square of an image at px x px pixels, as bytes (px, px, channels)."""
    # a large JPEG is decoded at a fraction of its size, at least twice as large as is needed
    width, height = (math.ceil(2 * px * side / min(picture.size)) for side in picture.size)
    picture.draft("", (width, height))
    pixels = decode(picture, bits)
    if channels == 1 and pixels.shape[2] == 3:
        pixels = grey(pixels)
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    pixels = pixels[top : top + side, left : left + side]
    if pads and side < px < 1.5 * side:  # slightly smaller images get a black border
        before = (px - side) // 2
        pixels = np.pad(pixels, ((before, px - side - before),) * 2 + ((0, 0),))
    return np.broadcast_to(resize(pixels, px), (px, px, channels))


def decode(picture: Image.Image, bits: int) -> np.ndarray:
    """Return the bytes of an image (H, W, 1 or 3), upright by its EXIF, and on white if it is transparent."""
    if bits < 16 and ";16" in str(getattr(picture, "tile", "")) and picture.mode[0] != "I":
        raise ValueError(f"Pillow reads 8 of its 16 bits, of which {bits} are significant")
    picture.load()
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF beside whole pixels
        orientation = 1
    if orientation in range(2, 9):
        picture = picture.transpose(Image.Transpose[TURNS[int(orientation) - 2]])
    if picture.mode[0] == "I":  # 16 bits, of which the upper 8 of the significant ones are kept
        values = np.asarray(picture)
        pixels = values.clip(0, 2**bits - 1) >> (bits - 8)
        if isinstance(clear := picture.info.get("transparency"), int):
            pixels[values == clear] = 255
        return pixels.astype(np.uint8)[..., None]
    if picture.mode == "F":  # floats from 0 to 1
        return (np.asarray(picture).clip(0, 1) * 255).round().astype(np.uint8)[..., None]
    is_grey = picture.mode in ("1", "L", "LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture)
        picture = white
    pixels = np.asarray(picture.convert("L" if is_grey else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def grey(pixels: np.ndarray) -> np.ndarray:
    """Return colours as grey, (H, W, 3) -> (H, W, 1), rounded as torchvision's multiply-adds are."""
    red, green, blue = (pixels[..., i].astype(np.float32) for i in range(3))
    total = (red * np.float32(0.2989)).astype(np.float64)
    for share, colour in ((0.587, green), (0.114, blue)):
        total = (total + float(np.float32(share)) * colour).astype(np.float32).astype(np.float64)
    return total.astype(np.uint8)[..., None]


def resize(pixels: np.ndarray, px: int) -> np.ndarray:
    """Resize a square image (S, S, C) to (px, px, C): bilinear, antialiased, as torch does it with bytes.

    Weights are whole numbers of at most 15 bits, and columns are resized before rows.
    """
    size = len(pixels)
    if size == px:
        return pixels
    scale = size / px
    reach = max(scale, 1.0)
    weights = np.zeros((px, size))
    for i in range(px):
        centre = scale * (i + 0.5)
        near = np.arange(max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), size))
        weights[i, near] = np.maximum(1 - abs(near - centre + 0.5) / reach, 0)
    weights /= weights.sum(1, keepdims=True)
    bits = 14
    while bits < 22 and int(weights.max() * 2 ** (bits + 1) + 0.5) < 2**15:
        bits += 1
    weights = np.floor(weights * 2**bits + 0.5)
    for _ in range(2):  # (rows, columns, C) -> (new columns, rows, C) -> (new rows, new columns, C)
        sums = np.einsum("nc,rck->nrk", weights, pixels.astype(np.float64))
        pixels = np.floor(sums / 2**bits + 0.5).clip(0, 255).astype(np.uint8)
    return pixels


def main(model: str, image: str) -> None:
    """Print the three most probable classes."""
    for share, name in classify(read(Path(model)), image)[:3]:
        print(f"{share:7.2%}  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
