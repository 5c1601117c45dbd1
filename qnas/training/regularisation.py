"""Stochastic depth, and the moving average of a network's weights."""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth


def drop_blocks(network: nn.Module, rate: float) -> None:
    """Let residual blocks drop out for some images while training (stochastic depth, arXiv 1603.09382).

    The rate grows linearly from 0 at the first block to `rate` at the last. Hooks on this network's blocks
    implement it, so that the weights keep their names and an exported network has none of it. A
    QuadraBlock drops out as a whole, so that its fused halves stay as they are.
    """
    blocks = [block for block in network.modules() if getattr(block, "is_residual", False)]
    for number, block in enumerate(blocks):
        depth = StochasticDepth(rate * number / max(len(blocks) - 1, 1), mode="row")

        def drop(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, depth: StochasticDepth = depth
        ) -> Tensor | None:
            return inputs[0] + depth(output - inputs[0]) if module.training else None

        block.register_forward_hook(drop)


def moving_average(network: nn.Module) -> AveragedModel:
    """Return a copy of the network for `update_average`, batch statistics included."""
    average = AveragedModel(network, multi_avg_fn=_average_with(0.0), use_buffers=True)
    average.requires_grad_(False)
    return average


def update_average(average: AveragedModel, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network after `step` updates.

    The decay is smaller at first: the first weights are random, and would be most of a short training's
    average.
    """
    average.multi_avg_fn = _average_with(min(decay, (1 + step) / (10 + step)))
    average.update_parameters(network)


def _average_with(decay: float) -> Any:
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
