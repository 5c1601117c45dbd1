"""The forms of a lowered network compute what the network computes."""

import copy
from collections import Counter
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.exported import (
    PX,
    digits,
    every_candidate,
    neural_space,
    normed_product,
    trained,
    wired_space,
)
from torch import Tensor, nn

from qnas.common.errors import ExportError, UsageError
from qnas.deploy.export.lowering import (
    ARITHMETIC,
    CHANNELS_LAST,
    MYRIAD,
    OPERATORS,
    Forms,
    NormForm,
    ScaleNorm,
    SplitDepthwise,
    lowered,
)
from qnas.deploy.export.opset import OLDEST_OPSET, TRACED_OPSET, check_opset
from qnas.deploy.export.tracing import check_form, trace_onnx
from qnas.nn.blocks import ChannelLayerNorm, QuadraBlock
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch

FORMS = [
    *(OPERATORS, ARITHMETIC, CHANNELS_LAST, MYRIAD),
    *(Forms(norm) for norm in get_args(NormForm)),
    Forms(gelu="arithmetic"),
]


@torch.no_grad()
def jitter(network: nn.Module) -> nn.Module:
    """Give norms other scales, shifts and statistics than at the start, so that to forget one shows."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
    return network.eval()


def every_wired_block(activation: str) -> nn.Module:
    """Return a network with each of the blocks that are no chains."""
    space = wired_space(activation)
    return jitter(build_subnet(space, every_candidate(space), 10))


def every_neuron(norm: str) -> nn.Module:
    """Return a network with a block of each neuron."""
    space = neural_space(norm)
    return jitter(build_subnet(space, Arch(tuple(p.names[i] for i, p in enumerate(space.positions))), 10))


@torch.no_grad()
def difference(lower: nn.Module, network: nn.Module, images: Tensor) -> float:
    expected: Tensor = network(images)
    return float((lower(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("forms", FORMS, ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_every_form_computes_the_same(norm: str, forms: Forms) -> None:
    torch.manual_seed(1)
    network = every_neuron(norm)
    before = copy.deepcopy(network.state_dict())
    lower = lowered(network, forms)
    assert difference(lower, network, torch.randn(3, 3, 32, 32)) < 1e-5
    kept = any(isinstance(module, nn.BatchNorm2d) for module in lower.modules())
    assert kept == (norm == "batchnorm" and forms.batch_norm == "operator")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("forms", [OPERATORS, ARITHMETIC, CHANNELS_LAST, MYRIAD], ids=str)
@pytest.mark.parametrize("activation", ["relu6", "hswish"])
def test_every_form_of_blocks_that_are_no_chains_computes_the_same(activation: str, forms: Forms) -> None:
    torch.manual_seed(1)
    network = every_wired_block(activation)
    lower = lowered(network, forms)
    assert difference(lower, network, torch.randn(3, 3, 32, 32)) < 1e-5
    norms = [name for name, module in lower.named_modules() if isinstance(module, nn.BatchNorm2d | ScaleNorm)]
    assert norms == ["1_7.norm1"]  # behind the product of a factored QuadraBlock
    hard = any(isinstance(module, nn.Hardsigmoid) for module in lower.modules())
    assert hard == (forms.hard_swish == "operator")


@pytest.mark.parametrize("forms", [OPERATORS, ARITHMETIC, CHANNELS_LAST, MYRIAD], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_every_form_of_norms_that_candidates_chose_computes_the_same(norm: str, forms: Forms) -> None:
    product, _, _ = normed_product(norm)
    lower = lowered(product.network, forms)
    assert difference(lower, product.network, torch.randn(3, 3, 32, 32)) < 1e-5
    assert not any(isinstance(module, QuadraBlock) for module in lower.modules())


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_one_product_and_one_sum(affine: bool) -> None:
    norm = jitter(nn.BatchNorm2d(4)) if affine else nn.BatchNorm2d(4, affine=False).eval()
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    lower = lowered(nn.Sequential(nn.ReLU(), norm), CHANNELS_LAST)
    images = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(lower(images), norm(images.relu()))
    program = torch.export.export(lower, (images,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.relu.default", "aten.mul.Tensor", "aten.add.Tensor"]
    bare = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    assert isinstance(lowered(bare, CHANNELS_LAST)[0], nn.BatchNorm2d)  # type: ignore[index]


@pytest.mark.parametrize(("kernel", "stride"), [(7, 1), (7, 2), (9, 1), (9, 2)])
@pytest.mark.parametrize("px", [3, 8, 13])
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_depthwise_convolution_is_a_sum_of_small_ones(
    kernel: int, stride: int, px: int, bias: bool
) -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=bias)
    split = lowered(nn.Sequential(whole), CHANNELS_LAST)
    images = torch.randn(2, 6, px, px)
    torch.testing.assert_close(split(images), whole(images), atol=1e-6, rtol=1e-5)
    sizes = [module.kernel_size for module in split.modules() if isinstance(module, nn.Conv2d)]
    even, odd = (kernel + 1) // 2, kernel // 2
    assert sizes == [(even, even), (even, odd), (odd, even), (odd, odd)]


def test_other_convolutions_stay_whole() -> None:
    for module in (
        nn.Conv2d(6, 6, 5, padding=2, groups=6),  # XNNPACK has it
        nn.Conv2d(6, 6, 11, padding=5, groups=6),  # its quarters are too large as well
        nn.Conv2d(6, 6, 7, padding=3),  # not depthwise
        nn.Conv2d(6, 12, 7, padding=3, groups=6),
        nn.Conv2d(6, 6, 7, padding=0, groups=6),  # the quarters would not be centred
        nn.Conv2d(6, 6, 7, padding=6, groups=6, dilation=2),
        nn.Conv2d(6, 6, (7, 1), padding=(3, 0), groups=6),
    ):
        assert not SplitDepthwise.can_split(module), module


def test_nothing_of_qnas_is_left_in_a_lowered_network() -> None:
    program = torch.export.export(lowered(every_neuron("layernorm")), (torch.randn(1, 3, 32, 32),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert not any("qnas" in operator for operator in operators)


def test_scale_and_shift_are_folded_where_nothing_is_padded() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(
        *(ChannelLayerNorm(4), nn.Conv2d(4, 6, 3, padding=1), ChannelLayerNorm(6)),
        *(nn.Conv2d(6, 8, 2, stride=2, bias=False), ChannelLayerNorm(8), nn.GELU(), nn.Conv2d(8, 8, 1)),
    )
    network = jitter(chain)
    lower = lowered(network, ARITHMETIC)
    folded = [module.weight is None for module in lower.children() if hasattr(module, "eps")]
    assert folded == [False, True, False]  # behind a padding and a GELU they stay
    assert difference(lower, network, torch.randn(2, 4, 8, 8)) < 1e-5


def test_a_folded_pair_of_pooled_features() -> None:
    network = jitter(nn.Sequential(nn.Flatten(), ChannelLayerNorm(12), nn.Linear(12, 5)))
    lower = lowered(network, ARITHMETIC)
    assert difference(lower, network, torch.randn(4, 3, 2, 2)) < 1e-5
    assert sum(p.numel() for p in lower.parameters()) == 12 * 5 + 5


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, TRACED_OPSET))
def test_a_graph_in_an_older_opset_computes_the_same(opset: int) -> None:
    forms = ARITHMETIC if opset < 17 else Forms("operator", "arithmetic")
    network = trained().network
    model = trace_onnx(network, (3, PX, PX), "file", forms=forms, opset=opset)
    check_form(model, "file")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = digits(40).take(range(40))
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_opset_without_an_operator_is_refused_with_its_name() -> None:
    with pytest.raises(ExportError, match="file: opset 13 has no Gelu, LayerNormalization as this network"):
        trace_onnx(trained().network, (3, PX, PX), "file", opset=13)


@pytest.mark.parametrize("opset", [0, OLDEST_OPSET - 1, TRACED_OPSET + 1])
def test_an_opset_that_is_not_written(opset: int) -> None:
    with pytest.raises(UsageError, match=f"`opset={opset}`: expected {OLDEST_OPSET} to {TRACED_OPSET}"):
        check_opset(opset)


def test_the_arithmetic_forms_have_no_newer_operators() -> None:
    model = trace_onnx(trained().network, (3, PX, PX), "file", batch=1, forms=ARITHMETIC, opset=13)
    found = Counter(node.op_type for node in model.graph.node)
    assert not {"LayerNormalization", "Gelu", "Transpose", "Sqrt", "Div"} & set(found)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    exponents = {float(constants[node.input[1]]) for node in model.graph.node if node.op_type == "Pow"}
    assert exponents == {-0.5}
    assert found["Pow"] == sum(isinstance(m, ChannelLayerNorm) for m in trained().network.modules())


def test_hard_swish_has_a_form_too() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Flatten()).eval()
    images = 4 * torch.randn(5, 3, 4, 4)
    assert difference(lowered(network, ARITHMETIC), network, images) < 1e-6
    assert difference(lowered(network, OPERATORS), network, images) == 0
    model = trace_onnx(network, (3, 4, 4), "file", forms=ARITHMETIC, opset=13)
    assert "HardSwish" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("form", get_args(NormForm))
def test_a_norm_of_equal_channels_is_zero(form: NormForm) -> None:
    lower = lowered(nn.Sequential(ChannelLayerNorm(4, eps=1e-6)).eval(), Forms(form))
    for images in (torch.ones(2, 4, 3, 3), torch.ones(2, 4)):
        assert torch.equal(lower(images), torch.zeros_like(images))
