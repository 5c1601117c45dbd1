"""Devices fitted to networks that were timed as a whole and published: GPUs, a desktop CPU, an A100."""

import itertools

import numpy as np
import pytest
import show_limits
from fitting import a100
from fitting.desktop import CHIPS, PASSES
from fitting.fit import design, fit_robust
from fitting.published import FOLDS, PUBLISHED, fold_of
from helpers.places import LATENCY_DATA
from scipy.stats import spearmanr

from qnas.latency.device import device_names, load_device
from qnas.latency.evaluation import Networks, read_networks
from qnas.latency.intervals import LEVELS
from qnas.latency.kernels import Kernel, chain_kind, fuse_operators

DATA = LATENCY_DATA / "gpu_desktop_models.npz"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="the measurements are not here")

# device -> least share within 10% of a fifth never seen, of all fifths in turn; within 15% of whole families
REACHED = {
    "rtx4090": (95, 94, 80),
    "rtx4090-compiled": (84, 87, 80),
    "rtx3090": (86, 86, 80),
    "rtx5090": (80, 84, 80),
    "i7-12700h": (80, 80, 80),
}


@pytest.fixture(scope="module")
def networks() -> Networks:
    return read_networks(DATA)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_device_file_says_how_far_off_it_is_on_networks_never_seen(name: str) -> None:
    random, in_turn, family = REACHED[name]
    accuracy = load_device(name).accuracy
    assert accuracy["unseen networks"]["all"].within_10_pct >= random
    assert accuracy["each fifth unseen"]["all"].within_10_pct >= in_turn
    share = accuracy["each family unseen"]["all"].within_15_pct
    assert share is not None
    assert share >= family
    assert "convnext" in accuracy["unseen family"]


@needs_data
@pytest.mark.parametrize("name", ["rtx4090", "rtx4090-compiled"])
def test_a_fit_that_never_saw_a_fifth_of_the_names_predicts_them(name: str, networks: Networks) -> None:
    # another fifth than that of the device file
    column, fusion, form = PUBLISHED[name]
    assert networks.names is not None
    known = np.isfinite(networks.latency_ms[column])
    of = design(form, *networks.only(known).fused(fusion))
    names, index = np.unique(networks.names[known], return_inverse=True)
    unseen = (np.arange(len(names)) % 5 == 2)[index]
    measured = networks.latency_ms[column][known]
    weights = fit_robust(of.matrix[~unseen], measured[~unseen], of.lowest)
    error = np.abs(of.matrix[unseen] @ weights / measured[unseen] - 1)
    assert np.mean(error <= 0.1) >= REACHED[name][0] / 100 - 0.06


@needs_data
def test_every_operator_of_the_published_networks_has_a_cost(networks: Networks) -> None:
    fusions = {fusion for _, fusion, _ in PUBLISHED.values()}
    kinds = {fusion: {kernel.kind for kernel in networks.fused(fusion)[0]} for fusion in fusions}
    for name, (_, fusion, _) in PUBLISHED.items():
        assert kinds[fusion] <= set(load_device(name).model), name


@needs_data
def test_norms_of_weights_and_rows_of_linear_layers_are_told(networks: Networks) -> None:
    assert networks.names is not None
    numbers = {str(name): of for name, of in zip(networks.names, networks.of_network, strict=True)}
    kinds = [networks.operators[j].kind for j in numbers["nfnet_f0"]]
    assert "weight_norm" in kinds
    assert "bn" not in kinds
    linear = next(
        networks.operators[j] for j in numbers["convnext_tiny"] if networks.operators[j].kind == "linear"
    )
    assert linear.rows == linear.batch > 1


def test_chains_are_one_pass_and_end_with_their_block() -> None:
    shape = {"resolution_px": 28, "c_in": 40, "c_out": 40}
    names = ("dwconv", "batchnorm", "add", "relu", "layernorm", "add", "add", "gelu", "gap")
    kinds = [kernel.kind for kernel in fuse_operators([Kernel(n, **shape) for n in names], "inductor")]
    assert kinds == ["dwconv", "pass+1", "layernorm", "pass+2-gelu", "gap"]
    # after an addition, another block may begin
    assert [
        kernel.kind
        for kernel in fuse_operators([Kernel(n, **shape) for n in ("add", "batchnorm")], "inductor")
    ] == ["pass+1", "pass"]


