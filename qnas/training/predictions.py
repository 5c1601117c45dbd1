"""The predictions of a trained network for each test image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.data.batches import batches
from qnas.data.image_data import Split

WORST = 24  # mistakes of which the images are kept


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor], split: Split, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return what a network in evaluation mode says of each image of a split, in its order.

    `labels` and `predicted` (N,) are classes by number, `confidence` (N,) the probability of the
    predicted one, `loss` (N,) the cross-entropy in nats; `mistakes` (M,) are the images of the highest
    loss among those that are classified wrongly, highest first, and `images` (M, C, H, W) these as uint8.
    """
    predicted, confidence, loss = [], [], []
    for images, labels in batches(split, 256, device=device):
        logits = forward(images).float()
        top = logits.softmax(1).max(1)
        predicted.append(top.indices.cpu())
        confidence.append(top.values.cpu())
        loss.append(F.cross_entropy(logits, labels, reduction="none").cpu())
    found = {
        "labels": split.labels,
        "predicted": torch.cat(predicted),
        "confidence": torch.cat(confidence),
        "loss": torch.cat(loss),
    }
    wrong = (found["predicted"] != found["labels"]).nonzero()[:, 0]
    mistakes = wrong[found["loss"][wrong].argsort(descending=True, stable=True)][:WORST]
    images = split.read(mistakes) if len(mistakes) else torch.zeros(0, *split.images.shape[1:]).byte()
    return found | {"mistakes": mistakes, "images": images}
