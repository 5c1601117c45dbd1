import pytest
from torch import nn

from qnas.common.errors import UsageError
from qnas.nn.blocks import BatchNorm2d
from qnas.training.batch_sizes import check_batch, check_batch_norms, fitting_batch, heldout_batch
from qnas.training.processes import ALONE, World

TWO = World(0, 2)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("images", [1, 6, 63, 64, 65])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_default_batch_is_kept_or_the_largest_that_fits(batch_size: int, images: int, parts: int) -> None:
    found = fitting_batch(batch_size, images, parts=parts)
    if batch_size <= images:
        assert found == batch_size
    elif images >= parts:
        assert images - parts < found <= images
        assert found % parts == 0


@pytest.mark.parametrize(
    ("batch_size", "world", "parts", "problem"),
    [
        (
            49,
            ALONE,
            1,
            "`batch_size=49`: there are only 48 training images: expected at most",
        ),
        (3, TWO, 1, "batches of 3 images cannot be split over 2 processes: `batch_size=2`, for instance"),
        (6, TWO, 2, "`accumulation`: the 3 images of a step and process cannot be split into 2 equal parts"),
    ],
)
def test_a_batch_that_was_asked_for_is_never_made_smaller(
    batch_size: int, world: World, parts: int, problem: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check_batch(batch_size, 48, world, parts=parts)
    assert str(refused.value).startswith(problem)


def test_a_batch_of_all_training_images_fits() -> None:
    check_batch(48, 48, TWO, parts=3)


def test_architecture_steps_take_all_held_out_images_if_they_are_few() -> None:
    assert heldout_batch(48, 500, ALONE) == 48
    assert heldout_batch(48, 2, ALONE) == 2
    assert heldout_batch(48, 9, TWO) == 8
    with pytest.raises(UsageError, match="1 held-out images are too few for 2 processes"):
        heldout_batch(48, 1, TWO)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.SyncBatchNorm(3), BatchNorm2d(3)])
def test_batch_norms_refuse_one_image_at_a_time(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(norm))
    check_batch_norms(network, 2, "`batch_size=2`", ALONE)
    check_batch_norms(network, 8, "`batch_size=8`", ALONE, parts=4)
    with pytest.raises(UsageError, match=r"^`batch_size=1`: the network has batch norms, .* at least 2$"):
        check_batch_norms(network, 1, "`batch_size=1`", ALONE)
    with pytest.raises(UsageError, match=r"^`batch_size=4` in 4 parts: .* at least 8$"):
        check_batch_norms(network, 4, "`batch_size=4`", ALONE, parts=4)


def test_batch_norms_that_do_not_see_the_other_processes_need_two_images_in_each() -> None:
    check_batch_norms(BatchNorm2d(3), 2, "`batch_size=2`", TWO)
    with pytest.raises(UsageError, match=r"^`batch_size=2` in 2 parts: .* at least 4$"):
        check_batch_norms(nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3)), 2, "`batch_size=2`", TWO)


def test_other_norms_train_with_one_image() -> None:
    norms = nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3))
    check_batch_norms(norms, 1, "", ALONE)
