"""HorNet (arXiv 2207.14284) with 7x7 convolutions, for comparison. torchvision and timm do not have it."""

import torch
from torch import Tensor, nn

from qnas.nn.blocks import ChannelLayerNorm, GlobalAveragePool

KERNEL, EXPANSION = 7, 4


class RecursiveGatedConvolution(nn.Module):
    """gnconv, arXiv 2207.14284, eq. 3.3 to 3.5: p_{k+1} = f_k(q_k) . g_k(p_k) / alpha, k below the order."""

    def __init__(self, channels: int, order: int) -> None:
        super().__init__()
        self.widths = [channels >> k for k in reversed(range(order))]
        self.enter = nn.Conv2d(channels, 2 * channels, 1)  # p_0 and all q_k
        total = sum(self.widths)
        self.depthwise = nn.Conv2d(total, total, KERNEL, padding=KERNEL // 2, groups=total)
        steps = zip(self.widths[:-1], self.widths[1:], strict=True)
        self.grow = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in steps)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.enter(x).split([self.widths[0], sum(self.widths)], dim=1)
        first, *others = self.depthwise(q).split(self.widths, dim=1)  # alpha is 1
        p = p * first
        for grow, gate in zip(self.grow, others, strict=True):
            p = grow(p) * gate
        y: Tensor = self.leave(p)
        return y


class HorNetBlock(nn.Module):
    """x + scale . gnconv(LN(x)), then x + scale . PW2(GELU(PW1(LN(x)))), arXiv 2207.14284, figure 2."""

    def __init__(self, channels: int, order: int) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels, eps=1e-6)
        self.mixer = RecursiveGatedConvolution(channels, order)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, EXPANSION * channels)
        self.project = nn.Linear(EXPANSION * channels, channels)
        self.scale1 = nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.scale2 = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mixer(self.norm1(x))
        x = x + self.scale1 * mixed
        rows: Tensor = self.norm2(x.permute(0, 2, 3, 1))
        rows = self.scale2 * self.project(nn.functional.gelu(self.expand(rows)))
        return x + rows.permute(0, 3, 1, 2)


def hornet(first_width: int, classes: int) -> nn.Module:
    """Build a HorNet of section 3.3: gnconv of orders 2 to 5, and widths that double from the first stage's.

    The first width is 64 in HorNet-T, 96 in HorNet-S and 128 in HorNet-B.
    """
    layers: list[nn.Module] = []
    width, stride = 3, 4
    for stage, depth in enumerate((2, 3, 18, 2)):
        channels = first_width << stage
        change = nn.Conv2d(width, channels, stride, stride)
        layers += (
            [change, ChannelLayerNorm(channels, eps=1e-6)]
            if stage == 0
            else [ChannelLayerNorm(width, eps=1e-6), change]
        )
        layers += [HorNetBlock(channels, order=2 + stage) for _ in range(depth)]
        width, stride = channels, 2
    head = nn.Linear(width, classes)
    return nn.Sequential(*layers, GlobalAveragePool(), ChannelLayerNorm(width, eps=1e-6), head)