def test_a_compiler_of_gpus_writes_the_map_of_a_norm_unless_it_is_that_of_a_shortcut() -> None:
    def kinds(*operators: Kernel) -> list[str]:
        return [kernel.kind for kernel in fuse_operators(operators, "triton")]

    px28, conv, norm = {"resolution_px": 28, "c_in": 40, "c_out": 40}, "conv1x1", "batchnorm"
    wide, narrow = Kernel("conv", 28, 40, 40), Kernel("conv", 56, 20, 40, 1, 2)
    bn, relu, add, gap = (Kernel(name, **px28) for name in (norm, "relu", "add", "gap"))
    assert kinds(wide, bn, wide, bn, relu) == [conv, "pass", conv, "pass"]
    assert kinds(wide, bn, narrow, bn, add, relu) == [conv, "conv", "pass+1"]
    assert kinds(wide, bn) == [conv]  # at the end of a block, as exported
    assert kinds(wide, bn, gap) == [conv, "pass-gap"]
    layernorm, swish = Kernel("layernorm", **px28), Kernel("swish", **px28)
    assert kinds(layernorm, swish, wide) == ["layernorm", conv]
    assert kinds(layernorm, wide) == ["layernorm", conv]
    assert kinds(layernorm, add) == ["layernorm", "pass+1"]


def test_a_pass_costs_a_share_of_what_memory_moves() -> None:
    kelements = 56 * 56 * 96 / 1e3
    for name in ("rtx4090", "rtx3090", "rtx4090-compiled", "rtx5090"):
        device, chip = load_device(name), CHIPS[name.removesuffix("-compiled")]
        side_ms = 2e3 * kelements / chip.bytes_per_s * 1e3  # float16
        for kind, maps in (("relu", 2), ("batchnorm", 2), ("layernorm", 2), ("add", 3), ("mul", 3)):
            assert device.kernel_ms(Kernel(kind, 56, 96, 96)) >= 0.59 * maps * side_ms, (name, kind)


def test_folds_keep_networks_of_one_name_together() -> None:
    names = np.array([f"net{i % 40}" for i in range(100)])
    folds = fold_of(names)
    assert set(folds.tolist()) == set(range(FOLDS))
    for name in set(names.tolist()):
        assert len(set(folds[names == name].tolist())) == 1
    sizes = [len(set(names[folds == fold].tolist())) for fold in range(FOLDS)]
    assert sizes == [8] * FOLDS


def test_limits_are_those_of_equal_networks_and_of_another_device() -> None:
    groups = show_limits.twins([np.array([1, 2]), np.array([2, 1]), np.array([1, 2]), np.array([3])])
    assert groups == [[0, 2]]
    assert show_limits.spread(np.array([2.0, 9.0, 2.5, 1.0]), groups) == pytest.approx(0.25)
    assert np.isnan(show_limits.spread(np.array([2.0, 9.0, np.nan, 1.0]), groups))
    measured = np.array([1.0, 2.0, 3.0, np.nan])
    scaled = show_limits.scaled_to(np.array([2.0, 4.0, 8.0, 1.0]), measured)
    assert scaled == pytest.approx([1.0, 2.0, 4.0, 0.5])
    assert show_limits.share_near(scaled, measured) == pytest.approx(2 / 3)


@needs_data
def test_numbers_that_keep_the_maps_of_nfnets_in_range_are_told_from_products(networks: Networks) -> None:
    assert networks.names is not None
    numbers = {str(name): of for name, of in zip(networks.names, networks.of_network, strict=True)}
    kinds = [networks.operators[j].kind for j in numbers["nf_seresnet26"]]
    assert "mul_scalar" in kinds
    assert "mul" not in kinds
    assert "mul" in [networks.operators[j].kind for j in numbers["gmlp_s16_224"]]


