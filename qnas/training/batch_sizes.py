"""The number of images of a step: as asked, never fewer without a word.

A batch that was asked for is used or refused. One that only comes with a shipped recipe or preset is made as
large as the images allow.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qnas.common.errors import UsageError
from qnas.nn.blocks import BatchNorm2d
from qnas.training.processes import World

WHOLE = (BatchNorm2d, nn.SyncBatchNorm)  # batch norms that see a batch's parts in all processes


def fitting_batch(batch_size: int, images: int, *, parts: int = 1) -> int:
    """Return the largest batch of at most `batch_size` and `images` that splits into equal parts.

    >>> fitting_batch(64, 50, parts=4), fitting_batch(64, 500), fitting_batch(64, 3, parts=4)
    (48, 64, 4)
    """
    return batch_size if batch_size <= images else max(images // parts, 1) * parts


def check_batch(batch_size: int, images: int, world: World, *, parts: int = 1) -> None:
    """Check the training images of a step, which are divided over processes and over `parts` in each.

    Raises UsageError if there are fewer images, or if they cannot be divided evenly.
    """
    if batch_size > images:
        raise UsageError(
            f"`batch_size={batch_size}`: there are only {images} training images: expected at most "
            f"`batch_size={images}`"
        )
    world.check_batch(batch_size)
    each = batch_size // world.size
    if each % parts:
        raise UsageError(
            f"`accumulation`: the {each} images of a step and process cannot be split into {parts} "
            "equal parts: change `accumulation` or `batch_size`"
        )


def heldout_batch(batch_size: int, images: int, world: World) -> int:
    """Return the held-out images of an architecture step: as many as of a weight step, or all there are.

    Raises UsageError if they are fewer than the processes.
    """
    taken = min(batch_size, images) // world.size * world.size
    if taken == 0:
        raise UsageError(f"{images} held-out images are too few for {world.size} processes")
    return taken


def check_batch_norms(
    network: nn.Module, batch_size: int, what: str, world: World, *, parts: int = 1
) -> None:
    """Check that no batch norm sees a single image, of a batch that is run in `parts` in each process.

    Of a single image, a batch norm would measure the image itself, or nothing where its map is one pixel.
    `what` names the batch in messages. Raises UsageError.
    """
    # those of our blocks take their statistics over all processes
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    divided = parts * (1 if all(isinstance(norm, WHOLE) for norm in norms) else world.size)
    if not norms or batch_size > divided:
        return
    over = f" in {divided} parts" if divided > 1 else ""
    raise UsageError(
        f"{what}{over}: the network has batch norms, which need more than one image at a time: expected at "
        f"least {2 * divided}"
    )
