"""A block of your own: registered in a file outside the package, searched with, trained and exported.

`python examples/own_block.py FOLDER` takes about a minute on one core. Any command can use the block in a
YAML file too: `qnas --plugin examples/own_block.py search --space my.yaml ...`.

The block is that of StarNet (Rewrite the Stars, arXiv 2403.19967): a depthwise convolution, two pointwise
ones whose outputs are multiplied, and a projection back.
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
    "star",
    parameters={"kernel": (3, 5, 7), "expansion": (2, 3, 4)},
    # a smaller kernel is the centre of the largest, a smaller expansion has its first hidden channels
    sliced=("kernel", "expansion"),
    needs_batchnorm=True,
)
class Star(nn.Module):
    """x + project(ReLU6(W_1 y) . W_2 y), where y is a depthwise convolution of x."""

    is_residual = True  # stochastic depth may drop its residual branch

    @staticmethod
    def layers(place: Place, kernel: int, expansion: int) -> tuple[LayerSpec, ...]:
        """Return the layers in the order in which they run; counts and latencies are computed from them."""
        c, hidden, px = place.c_in, expansion * place.c_in, place.resolution_px
        return (
            LayerSpec("depthwise", "dwconv", px, c, c, kernel),
            LayerSpec("norm1", "batchnorm", px, c, c),
            LayerSpec("factor1", "conv", px, c, hidden, bias=True),
            LayerSpec("act", "relu6", px, hidden, hidden),
            LayerSpec("factor2", "conv", px, c, hidden, bias=True),
            LayerSpec("product", "mul", px, hidden, hidden),
            LayerSpec("project", "conv", px, hidden, c),
            LayerSpec("norm2", "batchnorm", px, c, c),
            LayerSpec("residual", "add", px, c, c),
        )

    def __init__(self, c_in: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * c_in
        self.mix = nn.Sequential(
            nn.Conv2d(c_in, c_in, kernel, padding=kernel // 2, groups=c_in, bias=False), BatchNorm2d(c_in)
        )
        self.factor1 = nn.Conv2d(c_in, hidden, 1)
        self.act = nn.ReLU6()
        self.factor2 = nn.Conv2d(c_in, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, c_in, 1, bias=False), BatchNorm2d(c_in))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        mixed = self.mix(x)
        y: Tensor = x + self.project(self.act(self.factor1(mixed)) * self.factor2(mixed))
        return y


def star_space() -> SearchSpace:
    """Return a small space of star blocks; the arguments are the keys of a YAML file."""
    return make_space(
        "stars",
        input={"channels": 3, "resolution_px": 32},
        norm="batchnorm",
        activation="relu6",
        stem={"channels": 16, "kernel": 3, "stride": 2, "activation": True},
        candidates=[
            {"block": "star", "kernel": [3, 5], "expansion": [2, 4]},
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
        star_space(),
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