def test_a_chain_costs_more_with_every_map_and_every_function() -> None:
    for name in ("rtx4090-compiled", "rtx5090", "i7-12700h"):
        device = load_device(name)
        assert set(PASSES) <= set(device.model)
        ms = {kind: device.kernel_ms(Kernel(kind, 56, 96, 96)) for kind in PASSES}
        assert ms["pass"] <= ms["pass+1"] <= ms["pass+2"] <= ms["pass+3"]
        assert ms["pass"] <= ms["pass-swish"] <= ms["pass-swish-gap"]
        assert chain_kind(["add", "sub"]) == "pass+2"


@pytest.mark.parametrize("name", ["rtx4090", "rtx3090", "rtx4090-compiled", "rtx5090"])
def test_grouped_convolutions_cost_less_than_dense_ones_and_more_than_nothing(name: str) -> None:
    device = load_device(name)
    dense = device.kernel_ms(Kernel("conv", 28, 256, 256, 3))
    grouped = device.kernel_ms(Kernel("gconv", 28, 256, 256, 3, groups=8))
    assert 0 < grouped < dense


@pytest.mark.parametrize("name", device_names())
def test_every_device_that_was_fitted_to_networks_has_intervals(name: str) -> None:
    uncertainty = load_device(name).uncertainty
    # few families of networks are published for the A100
    families, levels = {"a100": (6, 3), "a100-eager": (5, 3), "a100-throughput": (3, 2)}.get(name, (9, 4))
    assert uncertainty is not None
    assert uncertainty.families is not None
    assert uncertainty.families >= families
    assert [errors.level for errors in uncertainty.errors] == list(LEVELS[:levels])
    for inner, outer in itertools.pairwise(uncertainty.errors):
        assert -1 < outer.low <= inner.low < 0 <= inner.high <= outer.high < 1


def test_published_networks_have_the_multiply_adds_of_their_papers() -> None:
    # ConvNeXt-T 4.5G and Swin-T 4.5G (arXiv 2201.03545, table 1), HorNet-T 4.0G (arXiv 2207.14284, table 1)
    published = {network.name: network for network in a100.PUBLISHED}
    for name, giga in (
        ("ConvNeXt-T 224", 4.5),
        ("ConvNeXt-B 224", 15.4),
        ("Swin-T 224", 4.5),
        ("HorNet-T", 4.0),
    ):
        kernels = fuse_operators(published[name].operators, "eager")
        products = [k for k in kernels if k.kind in ("linear", "conv1x1", "patch", "conv", "dwconv")]
        macs = sum(k.rows * k.kernel**2 * (1 if k.kind == "dwconv" else k.c_in) * k.c_out for k in products)
        assert macs / 1e9 == pytest.approx(giga, rel=0.03), name


def test_the_a100_agrees_with_published_throughputs() -> None:
    predicted = a100.predict(load_device("a100-throughput").model, a100.PUBLISHED)
    measured = np.array([network.ms for network in a100.PUBLISHED])
    within = np.abs(predicted / measured - 1) <= 0.2
    assert np.mean(within) >= 0.8
    assert spearmanr(predicted, measured)[0] >= 0.95
    unseen = np.array([network.family != a100.FITTED for network in a100.PUBLISHED])
    assert np.mean(within[unseen]) >= 0.8


def test_intervals_on_the_a100_hold_their_share_of_the_families_that_were_not_fitted() -> None:
    device = load_device("a100-throughput")
    uncertainty = device.uncertainty
    assert uncertainty is not None
    for errors in uncertainty.errors:
        shares = []
        for family in ("swin", "quadranet", "hornet"):
            networks = [n for n in a100.PUBLISHED if n.family == family]
            predicted = a100.predict(device.model, networks)
            off = np.array([n.ms for n in networks]) / predicted - 1
            shares.append(np.mean((off >= errors.low - 1e-6) & (off <= errors.high + 1e-6)))
        assert np.mean(shares) >= errors.level - 1 / 14
