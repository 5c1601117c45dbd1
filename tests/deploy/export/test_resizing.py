import pytest
import torch
from torch import Tensor, nn

from qnas.common.errors import ExportError
from qnas.deploy.export.product import RealImages
from qnas.deploy.export.resizing import compare_sizes


class FirstPixel(nn.Module):
    """Classifies an image by its first pixel, 0 or 255; a large one with 255 in the second is mistaken."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 2)."""
        is_one = images[:, 0, 0, 0] > 0.5
        mistaken = (images[:, 0, 0, 1] > 0.5) & torch.tensor(images.shape[-1] > 2)
        shown = is_one ^ mistaken
        return torch.stack((~shown, shown), 1).float()


def pictures(px: int, count: int, mistaken: int) -> RealImages:
    """Images of which the first `mistaken` are mistaken by FirstPixel at more than 2 px."""
    pixels = torch.zeros(count, 1, px, px, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    pixels[:, 0, 0, 0] = 255 * labels
    pixels[:mistaken, 0, 0, 1] = 255
    return RealImages(pixels, labels, (0.0,), (1.0,), "pictures")


@pytest.mark.parametrize(("count", "mistaken", "refused"), [(100, 10, True), (16, 1, False), (100, 0, False)])
def test_a_size_is_refused_where_the_drop_is_sure(count: int, mistaken: int, refused: bool) -> None:
    found = compare_sizes(FirstPixel(), pictures(4, count, mistaken), pictures(2, count, mistaken))
    assert (found.resolution_px, found.trained_px, found.images) == (4, 2, count)
    assert (found.accuracy, found.trained_accuracy) == (1 - mistaken / count, 1.0)
    assert found.least_drop <= mistaken / count <= found.most_drop
    if refused:
        with pytest.raises(
            ExportError, match=r"at 4 px 90\.0% of 100 images are right, at 2 px, as trained, 100"
        ):
            found.check(0.01)
        found.check(0.1)
    else:
        found.check(0.01)


def test_a_gain_is_a_negative_drop() -> None:
    found = compare_sizes(FirstPixel(), pictures(2, 40, 20), pictures(4, 40, 20))
    assert found.most_drop < -0.3
    found.check(0.0)
