import pytest
import torch
from helpers.tiny import TINY_SPACE

from qnas.common.errors import UsageError
from qnas.search.sizes import Resized, check_sizes, least_trained_px, resize, scaled_px
from qnas.spaces.space import load_space, parse_space

SPACE = parse_space(TINY_SPACE, "tiny")  # strides of 4 in all


def test_the_largest_resolution_has_the_size_of_the_search_and_the_others_are_in_proportion() -> None:
    assert scaled_px(64, 224, 224) == 64
    for px in (128, 160, 192):
        assert abs(scaled_px(64, px, 224) - 64 * px / 224) <= 0.5


@pytest.mark.parametrize("resolutions", [(128, 160, 192, 224), (30, 32), (8, 16, 24)])
def test_the_least_size_is_the_smallest_at_which_all_pass_and_differ(resolutions: tuple[int, ...]) -> None:
    def works(px: int) -> bool:
        sizes = [scaled_px(px, each, max(resolutions)) for each in resolutions]
        return min(sizes) >= 4 and len(set(sizes)) == len(sizes)

    least = least_trained_px(SPACE, resolutions)
    assert works(least)
    assert not any(works(px) for px in range(1, least))
    check_sizes(SPACE, resolutions, least)
    with pytest.raises(UsageError) as error:
        check_sizes(SPACE, resolutions, least - 1)
    assert f"`resolution_px={least - 1}`: of {len(resolutions)} resolutions" in str(error.value)
    assert str(error.value).endswith(f"expected at least {least}")


def test_a_mobile_space_needs_images_that_pass_its_strides() -> None:
    assert least_trained_px(load_space("union-mobile"), (128, 160, 192, 224)) == 56


def test_images_are_resized_as_torchvision_does_with_antialiasing() -> None:
    from torchvision.transforms.v2 import functional as tv

    images = torch.rand(3, 2, 13, 13)
    assert resize(images, 13) is images
    for px in (5, 9, 20):
        assert torch.allclose(resize(images, px), tv.resize(images, [px, px], antialias=True), atol=1e-6)
    aliased = torch.nn.functional.interpolate(images, (5, 5), mode="bilinear")
    assert not torch.allclose(resize(images, 5), aliased, atol=1e-2)


def test_a_resized_network_sees_one_size() -> None:
    seen: list[torch.Size] = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            return x.mean((2, 3))

    network = Resized(Network(), 6)
    for px in (6, 8, 12):
        network(torch.rand(2, 3, px, px))
    assert seen == [(2, 3, 6, 6)] * 3
