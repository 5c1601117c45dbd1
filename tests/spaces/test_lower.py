import math

import numpy as np
import pytest

from qnas.common.errors import SpaceError
from qnas.common.resources import stems
from qnas.latency.kernels import FUSIONS, fuse
from qnas.spaces.arch import Arch, only_arch, sample_arch
from qnas.spaces.blocks import Place, quadra_layers
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import (
    BlockSpec,
    Slot,
    count_macs,
    count_params,
    fill,
    layers_of,
    lower,
    make_block,
    skeleton,
)
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import SearchSpace, load_space

SHIPPED = list(stems("search_spaces", ".yaml"))


# QuadraNet's Table I (arXiv 2311.17956): millions of parameters, giga MACs at 224. Its rows 36-S and 25-B
# are 3% off what its own rules of width and depth give.
@pytest.mark.parametrize(
    ("name", "params_m", "macs_g", "tolerance"),
    [
        ("quadranet25-t", 16.2, 2.9, 0.01),
        ("quadranet36-t", 23.6, 4.1, 0.01),
        ("quadranet36-s", 50.2, 8.9, 0.03),
        ("quadranet25-b", 61.2, 11.1, 0.03),
        ("quadranet36-b", 90.4, 15.8, 0.01),
    ],
)
def test_the_quadranets_have_the_published_size(
    name: str, params_m: float, macs_g: float, tolerance: float
) -> None:
    space = load_space(name)
    blocks = lower(space, only_arch(space))
    assert count_params(blocks) / 1e6 == pytest.approx(params_m, rel=tolerance)
    assert count_macs(blocks) / 1e9 == pytest.approx(macs_g, rel=tolerance)


def test_proxyless_mobile_spans_the_published_sizes() -> None:
    # ProxylessNAS's own networks of this space have 275M to 333M MACs on phones and CPUs
    # (arXiv 2311.17956, Table III)
    space = load_space("proxyless-mobile")
    small, large = _extremes(space)
    assert count_macs(lower(space, small)) < 275e6
    assert count_macs(lower(space, large)) > 333e6


def _extremes(space: SearchSpace) -> tuple[Arch, Arch]:
    slots = [part for part in skeleton(space) if isinstance(part, Slot)]
    costs = [{c.name: count_macs([fill(space, slot, c)]) for c in slot.position.candidates} for slot in slots]
    return (
        Arch(tuple(min(cost, key=cost.__getitem__) for cost in costs)),
        Arch(tuple(max(cost, key=cost.__getitem__) for cost in costs)),
    )


@pytest.mark.parametrize("name", ["quadranet-mobile", "quadranet-mobile-bn"])
def test_the_mobile_space_reaches_from_below_100m_to_above_350m_macs(name: str) -> None:
    space = load_space(name)
    small, large = _extremes(space)
    assert count_macs(lower(space, small)) < 100e6
    assert count_macs(lower(space, large)) > 350e6


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("resolution_px", [None, 32, 45, 224])
def test_every_block_begins_where_the_one_before_ended(name: str, resolution_px: int | None) -> None:
    space = load_space(name)
    for seed in range(3):
        blocks = lower(space, sample_arch(space, np.random.default_rng(seed)), resolution_px=resolution_px)
        px, channels = resolution_px or space.input.resolution_px, space.input.channels
        for block in blocks:
            px, channels = _run_through(block, px, channels)
        assert (px, channels) == (1, space.head.classes)


def _run_through(block: BlockSpec, px: int, channels: int) -> tuple[int, int]:
    """Follow the shape through a block; the parallel convolutions of a quadratic mixer share an input.

    In a star block and an inverted residual with options, a layer reads any map before it.
    """
    maps = [(px, channels)]
    for spec in block.layers:
        known = maps if block.block in ("star", "mbconv") else maps[-1:]
        assert (spec.resolution_px, spec.c_in) in known, (block.name, spec)
        maps.append((spec.out_px, spec.c_out))
    return maps[-1]


