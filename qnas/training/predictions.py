"""The predictions of a trained network for each test image, as a run keeps them."""

import torch
from torch import Tensor

from qnas.data.image_data import Split
from qnas.training.scoring import Classified

WORST = 24  # misclassified images that are kept


def prediction_tensors(found: Classified, split: Split) -> dict[str, Tensor]:
    """Return the predictions for the images of a split, in its order.

    `labels` and `predicted` (N,) are classes by number, `confidence` (N,) the probability of the
    predicted one, `loss` (N,) that of the image; `mistakes` (M,) are the images of the highest loss
    among those that are misclassified, highest first, and `images` (M, C, H, W) these as uint8.
    """
    losses = found.losses.float()
    wrong = (~found.right).nonzero()[:, 0]
    mistakes = wrong[losses[wrong].argsort(descending=True, stable=True)][:WORST]
    images = split.read(mistakes) if len(mistakes) else torch.zeros(0, *split.images.shape[1:]).byte()
    return {
        "labels": split.labels,
        "predicted": found.predicted,
        "confidence": found.confidence,
        "loss": losses,
        "mistakes": mistakes,
        "images": images,
    }
