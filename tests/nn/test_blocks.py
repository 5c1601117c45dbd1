import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import cast

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.own_blocks import Gate
from torch import Tensor, nn

from qnas.common.errors import SpaceError, UsageError
from qnas.nn.blocks import (
    MODULES,
    ChannelLayerNorm,
    LayerScale,
    QuadraBlock,
    build_block,
    quadratic_weights,
    start_linear,
)
from qnas.nn.neurons import run_neuron
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch
from qnas.spaces.blocks import Place, quadra_layers, register_block
from qnas.spaces.layer import OPS, LayerSpec
from qnas.spaces.lower import make_block
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import SearchSpace, load_space, parse_space
from qnas.training.scoring import recalibrate


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every weight and statistic a value of its own, so that none can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator) - 0.5
                tensor.copy_(drawn + (1.0 if name.endswith(("running_var", "norm.weight")) else 0.0))


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer normalisation over channels by hand: (B, C, H, W) -> (B, C, H, W)."""
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize(("kernel", "expansion"), [(3, 2), (5, 4), (7, 2)])
def test_a_quadra_block_is_the_papers_formula(kernel: int, expansion: int) -> None:
    channels, padding = 6, kernel // 2
    block = QuadraBlock(channels, kernel, expansion)
    randomise(block)
    w = dict(block.named_parameters())

    def depthwise(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], padding=padding, groups=channels)

    x = image(2, channels, 9, 8)
    y = layer_norm(x, w["norm1.weight"], w["norm1.bias"])
    x1 = x + depthwise(y, "conv_a") * depthwise(y, "conv_b") + depthwise(y, "conv_c")
    y = layer_norm(x1, w["norm2.weight"], w["norm2.bias"])
    hidden = F.gelu(F.conv2d(y, w["expand.weight"], w["expand.bias"]))
    expected = x1 + F.conv2d(hidden, w["project.weight"], w["project.bias"])
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert set(w) == {
        *(f"conv_{abc}.weight" for abc in "abc"),
        *(
            f"{layer}.{kind}"
            for layer in ("norm1", "norm2", "expand", "project")
            for kind in ("weight", "bias")
        ),
    }


def test_a_block_with_batch_norm_folds_into_its_convolutions_and_clips_what_its_mixer_adds() -> None:
    channels = 6
    block = QuadraBlock(channels, 5, 2, norm="batchnorm").eval()
    randomise(block)
    w = {**dict(block.named_parameters()), **dict(block.named_buffers())}

    def scale_and_shift(norm: str) -> tuple[Tensor, Tensor]:
        scale = w[f"{norm}.weight"] / torch.sqrt(w[f"{norm}.running_var"] + 1e-5)
        return scale, w[f"{norm}.bias"] - scale * w[f"{norm}.running_mean"]

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=2, groups=channels)

    x = 3 * image(2, channels, 9, 8)
    scale1, shift1 = scale_and_shift("norm1")
    scale2, shift2 = scale_and_shift("norm2")
    w_a = w["conv_a.weight"] * scale1[:, None, None, None]
    w_c = w["conv_c.weight"] * scale1[:, None, None, None]
    mixed = depthwise(x, w_a) * depthwise(x, w["conv_b.weight"]) + depthwise(x, w_c, shift1)
    assert 0.1 < float((mixed.abs() > 6).float().mean()) < 0.9  # the clip matters, and not it alone
    x1 = x + mixed.clamp(-6, 6)
    expand = w["expand.weight"] * scale2[:, None, None, None]
    expected = x1 + F.conv2d(F.gelu(F.conv2d(x1, expand, shift2)), w["project.weight"], w["project.bias"])
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    # nothing but the last convolution has a bias that folding would have to add to
    assert not any(name in w for name in ("conv_a.bias", "conv_b.bias", "conv_c.bias", "expand.bias"))


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_block_without_a_norm_is_two_scaled_halves_and_clips_what_a_product_adds(neuron: str) -> None:
    place = Place(6, 6, 1, 9, "layernorm", "gelu")
    spec = make_block("1.1", "quadra", place, kernel=5, expansion=2, neuron=neuron, norm="scale", act="relu6")
    block = build_block(spec)  # compares the parameters with the layers'
    assert isinstance(block, QuadraBlock)
    assert torch.equal(cast(Tensor, block.scale1.weight), torch.full((6,), 0.1))  # close to identity at first
    assert torch.equal(cast(Tensor, block.scale2.weight), torch.full((6,), 0.1))
    randomise(block)
    w, x = block.state_dict(), 30 * image(2, 6, 9, 8)
    mixed = w["scale1.weight"][:, None, None] * block.mix(x)
    assert float((mixed.abs() > 6).float().mean()) > 0.1
    x1 = x + (mixed if neuron == "linear" else mixed.clamp(-6, 6))
    hidden = F.relu6(conv(x1, w, "expand"))
    expected = x1 + w["scale2.weight"][:, None, None] * conv(hidden, w, "project")
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(name.startswith("norm") for name in w)


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm", "scale"])
@pytest.mark.parametrize("act", ["gelu", "relu6"])
def test_a_candidate_with_its_own_words_is_the_block_of_a_space_with_these_words(norm: str, act: str) -> None:
    sizes: dict[str, int | str] = {"kernel": 3, "expansion": 2}
    words = {"norm": norm, "act": act}
    other = "batchnorm" if norm == "layernorm" else "layernorm"
    block = build_block(make_block("1.1", "quadra", Place(8, 8, 1, 9, other, "relu"), **sizes, **words))
    asked = Place(8, 8, 1, 9, "layerscale" if norm == "scale" else norm, act)
    expected = build_block(make_block("1.1", "quadra", asked, **sizes))
    block.load_state_dict(expected.state_dict())
    x = image(3, 8, 9, 9)
    torch.testing.assert_close(block(x), expected(x))  # in training mode, by the fast kernels where they are
    assert [str(part) for part in block.children()] == [str(part) for part in expected.children()]
    assert cast(QuadraBlock, block).has_kernels == (words == {"norm": "layernorm", "act": "gelu"})


def factored_and_stars(activation: str) -> SearchSpace:
    """Return a deep space of the blocks that multiply, one candidate a position."""
    space = load_space("quadranet-mobile-bn").to_yaml()
    content = yaml.safe_load(space) | {"name": "products", "activation": activation}
    content["candidates"] = [
        {"block": "mbconv", "kernel": 3, "expansion": 1, "neuron": "factored"},
        {"block": "star", "kernel": 3, "expansion": 2},
    ]
    for stage, turn in zip(content["stages"], itertools.cycle((0, 1)), strict=False):
        stage["candidates"] = [content["candidates"][turn]]
    return parse_space(json.dumps(content), "products.yaml")


def without_norms() -> SearchSpace:
    """Return the deep mobile space with learned scales in place of norms."""
    content = load_space("quadranet-mobile-bn").written() | {"name": "scales"}
    content["candidates"] = [{"block": "quadra", "kernel": 3, "expansion": 2, "norm": "scale"}]
    return parse_space(json.dumps(content), "scales.yaml")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["quadranet-mobile-bn", "relu6", "gelu", "hswish", "scale"])
def test_a_network_without_layer_norm_stays_bounded_off_its_training_data(name: str, seed: int) -> None:
    shipped = load_space if name.startswith("quadranet") else factored_and_stars
    space = without_norms() if name == "scale" else shipped(name)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    arch = Arch(tuple(position.names[0] for position in space.positions))
    network = build_subnet(space, arch, 5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: scales that have moved
            nn.init.uniform_(module.weight, 1, 2, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
        if isinstance(module, LayerScale):
            nn.init.uniform_(module.weight, 0.2, 1, generator=generator)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    elsewhere = {
        "twice the contrast": 2 * images,
        "100 times the contrast": 100 * images,
        "black": torch.zeros(1, 3, 32, 32),
        "a constant of 100": torch.full((1, 3, 32, 32), 100.0),
        "another resolution": torch.randn(2, 3, 96, 96, generator=generator),
        "enlarged": F.interpolate(images[:2], size=(96, 96), mode="bilinear"),
    }
    with torch.no_grad():
        recalibrate(network, [(images, torch.zeros(16))])
        usual = float(network(images).abs().max())
        largest = {name: float(network(x).abs().max()) for name, x in elsewhere.items()}
    # a bound that NaN fails too: that of a linear network at 100 times the contrast
    assert all(value <= 100 * usual for value in largest.values()), (usual, largest)


def conv(x: Tensor, w: Mapping[str, Tensor], name: str, groups: int = 1, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, w.get(f"{name}.bias"), stride, padding, groups=groups)


def batch_norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """Batch normalisation by running statistics, by hand."""
    centred = x - w[f"{name}.running_mean"][:, None, None]
    scale = w[f"{name}.weight"] / torch.sqrt(w[f"{name}.running_var"] + 1e-5)
    return centred * scale[:, None, None] + w[f"{name}.bias"][:, None, None]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "relu": F.relu,
    "hswish": F.hardswish,
    "gelu": F.gelu,
}


@pytest.mark.parametrize("mixers", ["double", "single"])
@pytest.mark.parametrize("activation", ["relu6", "hswish"])
def test_a_star_block_is_its_papers_formula_clipped_where_no_relu6_bounds_it(
    activation: str, mixers: str
) -> None:
    place = Place(6, 6, 1, 9, "batchnorm", activation)
    block = build_block(make_block("1.1", "star", place, kernel=5, expansion=3, mixers=mixers)).eval()
    randomise(block)
    with torch.no_grad():
        for name in ("factor1", "factor2"):
            cast(nn.Conv2d, block.get_submodule(name)).weight.mul_(8)
    w, x = block.state_dict(), 3 * image(2, 6, 9, 8)
    y = batch_norm(conv(x, w, "depthwise1", 6), w, "norm1")
    y = ACTIVATIONS[activation](conv(y, w, "factor1")) * conv(y, w, "factor2")
    y = batch_norm(conv(y, w, "project"), w, "norm2")
    assert 0.05 < float((y.abs() > 6).float().mean()) < 0.95  # so that a clip would show, and does
    y = y if activation == "relu6" else y.clamp(-6, 6)
    expected = x + (conv(y, w, "depthwise2", 6) if mixers == "double" else y)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert ("depthwise2.bias" in w) == (mixers == "double")


@pytest.mark.parametrize(("c_out", "stride"), [(6, 1), (8, 2)])
@pytest.mark.parametrize("act", ["space", "gelu"])
@pytest.mark.parametrize(
    ("expansion", "neuron", "attention"),
    [(4, "factored", "none"), (1, "factored", "se"), (6, "linear", "se")],
)
def test_an_inverted_residual_with_options_is_its_formula(
    expansion: int, neuron: str, attention: str, act: str, c_out: int, stride: int
) -> None:
    parameters: dict[str, int | str] = {
        "kernel": 3,
        "expansion": expansion,
        "neuron": neuron,
        "attention": attention,
        "act": act,
    }
    spec = make_block("1.1", "mbconv", Place(6, c_out, stride, 9, "batchnorm", "relu6"), **parameters)
    block = build_block(spec).eval()
    randomise(block)
    w, x, hidden = block.state_dict(), 3 * image(2, 6, 9, 9), 6 * expansion
    f = F.gelu if act == "gelu" else F.relu6
    y = x if expansion == 1 else f(batch_norm(conv(x, w, "expand"), w, "norm1"))
    if neuron == "factored":
        a, b = (batch_norm(conv(y, w, f"conv_{i}", hidden, stride), w, f"norm_{i}") for i in "ab")
        y = f(a * b)
    else:
        y = f(batch_norm(conv(y, w, "depthwise", hidden, stride), w, "norm2"))
    if attention == "se":
        pooled = y.mean((2, 3), keepdim=True)
        assert w["squeeze.weight"].shape[0] == {1: 8, 6: 16}[expansion]  # a quarter of 6 and of 36, in eights
        y = y * F.hardsigmoid(conv(F.relu(conv(pooled, w, "squeeze")), w, "excite"))
    y = batch_norm(conv(y, w, "project"), w, "norm3")
    if neuron == "factored" and act == "gelu":
        y = y.clamp(-6, 6)
    expected = x + y if (c_out, stride) == (6, 1) else y
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(layer.params for layer in spec.layers) == sum(p.numel() for p in block.parameters())


def test_a_factored_inverted_residual_starts_with_its_linear_part() -> None:
    place = Place(8, 8, 1, 9, "batchnorm", "relu6")
    block = build_block(make_block("1.1", "mbconv", place, kernel=3, expansion=2, neuron="factored"))
    assert torch.equal(cast(Tensor, block.get_submodule("norm_b").bias), torch.ones(16))
    assert torch.equal(cast(Tensor, block.get_submodule("norm_a").bias), torch.zeros(16))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("expansion", [1, 6])
@pytest.mark.parametrize("c_out", [4, 8])
def test_an_inverted_residual_adds_its_input_only_where_the_shape_stays(
    stride: int, expansion: int, c_out: int
) -> None:
    place = Place(4, c_out, stride, 9, "batchnorm", "relu6")
    spec = make_block("1.1", "mbconv", place, kernel=3, expansion=expansion)
    block = build_block(spec).eval()
    randomise(block)
    x = image(2, 4, 9, 9)
    y = x
    for module in block.children():
        y = module(y)
    expected = x + y if stride == 1 and c_out == 4 else y
    torch.testing.assert_close(block(x), expected)
    assert block(x).shape == (2, c_out, spec.layers[-1].out_px, spec.layers[-1].out_px)


def test_channel_norm_normalises_over_channels_at_each_place() -> None:
    norm = ChannelLayerNorm(5, eps=1e-6)
    randomise(norm)
    x = image(2, 5, 3, 4)
    torch.testing.assert_close(norm(x), layer_norm(x, norm.weight, norm.bias), rtol=1e-4, atol=1e-5)
    pooled = x[:, :, 0, 0]
    torch.testing.assert_close(norm(pooled), norm(x)[:, :, 0, 0])


@pytest.mark.parametrize("kind", ["quadra", "identity"])
def test_a_block_keeps_what_it_keeps_in_channels_last_memory(kind: str) -> None:
    place = Place(8, 8, 1, 9, "layernorm", "gelu")
    sizes = {"kernel": 3, "expansion": 2} if kind == "quadra" else {}
    block = build_block(make_block("1.1", kind, place, **sizes)).to(memory_format=torch.channels_last)
    x = image(2, 8, 9, 9)
    y = block(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_submodule_is_named_after_the_layer_that_it_computes(neuron: str) -> None:
    for norm in ("layernorm", "batchnorm", "layerscale"):
        place = Place(8, 8, 1, 9, norm, "gelu")
        layers = quadra_layers(place, 3, 2, neuron)
        block = build_block(make_block("1.1", "quadra", place, kernel=3, expansion=2, neuron=neuron))
        expected = [spec for spec in layers if spec.op in MODULES]
        assert {name for name, _ in block.named_children()} == {spec.role for spec in expected}
        for spec in expected:
            assert sum(p.numel() for p in getattr(block, spec.role).parameters()) == spec.params


@pytest.mark.usefixtures("_registries")
def test_a_module_with_other_parameters_than_its_layers_is_refused() -> None:
    class Wider(Gate):
        def __init__(self, c_in: int, width: int, act: str) -> None:
            super().__init__(c_in, 2 * width, act)

        @staticmethod
        def layers(place: Place, width: int, act: str = "relu") -> tuple[LayerSpec, ...]:
            return Gate.layers(place, width)

    register_block("wider", parameters={"width": (1, 2), "act": ("relu",)})(Wider)
    spec = make_block("1.1", "wider", Place(4, 4, 1, 8, "batchnorm", "relu"), width=1)
    with pytest.raises(SpaceError) as error:
        build_block(spec)
    assert str(error.value) == "block wider_w1: its module has 72 parameters, its layers 36"


def test_every_operator_has_a_module_or_is_written_out() -> None:
    assert set(OPS) == set(MODULES) | {"add", "mul", "scale", "square"}


def test_a_built_block_is_the_class_of_its_kind() -> None:
    block = QuadraBlock(32, 7, 4)
    place = Place(32, 32, 1, 9, "layernorm", "gelu")
    built = build_block(make_block("1.1", "quadra", place, kernel=7, expansion=4))
    assert [name for name, _ in built.named_parameters()] == [name for name, _ in block.named_parameters()]


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_block_of_any_neuron_is_two_residual_halves(neuron: str, norm: str, activation: str) -> None:
    # with and without the fused halves; the neuron itself is tested by its formula in test_neurons.py
    block = QuadraBlock(6, 3, 2, norm=norm, activation=activation, neuron=neuron).eval()
    randomise(block)
    w = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    convolutions = [
        (w[f"{role}.weight"], w.get(f"{role}.bias"))
        for role in ("conv_a", "conv_b", "conv_c", "conv_s")
        if f"{role}.weight" in w
    ]
    if neuron == "compact":
        assert len(convolutions) == 2  # in the order of the formula: conv_c, conv_s

    def mixed(x: Tensor) -> Tensor:
        return run_neuron(neuron, x, convolutions)

    def batch_norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"]
        )

    act = F.gelu if activation == "gelu" else F.relu
    x = 3 * image(2, 6, 9, 8)
    if norm == "layernorm":
        x1 = x + mixed(layer_norm(x, w["norm1.weight"], w["norm1.bias"]))
        hidden = block.expand(layer_norm(x1, w["norm2.weight"], w["norm2.bias"]))
    else:
        added = batch_norm(mixed(x), "norm1")
        x1 = x + (added if neuron == "linear" else added.clamp(-6, 6))
        hidden = batch_norm(block.expand(x1), "norm2")
    expected = x1 + block.project(act(hidden))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_fresh_mixer_adds_about_as_much_as_a_linear_one(neuron: str) -> None:
    torch.manual_seed(0)
    block = QuadraBlock(256, 5, 1, neuron=neuron)
    with torch.no_grad():
        y = block.mix(image(4, 256, 12, 12))[:, :, 2:-2, 2:-2]  # normal, as a norm leaves it; no borders
    # a third of the second moment of x is what torch's own convolution has
    assert 0.25 < float((y**2).mean()) < 1.0


def mean_squares(kernel: int) -> Tensor:
    """Return the mean square of fresh depthwise weights at each place of a kernel."""
    conv = MODULES["dwconv"](LayerSpec("conv_a", "dwconv", 8, 20_000, 20_000, kernel))
    assert isinstance(conv, nn.Conv2d)
    return conv.weight.detach().square().mean((0, 1))


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_fresh_depthwise_kernels_are_about_their_centres(kernel: int) -> None:
    torch.manual_seed(0)
    squares, smallest = (mean_squares(k) for k in (kernel, 3))
    centre, off = kernel // 2, kernel // 2 - 1
    assert float(squares.sum()) == pytest.approx(1 / 3, rel=0.03)  # as torch draws them
    falling = math.exp(1 / 0.7**2)
    assert float(squares[centre, centre] / squares[centre, off]) == pytest.approx(falling, rel=0.05)
    assert float(squares[off, centre] / squares[off, off]) == pytest.approx(falling, rel=0.05)
    # the centre of a large kernel, a smaller one's weights in a supernet, is as the smaller one starts
    inner = squares[centre - 1 : centre + 2, centre - 1 : centre + 2]
    torch.testing.assert_close(inner, smallest, rtol=0.05, atol=0.0)


def with_linear_part(neuron: str) -> tuple[QuadraBlock, QuadraBlock]:
    """Return a block at its linear start, and the linear block that it must be."""
    block, linear = QuadraBlock(6, 5, 2, neuron=neuron), QuadraBlock(6, 5, 2, neuron="linear")
    randomise(block)
    start_linear(block)
    state = block.state_dict()
    ordinary = "conv_a" if neuron in ("fan", "factored") else "conv_c"
    state["conv_c.weight"] = state[f"{ordinary}.weight"]
    state["conv_c.bias"] = state.get(f"{ordinary}.bias", torch.zeros(6))
    linear.load_state_dict({key: state[key] for key in linear.state_dict()})
    return block, linear


LINEAR_PART = ("quadranet", "linear", "factored", "fan", "compact")


@pytest.mark.parametrize("neuron", LINEAR_PART)
def test_at_its_start_a_neuron_is_the_linear_one_and_every_quadratic_weight_learns(neuron: str) -> None:
    block, linear = with_linear_part(neuron)
    x = image(2, 6, 9, 8)
    y = block(x)
    torch.testing.assert_close(y, linear(x), rtol=1e-5, atol=1e-5)
    (y**2).sum().backward()
    weights = quadratic_weights(block)
    assert bool(weights) == (neuron != "linear")
    # of QuadraNet's product the factor that is not zero learns once the other is
    zero = [weight for weight in weights if not weight.any()]
    assert bool(zero) == bool(weights)
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in zero)


@pytest.mark.parametrize("neuron", LINEAR_PART)
def test_a_mixer_without_its_quadratic_weights_is_linear_and_with_them_is_not(neuron: str) -> None:
    block = QuadraBlock(6, 5, 2, neuron=neuron).double()
    randomise(block)
    x = image(2, 6, 9, 8).double()

    def bend() -> float:
        with torch.no_grad():
            return float((block.mix(2 * x) - 2 * block.mix(x) + block.mix(0 * x)).abs().max())

    assert (bend() > 0.1) == (neuron != "linear")
    with torch.no_grad():
        for weight in quadratic_weights(block):
            weight.zero_()
    assert bend() < 1e-12


@pytest.mark.parametrize("neuron", [n for n in NEURONS if n not in LINEAR_PART])
def test_a_neuron_without_a_linear_part_has_no_linear_start(neuron: str) -> None:
    network = nn.Sequential(QuadraBlock(6, 5, 2), QuadraBlock(6, 5, 2, neuron=neuron))
    message = (
        "`linear_start`, `quadratic_gamma`, `quadratic_alpha` and `quadratic_beta` need neurons with a "
        f"linear part (quadranet, linear, factored, fan, compact), but the network has {neuron}"
    )
    for use in (start_linear, quadratic_weights):
        with pytest.raises(UsageError) as error:
            use(network)
        assert str(error.value) == message