def test_the_fixed_part_is_the_network_of_identities() -> None:
    space = load_space("quadranet-small")
    blocks = lower(space, Arch(("identity",) * len(space.positions)))
    fixed = tuple(part for part in skeleton(space) if isinstance(part, BlockSpec))
    assert [block.name for block in fixed] == ["stem", "2.transition", "3.transition", "head"]
    assert tuple(block for block in blocks if block.layers) == fixed
    # stem: 2x2 patches of 3 channels to 32; LN; transitions: LN and 2x2 patches; head: LN, classifier
    stem = 4 * 3 * 32 + 32 + 2 * 32
    transitions = (2 * 32 + 4 * 32 * 64 + 64) + (2 * 64 + 4 * 64 * 128 + 128)
    head = 2 * 128 + 128 * 10 + 10
    assert count_params(fixed) == stem + transitions + head
    assert count_macs(fixed) == 16**2 * 4 * 3 * 32 + 8**2 * 4 * 32 * 64 + 4**2 * 4 * 64 * 128 + 128 * 10


def test_a_quadra_block_costs_what_the_formula_says() -> None:
    space = load_space("quadranet36-t")
    slot = next(part for part in skeleton(space) if isinstance(part, Slot))
    block = fill(space, slot, slot.position.candidates[0])
    c, k, e, px = 64, 7, 4, 56
    norms, biases = 2 * 2 * c, e * c + c
    assert count_params([block]) == 3 * k**2 * c + 2 * e * c**2 + biases + norms
    assert count_macs([block]) == px**2 * (3 * k**2 * c + 2 * e * c**2)


# What the formulas in docs/guides/blocks.md have: weights W, biases (compact's two are one constant), and
# elementwise operators between maps: products, squares, sums.
FORMULAS: dict[str, tuple[int, int, int, int, int]] = {
    "quadranet": (3, 0, 1, 0, 1),
    "linear": (1, 1, 0, 0, 0),
    "type2": (1, 0, 0, 1, 0),
    "type3": (1, 0, 0, 1, 0),
    "type4": (2, 0, 1, 0, 0),
    "factored": (2, 2, 1, 0, 0),
    "fan": (3, 3, 1, 1, 1),
    "compact": (2, 1, 0, 1, 1),
}


def test_a_star_block_costs_what_its_formula_says() -> None:
    c, k, e, px = 8, 5, 3, 9
    place = Place(c, c, 1, px, "batchnorm", "relu6")
    depthwise, pointwise = k**2 * c, e * c**2
    for mixers, count in (("double", 2), ("single", 1)):
        block = make_block("1.1", "star", place, kernel=k, expansion=e, mixers=mixers)
        biases, norms = 2 * e * c + (count - 1) * c, 2 * 2 * c
        assert count_params([block]) == count * depthwise + 3 * pointwise + biases + norms
        assert count_macs([block]) == px**2 * (count * depthwise + 3 * pointwise)


def test_an_inverted_residual_with_options_costs_what_its_formula_says() -> None:
    c, c_out, k, e, px = 8, 16, 3, 4, 9
    hidden, out, squeezed = e * c, 5, 8
    place = Place(c, c_out, 2, px, "batchnorm", "relu6")
    plain = make_block("1.1", "mbconv", place, kernel=k, expansion=e)
    both = make_block("1.1", "mbconv", place, kernel=k, expansion=e, neuron="factored", attention="se")
    added = 2 * hidden * squeezed
    assert count_params([both]) - count_params([plain]) == (
        (k**2 * hidden + 2 * hidden) + added + hidden + squeezed
    )
    assert count_macs([both]) - count_macs([plain]) == out**2 * k**2 * hidden + added
    assert (plain.kind, both.kind) == ("mbconv", "mbconv_factored_se")


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_a_neuron_costs_what_its_formula_says(neuron: str, norm: str) -> None:
    c, k, e, px = 8, 5, 2, 9
    layers = quadra_layers(Place(c, c, 1, px, norm, "gelu"), k, e, neuron)
    block = BlockSpec("1.1", "quadra", layers)
    weights, biases, *elementwise = FORMULAS[neuron]
    if norm == "batchnorm" and neuron in ("linear", "fan", "compact"):
        biases -= 1  # what is added at the end is the norm's shift
    norms = 2 * (c + c) if norm == "layernorm" else 2 * (c + e * c)
    pointwise = 2 * e * c**2 + c + (e * c if norm == "layernorm" else 0)
    assert count_params([block]) == weights * k**2 * c + biases * c + norms + pointwise
    assert count_macs([block]) == px**2 * (weights * k**2 * c + 2 * e * c**2)
    ops = [layer.op for layer in layers]
    residuals = 2
    products, squares, sums = elementwise
    assert [ops.count(op) for op in ("mul", "square", "add")] == [products, squares, sums + residuals]


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_batch_norm_follows_what_it_can_fold_into_and_a_clip_what_multiplies(neuron: str) -> None:
    layers = quadra_layers(Place(8, 8, 1, 9, "batchnorm", "gelu"), 3, 2, neuron)
    roles = [layer.role for layer in layers]
    before = layers[roles.index("norm1") - 1]
    # a square or a product that comes last takes up no shift
    assert before.op == {"type3": "square", "type4": "mul", "factored": "mul"}.get(neuron, "dwconv")
    assert ("clip" in roles) == (neuron != "linear")


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_learned_scale_follows_what_it_folds_into_and_costs_a_number_a_channel(neuron: str) -> None:
    c, k, e = 8, 5, 2
    place = Place(c, c, 1, 9, "batchnorm", "gelu")
    block, normed = (
        make_block("1.1", "quadra", place, kernel=k, expansion=e, neuron=neuron, norm=norm)
        for norm in ("scale", "batchnorm")
    )
    weights, biases, *_ = FORMULAS[neuron]
    pointwise = 2 * e * c**2 + e * c + c  # both convolutions have a bias
    assert count_params([block]) == weights * k**2 * c + biases * c + pointwise + 2 * c
    assert count_macs([block]) == count_macs([normed])
    roles = [layer.role for layer in block.layers]
    before = block.layers[roles.index("scale1") - 1]
    assert before.op == ("square" if neuron == "type3" else "dwconv")
    assert roles[roles.index("scale2") - 1] == "project"
    assert ("clip" in roles) == (neuron != "linear")
    # as a batch norm does; and where a product takes up no shift, it takes up a scale
    for fusion in FUSIONS:
        kernels, others = ([kernel.kind for kernel in fuse(b.layers, fusion)] for b in (block, normed))
        assert len(kernels) <= len(others)
        assert "layerscale" not in kernels
        if fusion == "edge":
            assert ("scale" in kernels) == (neuron == "type3")
            assert "batchnorm" not in kernels


