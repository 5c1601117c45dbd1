"""One image at a time on an A100: published networks, the fit to them, and the devices that ship."""

from dataclasses import replace

import numpy as np
import pytest
from fitting import a100_latency
from fitting.a100_latency import Costs, fit_costs, tensorrt_kernels
from fitting.a100_networks import EAGER, OVERLAPPED
from fitting.operators import fit_operators, read_operators
from helpers.places import LATENCY_DATA
from scipy.stats import spearmanr

from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel, fuse
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import layers_of, lower
from qnas.spaces.space import load_space

DATA = LATENCY_DATA / "a100_ops.csv"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="the measurements are not here")

GPU = load_device("a100")
WORK = {kind: {"kelements_in": 1e-5 * (i + 1)} for i, kind in enumerate(GPU.model)}


def weights(operators: tuple[Kernel, ...]) -> int:
    """Return the weights of convolutions and linear layers."""
    products = [k for k in operators if k.kind in ("conv", "dwconv", "gconv", "linear")]
    return sum(k.kernel**2 * (1 if k.kind == "dwconv" else k.c_in // k.groups) * k.c_out for k in products)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Keras' table of applications, MobileNet's paper; norms and biases, not in `weights`, are 1%
        *(("ResNet50-v1", 25.6), ("ResNet101-v1", 44.7), ("ResNet50-v2", 25.6), ("ResNet101-v2", 44.7)),
        *(("MobileNet-v1", 4.2), ("MobileNet-v2", 3.5), ("Inception-v3", 23.9), ("EfficientNet-B0", 5.3)),
        # the table that gives their latencies
        *(("YOLOv8n-cls", 2.7), ("YOLOv8s-cls", 6.4), ("YOLOv8m-cls", 17.0), ("YOLOv8l-cls", 37.5)),
        ("YOLOv8x-cls", 57.4),
    ],
)
def test_published_networks_have_the_parameters_of_their_source(name: str, millions: float) -> None:
    (operators,) = {network.operators for network in (*OVERLAPPED, *EAGER) if network.name == name}
    assert weights(operators) / 1e6 == pytest.approx(millions, rel=0.015, abs=0.05)


def test_tensorrt_runs_a_convolution_with_its_norm_activation_and_sum_as_one() -> None:
    conv = Kernel("conv", 14, 64, 64, 3)
    behind = [Kernel(kind, 14, 64, 64) for kind in ("bn", "relu")]
    summed = [Kernel(kind, 14, 64, 64) for kind in ("bn", "add", "relu")]
    assert tensorrt_kernels((conv, *behind, conv, *summed)) == (conv, conv)
    # a norm before a convolution remains
    assert [k.kind for k in tensorrt_kernels((*behind, conv))] == ["batchnorm", "conv"]
    # 13 blocks of two convolutions, the first convolution, pooling and the classes
    (mobilenet,) = (network for network in OVERLAPPED if network.name == "MobileNet-v1")
    assert len(tensorrt_kernels(mobilenet.operators)) == 13 * 2 + 1 + 2


def test_a_fit_finds_the_costs_that_made_the_latencies() -> None:
    costs = Costs(kernel_ms=0.007, kfan_in_ms=0.002, float32=2.0, tensor_cores=0.3)
    networks = []
    for network in OVERLAPPED:
        kernels = tensorrt_kernels(network.operators)
        sums = sum(
            k.kernel**2 * (1 if k.kind == "dwconv" else k.c_in)
            for k in kernels
            if k.kind in ("conv", "conv1x1", "dwconv", "linear")
        )
        work = sum(
            WORK[k.kind]["kelements_in"] * k.batch * k.resolution_px**2 * k.c_in / 1e3 for k in kernels
        )
        rate = costs.tensor_cores if network.tensor_cores else costs.float32
        ms = costs.kernel_ms * len(kernels) + costs.kfan_in_ms * sums / 1e3 + rate * work
        networks.append(replace(network, latency_ms=ms))
    found = fit_costs(WORK, networks)
    for name in ("kernel_ms", "kfan_in_ms", "float32", "tensor_cores"):
        assert getattr(found, name) == pytest.approx(getattr(costs, name), rel=1e-3), name


def test_no_network_takes_longer_by_an_eager_framework_than_its_operators_one_by_one() -> None:
    device = load_device("a100-eager")
    predicted = a100_latency.eager_ms(device.model)
    measured = np.array([network.latency_ms for network in EAGER])
    assert np.all(measured < predicted)
    assert np.all(measured > 0.5 * predicted)
    assert spearmanr(predicted, measured)[0] > 0.95
    told = device.accuracy["unseen networks"]["all"]
    assert told.bias_pct == pytest.approx(100 * np.mean(predicted / measured - 1), abs=0.01)
    # each lies in its interval at the highest level
    assert device.uncertainty is not None
    told_errors = device.uncertainty
    assert np.all(measured / predicted - 1 >= told_errors.errors[-1].low - 1e-6)
    assert a100_latency.network_uncertainty(EAGER, predicted, told_errors.source, 1.0) == told_errors


def test_float32_networks_of_tensorrt_take_what_the_device_says() -> None:
    found = [network for network in OVERLAPPED if not network.tensor_cores]
    predicted = [sum(map(GPU.kernel_ms, tensorrt_kernels(network.operators))) for network in found]
    assert len(found) == 4
    np.testing.assert_allclose(predicted, [network.latency_ms for network in found], rtol=0.06)


