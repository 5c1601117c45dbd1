import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qnas.runs.report.charts import heat_map, photograph


def pixels(uri: str) -> NDArray[np.uint8]:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image)


def test_a_heat_map_is_as_dense_as_its_shares() -> None:
    shares = np.random.default_rng(0).uniform(0, 1, (5, 9))
    found = pixels(heat_map(shares))
    assert found.shape == (5, 9, 4)
    assert np.abs(found[..., 3] / 255 - shares).max() <= 0.5 / 255 + 1e-9
    assert len(np.unique(found[..., :3].reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_photograph_is_the_image(channels: int) -> None:
    image = np.random.default_rng(channels).integers(0, 256, (channels, 6, 4), dtype=np.uint8)
    found = pixels(photograph(image))
    if channels < 3:
        assert (found == image[0]).all()
    else:
        assert (found == image[:3].transpose(1, 2, 0)).all()
