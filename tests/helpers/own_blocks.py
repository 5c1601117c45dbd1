"""A block and a neuron as in a user's file."""

from torch import Tensor, nn

from qnas.spaces.blocks import Place, register_block
from qnas.spaces.layer import LayerSpec

SLOPE = 0.5


def halved(x: Tensor) -> Tensor:
    return x * SLOPE


class Gate(nn.Module):
    """x + project(relu(expand(x))) / 2, without a norm."""

    @staticmethod
    def layers(place: Place, width: int, act: str = "relu") -> tuple[LayerSpec, ...]:
        c, px = place.c_in, place.resolution_px
        return (
            LayerSpec("expand", "conv", px, c, width * c, bias=True),
            LayerSpec("act", act, px, width * c, width * c),
            LayerSpec("project", "conv", px, width * c, c),
            LayerSpec("residual", "add", px, c, c),
        )

    def __init__(self, c_in: int, width: int, act: str) -> None:
        super().__init__()
        self.expand = nn.Conv2d(c_in, width * c_in, 1)
        self.conv_a = nn.Conv2d(width * c_in, c_in, 1, bias=False)  # named as a mixer's convolution is
        self.act = nn.ReLU() if act == "relu" else nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = x + halved(self.conv_a(self.act(self.expand(x))))
        return y


def register_gate(sliced: tuple[str, ...] = ("width",)) -> None:
    """Register it as block `gate`."""
    register_block("gate", parameters={"width": range(1, 9), "act": ("relu", "relu6")}, sliced=sliced)(Gate)