def test_the_accuracy_on_families_never_seen_is_in_the_file() -> None:
    every = GPU.accuracy["each family unseen"]["all"]
    assert every.n == len(OVERLAPPED)
    assert every.rmspe_pct < 15
    assert every.spearman is not None
    assert every.spearman > 0.9
    assert set(GPU.accuracy["unseen family"]) == {network.family for network in OVERLAPPED}


def test_a_kernel_of_the_a100_costs_a_fixed_time_its_longest_sum_and_its_work() -> None:
    least = GPU.kernel_ms(Kernel("relu", 1, 1, 1))
    # two thousand inputs of an output, and hardly any work
    deep = GPU.kernel_ms(Kernel("conv1x1", 1, 2000, 1)) - GPU.kernel_ms(Kernel("conv1x1", 1, 1000, 1))
    shallow = GPU.kernel_ms(Kernel("conv1x1", 1, 1000, 2)) - GPU.kernel_ms(Kernel("conv1x1", 1, 1000, 1))
    assert 0.007 < least < 0.010
    assert 0.003 < deep < 0.004
    assert shallow < 0.01 * deep
    # no longer than launched and waited for
    eager = load_device("a100-eager")
    for kernel in (
        Kernel("layernorm", 14, 256, 256),
        Kernel("dwconv", 28, 96, 96, 7),
        Kernel("add", 56, 64, 64),
    ):
        assert least < GPU.kernel_ms(kernel) < eager.kernel_ms(kernel)


def test_only_kernels_of_the_networks_and_their_sizes_are_fitted() -> None:
    assert GPU.kernel_source(Kernel("conv1x1", 14, 512, 1024)) == "fitted"
    assert GPU.kernel_source(Kernel("dwconv", 14, 256, 256, 7)) == "fitted"
    for kernel in (
        Kernel("conv1x1", 14, 512, 6000),
        Kernel("dwconv", 14, 256, 256, 9),
        *(Kernel(kind, 14, 256, 256) for kind in ("layernorm", "gelu", "add", "mul")),
    ):
        assert GPU.kernel_source(kernel) == "estimated"


def test_the_papers_network_takes_what_the_paper_says() -> None:
    """QuadraNet's table III: 948M multiply-adds take 2.9 ms. Which blocks it has is not published."""
    space = load_space("quadranet-gpu")
    expansion_4 = [
        [i for i, c in enumerate(p.candidates) if c.parameters.get("expansion") == 4] for p in space.positions
    ]
    for kernel in range(3):
        arch = arch_from_indices(space, tuple(each[kernel] for each in expansion_4))
        blocks = lower(space, arch)
        macs = sum(layer.macs for layer in layers_of(blocks))
        assert macs == pytest.approx(948e6, rel=0.15)
        latency_ms = sum(GPU.kernel_ms(k) for block in blocks for k in fuse(block.layers, "eager"))
        assert latency_ms == pytest.approx(2.9, rel=0.1)
    # the paper's budget of 3 ms binds: the largest network is above it
    table = load_table(GPU, space)
    most = sum(max(cell.latency_ms for cell in row) for row in table.cells)
    assert most + sum(cell.latency_ms for _, cell in table.fixed) > 3.0


@needs_data
@pytest.mark.slow
def test_intervals_hold_their_share_of_families_that_no_fit_saw() -> None:
    grids, _ = fit_operators(*read_operators(DATA))
    predicted = a100_latency.left_out(grids)
    measured = np.array([network.latency_ms for network in OVERLAPPED])
    families = np.array([network.family for network in OVERLAPPED])
    assert np.mean(np.abs(predicted / measured - 1) <= 0.2) >= 0.8
    assert GPU.uncertainty is not None
    for errors in GPU.uncertainty.errors:
        off = measured / predicted - 1
        within = (off >= errors.low - 1e-6) & (off <= errors.high + 1e-6)
        share = np.mean([np.mean(within[families == family]) for family in set(families.tolist())])
        assert share >= errors.level - 1 / len(OVERLAPPED)
    told = GPU.uncertainty
    found = a100_latency.network_uncertainty(OVERLAPPED, predicted, told.source, told.weight)
    assert found == told


@needs_data
@pytest.mark.slow
def test_a_family_left_out_does_not_move_its_own_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, _ = fit_operators(*read_operators(DATA))
    before = a100_latency.left_out(grids)
    slower = tuple(
        replace(network, latency_ms=3 * network.latency_ms) if network.family == "gpunet" else network
        for network in OVERLAPPED
    )
    monkeypatch.setattr(a100_latency, "OVERLAPPED", slower)
    after = a100_latency.left_out(grids)
    same = np.array([network.family == "gpunet" for network in OVERLAPPED])
    np.testing.assert_allclose(after[same], before[same], rtol=1e-9)
    assert np.all(np.abs(after[~same] / before[~same] - 1) > 0.005)


def test_features_of_the_fit_are_those_of_device_files() -> None:
    assert FEATURES["kfan_in"](Kernel("dwconv", 7, 64, 64, 5)) == pytest.approx(0.025)
    assert FEATURES["kfan_in"](Kernel("conv", 7, 64, 32, 3)) == pytest.approx(0.576)
