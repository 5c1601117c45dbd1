"""Write scikit-learn's digits as a folder of images: FOLDER/train/CLASS/N.png, FOLDER/test/CLASS/N.png.

python examples/digits_folder.py FOLDER [IMAGES A CLASS]
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path, images_a_class: int) -> None:
    """Write the first images of each class: four of five for training, one of five for testing."""
    digits = load_digits()
    written: Counter[int] = Counter()
    for pixels, label in zip(digits.images, digits.target.tolist(), strict=True):
        number = written[label]
        if number == images_a_class:
            continue
        written[label] += 1
        part = "test" if number % 5 == 4 else "train"
        path = folder / part / str(label) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.rint(pixels * (255 / 16)).astype(np.uint8)  # (8, 8), from 0 to 16
        Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
