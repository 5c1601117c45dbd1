"""Classify one image with an exported network: onnxruntime, NumPy and Pillow, no qnas.

python examples/classify.py MODEL.onnx IMAGE
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def classify(session: onnxruntime.InferenceSession, image: str | Path) -> list[tuple[float, str]]:
    """Return each class with its probability, the most probable first."""
    (wanted,) = session.get_inputs()
    _, channels, height, width = wanted.shape  # (batch, C, H, W)
    known = session.get_modelmeta().custom_metadata_map
    classes, mean, std = (json.loads(known[name]) for name in ("classes", "mean", "std"))
    # as in the file's metadata: the central square, resized; 0 to 1, minus mean, over std
    picture = Image.open(image).convert("L" if channels == 1 else "RGB")
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels) / 255
    pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    (logits,) = session.run(None, {wanted.name: pixels.transpose(2, 0, 1)[None]})
    shares = np.exp(logits[0] - logits[0].max())
    shares /= shares.sum()
    return sorted(zip(shares.tolist(), classes, strict=True), reverse=True)


def main(model: str, image: str) -> None:
    """Print the three most probable classes."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for share, name in classify(session, image)[:3]:
        print(f"{share:7.2%}  {name}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
