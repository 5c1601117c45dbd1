import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qnas.nn.blocks import MODULES
from qnas.spaces.layer import OPS, LayerSpec

CONVOLUTIONS = [
    LayerSpec("layer", op, px, c_in, c_in if op == "dwconv" else 2 * c_in + 1, kernel, stride, bias)
    for op, c_in, kernel, stride, px, bias in itertools.product(
        ("conv", "dwconv"), (1, 6), (1, 2, 3, 4, 5, 7, 9), (1, 2, 3, 4), (4, 5, 7, 8, 13, 32), (False, True)
    )
    if kernel % 2 == 1 or kernel == stride
]
SAME = [replace(spec, same=True) for spec in CONVOLUTIONS if spec.padding]
OTHERS = [
    LayerSpec("layer", op, 5, 6, 6) for op in OPS if op in MODULES and op not in ("conv", "dwconv", "linear")
] + [LayerSpec("layer", "linear", 1, 6, 10, bias=bias) for bias in (False, True)]


def test_the_list_of_convolutions_is_long() -> None:
    assert len(CONVOLUTIONS) > 500


def test_macs_params_and_output_size_are_those_of_the_module() -> None:
    # torch's shape functions on the meta device: nothing is computed
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        flops = 0
        for spec in CONVOLUTIONS + SAME + OTHERS:
            module = MODULES[spec.op](spec).eval()
            px = spec.resolution_px
            output = module(torch.empty((1, spec.c_in) if spec.op == "linear" else (1, spec.c_in, px, px)))
            assert sum(p.numel() for p in module.parameters()) == spec.params, spec
            assert counter.get_total_flops() - flops == 2 * spec.macs, spec
            flops = counter.get_total_flops()
            expected = (1, spec.c_out, spec.out_px, spec.out_px)
            assert tuple(output.shape) == expected[: output.ndim], spec


def test_an_odd_kernel_rounds_the_size_up_and_a_patch_down() -> None:
    for spec in CONVOLUTIONS + SAME:
        if spec.kernel == spec.stride:
            assert spec.out_px == spec.resolution_px // spec.stride
        else:
            assert spec.out_px == -(-spec.resolution_px // spec.stride)


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "convolution"},
        {"resolution_px": 0},
        {"stride": 0},
        {"op": "add", "c_out": 4},
        {"kernel": 4, "stride": 2},
        {"kernel": 2, "stride": 2, "same": True},
    ],
)
def test_an_impossible_layer_cannot_be_made(wrong: dict[str, object]) -> None:
    fields = {"role": "layer", "op": "conv", "resolution_px": 8, "c_in": 3, "c_out": 3, **wrong}
    with pytest.raises(AssertionError):
        LayerSpec(**fields)  # type: ignore[arg-type]  # wrong on purpose