def test_counts_are_sums_over_positions() -> None:
    space = load_space("proxyless-mobile")
    arch = sample_arch(space, np.random.default_rng(0))
    parts = skeleton(space)
    fixed = count_macs(part for part in parts if isinstance(part, BlockSpec))
    slots = [part for part in parts if isinstance(part, Slot)]
    chosen = [
        count_macs([fill(space, slot, slot.position.candidate(choice))])
        for slot, choice in zip(slots, arch.choices, strict=True)
    ]
    assert count_macs(lower(space, arch)) == fixed + sum(chosen)


def test_classes_change_the_classifier_only() -> None:
    space = load_space("quadranet-small")
    arch = sample_arch(space, np.random.default_rng(0))
    ten, many = lower(space, arch), lower(space, arch, classes=100)
    assert ten[:-1] == many[:-1]
    assert [spec.c_out for spec in layers_of(many)][-1] == 100
    assert count_params(many) - count_params(ten) == 90 * (128 + 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolution_too_small_is_refused_with_the_smallest_possible(name: str) -> None:
    space = load_space(name)
    smallest = space.stem.stride * math.prod(stage.stride for stage in space.stages)
    assert skeleton(space, resolution_px=smallest)
    with pytest.raises(SpaceError) as error:
        skeleton(space, resolution_px=smallest - 1)
    assert str(error.value) == (
        f"resolution {smallest - 1} px is too small for space {name}: at least {smallest} px"
    )


def test_batch_norm_stands_where_it_can_be_folded() -> None:
    # directly after the last convolution of what it normalises, never before a padded one
    space = load_space("quadranet-mobile-bn")
    for block in lower(space, sample_arch(space, np.random.default_rng(0))):
        specs = block.layers
        for before, spec in zip((None, *specs), specs, strict=False):
            if spec.op == "batchnorm":
                assert isinstance(before, LayerSpec)
                assert before.op in ("conv", "dwconv")


def test_what_a_batch_normed_mixer_adds_is_clipped_after_its_sum() -> None:
    def roles(norm: str) -> list[str]:
        return [spec.role for spec in quadra_layers(Place(8, 8, 1, 9, norm, "gelu"), 3, 2)]

    batch, layer = roles("batchnorm"), roles("layernorm")
    assert batch[: batch.index("expand")] == (
        ["conv_a", "conv_b", "product", "conv_c", "norm1", "sum", "clip", "residual1"]
    )
    assert "clip" not in layer
    assert sorted(batch) == sorted([*layer, "clip"])
