"""Training, held-out and test images of a data set, the missing splits drawn from the training images.

Splits are stratified. They are drawn with a constant instead of the run's seed: runs with different seeds
select on the same images, so they can be compared. Broken images are removed after the splits are drawn, so
that repairing an image does not change the splits of the others.
"""

import numpy as np

from qnas.common.errors import DataError
from qnas.common.text import shown
from qnas.data.broken_images import BrokenImages
from qnas.data.image_files import ImageNumbers, Labels
from qnas.data.labelled_images import LabelledImages

SPLITS = ("train", "heldout", "test")
TEST_FRACTION = 0.2  # if the data set has no test images

# Constant seeds, so that splits are the same in every run; two of them, so that the draws are independent.
_TEST_DRAW = 20231117
_HELDOUT_DRAW = 19560


def complete_splits(source: LabelledImages, heldout_fraction: float) -> dict[str, ImageNumbers]:
    """Return the image numbers of each split. Missing splits are taken from the training images.

    Raises DataError for a class with too few training images.
    """
    splits = dict(source.splits)
    to_take = [split for split in ("test", "heldout") if split not in splits]
    counts = np.bincount(source.targets[splits["train"]], minlength=len(source.classes))
    fewest = int(counts.argmin())
    if counts[fewest] <= len(to_take):
        raise DataError(
            f"{source.source}: class '{shown(source.classes[fewest])}' has {counts[fewest]} training images, "
            f"expected at least {len(to_take) + 1}, as {' and '.join(to_take)} images are split off"
        )
    for split in to_take:
        draw, fraction = (_TEST_DRAW, TEST_FRACTION) if split == "test" else (_HELDOUT_DRAW, heldout_fraction)
        splits["train"], splits[split] = _take_stratified(splits["train"], source.targets, fraction, draw)
    return splits


def without_broken(
    source: LabelledImages, splits: dict[str, ImageNumbers], broken: BrokenImages
) -> dict[str, ImageNumbers]:
    """Return the splits without the broken images.

    Raises DataError if a class has no training images left, or a split no images.
    """
    left = {split: numbers[~np.isin(numbers, list(broken))] for split, numbers in splits.items()}
    counts = np.bincount(source.targets[left["train"]], minlength=len(source.classes))
    if not counts.all():
        name = shown(source.classes[int(counts.argmin())])
        raise DataError(f"{source.source}: all training images of class '{name}' are broken")
    for split, numbers in left.items():
        if not len(numbers):
            called = source.split_names.get(split, split)
            raise DataError(f"{source.source}: all {shown(called)} images are broken")
    return left


def _take_stratified(
    numbers: ImageNumbers, labels: Labels, fraction: float, draw: int
) -> tuple[ImageNumbers, ImageNumbers]:
    """Split off a fraction of each class, at least one image, and leave at least one."""
    # RandomState, since numpy guarantees that its numbers never change
    rng = np.random.RandomState(draw)
    taken = []
    for label in np.unique(labels[numbers]):
        members = numbers[labels[numbers] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken.append(rng.permutation(members)[:count])
    picked = np.isin(numbers, np.concatenate(taken))
    return numbers[~picked], numbers[picked]
