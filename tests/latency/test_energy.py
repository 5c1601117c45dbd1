"""Energies that a device file states: exact sums over kernels, and a table of them for each space."""

import math
from typing import Any

import numpy as np
import pytest
from helpers.energies import metered

from qnas.common.errors import TableError
from qnas.latency.device import Device, parse_device
from qnas.latency.device_table import compute_table
from qnas.latency.energy import energy_table
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel, fuse
from qnas.latency.prediction import predict_arch
from qnas.spaces.arch import sample_arch
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace

KERNEL = Kernel("conv1x1", 14, 32, 64)


def test_power_times_latency_is_energy(tiny_space: SearchSpace) -> None:
    device = metered(power_w=2.5)
    table = compute_table(device, tiny_space)
    energies = energy_table(device, tiny_space, table)
    assert device.kernel_mj(KERNEL) == 2.5 * device.kernel_ms(KERNEL)
    assert energies.fixed_mj == pytest.approx(2.5 * table.fixed_ms)
    for row, latencies in zip(energies.mj, table.ms, strict=True):
        assert row == pytest.approx([2.5 * ms for ms in latencies])


def test_a_table_of_energies_sums_to_the_kernels_of_each_network(tiny_space: SearchSpace) -> None:
    device = metered(
        power_w=2.0,
        fixed_mj=0.75,
        kinds={"conv1x1": {"energy_mj": {"launch": 0.01, "mmacs": 0.2}}, "dwconv": {"power_w": 3.0}},
    )
    table = compute_table(device, tiny_space)
    energies = energy_table(device, tiny_space, table)
    rng = np.random.default_rng(0)

    def stated(kernel: Kernel) -> float:
        if kernel.kind == "conv1x1":
            return 0.01 + 0.2 * FEATURES["mmacs"](kernel)
        return (3.0 if kernel.kind == "dwconv" else 2.0) * device.kernel_ms(kernel)

    for _ in range(20):
        arch = sample_arch(tiny_space, rng)
        kernels = [k for block in lower(tiny_space, arch) for k in fuse(block.layers, device.fusion)]
        expected = math.fsum([0.75, *map(stated, kernels)])
        cells = zip(energies.mj, arch.indices(tiny_space), strict=True)
        assert math.fsum([energies.fixed_mj, *(row[i] for row, i in cells)]) == pytest.approx(expected)
        prediction = predict_arch("device", device, tiny_space, arch)
        assert prediction.energy_mj == pytest.approx(expected)


def test_a_kind_like_another_takes_its_energy_unless_it_has_its_own() -> None:
    device = metered(kinds={"relu": {"energy_mj": {"launch": 0.5}}, "like": {"power_w": 4.0}})
    likes = [kind for kind, model in device.model.items() if model.like == "relu"]
    for kind in likes:
        assert device.kernel_mj(Kernel(kind, 14, 32, 32)) == 0.5


def test_energy_that_is_not_stated_is_an_error_not_zero(tiny_space: SearchSpace) -> None:
    table = compute_table(metered(power_w=1.0), tiny_space)
    with pytest.raises(TableError, match=r"states no energy: add power_w, or power_w or energy_mj"):
        energy_table(metered(), tiny_space, table)
    assert (
        predict_arch(
            "device", metered(), tiny_space, sample_arch(tiny_space, np.random.default_rng(0))
        ).energy_mj
        is None
    )
    partly = metered(fixed_mj=0.0, kinds={"conv1x1": {"power_w": 1.0}})
    with pytest.raises(TableError, match=r"states no energy of '\w+' kernels, only of conv1x1: add theirs"):
        energy_table(partly, tiny_space, table)


def test_the_fixed_part_is_stated_or_follows_from_the_power() -> None:
    kinds: dict[str, Any] = {"conv1x1": {"power_w": 1.0}}
    assert metered(fixed_ms=2.0, power_w=3.0, kinds=kinds).network_mj == 6.0
    assert metered(fixed_ms=2.0, fixed_mj=1.0, kinds=kinds).network_mj == 1.0
    assert metered(fixed_ms=0.0, kinds=kinds).network_mj == 0.0
    with pytest.raises(TableError, match="take 2 ms besides their kernels, of unknown energy: add fixed_mj"):
        _ = metered(fixed_ms=2.0, kinds=kinds).network_mj


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power_w": 0.0}, "power_w: expected more than 0"),
        ({"power_w": -1.0}, "power_w: expected more than 0"),
        ({"fixed_mj": -1.0}, "fixed_mj: expected at least 0"),
        (
            {"kinds": {"conv1x1": {"power_w": 1.0, "energy_mj": {"launch": 1.0}}}},
            "one of energy_mj and power_w",
        ),
        ({"kinds": {"conv1x1": {"energy_mj": {"mmac": 1.0}}}}, "unknown feature 'mmac': did you mean mmacs"),
        ({"kinds": {"conv1x1": {"energy_mj": {"mmacs": 0.0}}}}, "energy_mj must have a term above 0"),
    ],
)
def test_energies_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        metered(**change)


def test_a_file_with_energies_reads_back() -> None:
    device = metered(power_w=2.5, kinds={"conv1x1": {"energy_mj": {"mmacs": 0.2}}})
    again: Device = parse_device(device.to_json(), "again")
    assert again == device
    assert again.kernel_mj(KERNEL) == device.kernel_mj(KERNEL)


def test_no_shipped_device_states_energies() -> None:
    from qnas.latency.device import device_names, load_device

    assert not [name for name in device_names() if load_device(name).states_energy]
