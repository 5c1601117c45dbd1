"""A block of your own: registered in a file outside the package, searched with, trained and exported.

`python examples/own_block.py FOLDER` takes about a minute on one core. Any command can use the block in a
YAML file too: `qnas --plugin examples/own_block.py search --space my.yaml ...`.

The block is a simplified attention of the Visual Attention Network (arXiv 2202.09741): a depthwise and a
pointwise convolution compute a factor for each channel and place of the map that they read.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

import qnas
from qnas.nn.blocks import BatchNorm2d
from qnas.spaces.blocks import Place, register_block
from qnas.spaces.layer import LayerSpec
from qnas.spaces.space import SearchSpace, make_space


@register_block(
    "attend",
    parameters={"kernel": (3, 5, 7), "expansion": (1, 2, 3, 4)},
    # a smaller kernel is the centre of the largest, a smaller expansion has its first hidden channels
    sliced=("kernel", "expansion"),
    needs_batchnorm=True,
)
class Attend(nn.Module):
    """x + project(y . W D y), where y is ReLU6(expand(x)) and D a depthwise convolution."""

    is_residual = True  # stochastic depth may drop its residual branch

    @staticmethod
    def layers(place: Place, kernel: int, expansion: int) -> tuple[LayerSpec, ...]:
        """Return the layers in the order in which they run; counts and latencies are computed from them."""
        c, hidden, px = place.c_in, expansion * place.c_in, place.resolution_px
        return (
            LayerSpec("expand", "conv", px, c, hidden),
            LayerSpec("norm1", "batchnorm", px, hidden, hidden),
            LayerSpec("act", "relu6", px, hidden, hidden),  # it bounds one factor, so that nothing overflows
            LayerSpec("depthwise", "dwconv", px, hidden, hidden, kernel, bias=True),
            LayerSpec("weigh", "conv", px, hidden, hidden, bias=True),
            LayerSpec("product", "mul", px, hidden, hidden),
            LayerSpec("project", "conv", px, hidden, c),
            LayerSpec("norm2", "batchnorm", px, c, c),
            LayerSpec("residual", "add", px, c, c),
        )

    def __init__(self, c_in: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * c_in
        # in a Sequential, norms are folded into the convolutions before them at export
        self.expand = nn.Sequential(nn.Conv2d(c_in, hidden, 1, bias=False), BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.weigh = nn.Conv2d(hidden, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, c_in, 1, bias=False), BatchNorm2d(c_in))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.expand(x)  # (B, expansion * C, H, W)
        out: Tensor = x + self.project(y * self.weigh(self.depthwise(y)))
        return out


def attending_space() -> SearchSpace:
    """Return a small space of these blocks; the arguments are the keys of a YAML file."""
    return make_space(
        "attending",
        input={"channels": 3, "resolution_px": 32},
        norm="batchnorm",
        activation="relu6",
        stem={"channels": 16, "kernel": 3, "stride": 2, "activation": True},
        candidates=[
            {"block": "attend", "kernel": [3, 5], "expansion": [1, 2]},
            {"block": "identity"},
        ],
        stages=[
            {"channels": 16, "positions": 2, "stride": 1},
            {"channels": 32, "positions": 3, "stride": 2},
        ],
        head={"classes": 10},
    )


def main(folder: Path) -> None:
    """Search within 0.8 ms on a Cortex-A76, train the network found, and export it."""
    result = qnas.run_search(
        attending_space(),
        {"cortex-a76": "0.8ms"},
        search_epochs=6,
        warmup_epochs=3,
        out=folder / "run",
        progress=True,
    )
    print(result, *result.arch.choices, sep="\n")
    trained = qnas.train_subnet(result, epochs=10, progress=True)
    print(trained, *qnas.export(trained, ["onnx", "standalone"]), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-block"))
