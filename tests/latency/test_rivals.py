"""Rivals meet all limits, and the front is what no other of them beats."""

import csv
import io
import itertools

import numpy as np
import pytest

from qnas.common.errors import InfeasibleBudgetError, TableError, UsageError
from qnas.latency.device import Calibration, Device, load_device
from qnas.latency.kernels import Kernel
from qnas.latency.own_latency import device_from_function
from qnas.latency.public_networks import public_networks
from qnas.latency.rivals import find_rivals, on_front, price_public_networks


def macs_device() -> Device:
    """A device whose latency is a microsecond and a nanosecond per output."""

    def price(kernel: Kernel) -> float:
        return 1e-3 + 1e-6 * kernel.rows * kernel.c_out

    return device_from_function("counts", layer=price)


def test_the_front_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    ms, top1 = rng.integers(1, 6, (60, 2)).astype(float), rng.integers(1, 6, 60) / 10
    top1[::7] = np.nan

    def beats(a: int, b: int) -> bool:
        as_good = top1[a] >= top1[b] and all(ms[a] <= ms[b])
        return bool(as_good and (top1[a] > top1[b] or any(ms[a] < ms[b])))

    expected = [
        not np.isnan(top1[b]) and not any(beats(a, b) for a in range(60) if a != b) for b in range(60)
    ]
    assert on_front(ms, top1).tolist() == expected
    assert 0 < sum(expected) < 60


@pytest.mark.parametrize("device", ["vpu", "cpu", "adreno640"])
def test_rivals_are_all_networks_within_the_budget_the_front_first(device: str) -> None:
    known = load_device(device)
    ms = [found.latency_ms for found in price_public_networks(known)]
    budget = float(np.median(ms))
    rivals = find_rivals([(known, budget)])
    assert len(rivals.networks) == sum(each <= budget for each in ms)
    assert rivals.known == len(ms) == 842
    marks = [rival.on_front for rival in rivals.networks]
    assert marks == sorted(marks, reverse=True)
    front = [(rival.latency_ms, rival.network.imagenet_top1) for rival in rivals.front]
    assert all(a > b for (a, _), (b, _) in itertools.pairwise(front))  # the most accurate first, each faster
    for rival in rivals.networks[len(front) :]:
        top1 = rival.network.imagenet_top1
        assert top1 is None or any(a <= rival.latency_ms and (b or 0) >= top1 for a, b in front)
    unknown = [rival.network.imagenet_top1 is None for rival in rivals.networks]
    assert unknown == sorted(unknown)


def test_all_limits_have_to_be_met() -> None:
    budgets = [(load_device("vpu"), 40.0), (load_device("cpu"), 60.0)]
    both = find_rivals(budgets, max_params=4e6, max_macs=300e6)
    assert both.networks
    for rival in both.networks:
        assert rival.network.params <= 4e6
        assert rival.network.macs <= 300e6
        assert [on.device for on in rival.latencies] == ["myriad-vpu", "cortex-a76"]
        assert rival.latencies[0].latency_ms <= 40
        assert rival.latencies[1].latency_ms <= 60
    names = {(r.network.name, r.network.resolution_px) for r in both.networks}
    single = find_rivals(budgets[:1])
    assert names < {(r.network.name, r.network.resolution_px) for r in single.networks}


def test_a_calibration_applies_with_its_margin() -> None:
    vpu = load_device("vpu")
    calibration = Calibration(
        scale=2.0, offset_ms=1.0, margin=0.25, level=0.9, n=20, date="2026-01-01", source="test"
    )
    corrected = vpu.model_copy(update={"calibration": calibration})
    plain, found = price_public_networks(vpu)[0], price_public_networks(corrected)[0]
    assert found.latency_ms == pytest.approx(2 * plain.latency_ms + 1)
    # 50 ms with the margin are (50 / 1.25 - 1) / 2 of the model
    within = find_rivals([(corrected, 50.0)])
    assert {r.network for r in within.networks} == {r.network for r in find_rivals([(vpu, 19.5)]).networks}


def test_with_a_confidence_the_upper_ends_are_within_the_budget() -> None:
    vpu = load_device("vpu")
    budget = 20.0
    plain, sure = find_rivals([(vpu, budget)]), find_rivals([(vpu, budget)], confidence=0.95)
    ends = [found.interval for found in price_public_networks(vpu, 0.95)]
    assert {end.level for end in ends if end is not None} == {0.95}
    assert len(sure.networks) == sum(end is not None and end.high_ms <= budget for end in ends)
    assert 0 < len(sure.networks) < len(plain.networks)
    assert sure.facts()["budgets"][0] == plain.facts()["budgets"][0] | {"confidence": 0.95}
    fastest = min(end.high_ms for end in ends if end is not None)
    assert find_rivals([(vpu, fastest)], confidence=0.95).networks
    with pytest.raises(InfeasibleBudgetError, match=r"at the upper end of 0.95 intervals: the least"):
        find_rivals([(vpu, fastest * (1 - 1e-9))], confidence=0.95)
    with pytest.raises(UsageError, match=r"`confidence=0.99`"):
        find_rivals([(vpu, budget)], confidence=0.99)
    unsure = vpu.model_copy(update={"uncertainty": None})
    with pytest.raises(TableError, match="the errors of latencies on myriad-vpu are unknown"):
        find_rivals([(unsure, budget)], confidence=0.9)


def test_with_a_margin_a_confidence_keeps_the_upper_ends_alone() -> None:
    calibration = Calibration(
        scale=1.0, offset_ms=0.0, margin=0.5, level=0.9, n=20, date="2026-01-01", source="test"
    )
    vpu = load_device("vpu")
    corrected = vpu.model_copy(update={"calibration": calibration})
    assert find_rivals([(corrected, 20.0)], confidence=0.9).networks == (
        find_rivals([(vpu, 20.0)], confidence=0.9).networks
    )


def test_energies_are_those_of_the_kernels_and_limits_of_them_hold() -> None:
    device = macs_device().model_copy(update={"power_w": 2.0})
    priced = price_public_networks(device)
    assert all(found.energy_mj == pytest.approx(2.0 * found.latency_ms) for found in priced)
    most = float(np.median([found.energy_mj or 0.0 for found in priced]))
    rivals = find_rivals([(device, 1e6), (load_device("vpu"), 1e6)], max_mj=most)
    assert len(rivals.networks) == sum((found.energy_mj or 0.0) <= most for found in priced)
    assert all(r.latencies[1].energy_mj is None for r in rivals.networks)  # the VPU states none
    with pytest.raises(
        InfeasibleBudgetError, match=r"0.001000 mJ on counts: the least that any of them takes"
    ):
        find_rivals([(device, 1e6)], max_mj=1e-3)


def test_a_network_whose_energy_is_not_stated_is_not_within_a_limit_on_it() -> None:
    kinds = {"dwconv", "gelu", "gconv"}
    vpu = load_device("vpu")
    model = {
        kind: cost.model_copy(update={} if kind in kinds else {"power_w": 1.0})
        for kind, cost in vpu.model.items()
    }
    device = vpu.model_copy(update={"model": model, "fixed_mj": 0.0, "uncertainty": None})
    by_name = {r.network.name: r for r in find_rivals([(device, 1e6)]).networks}
    assert by_name["mobilenetv2_100"].latencies[0].energy_mj is None
    plain = by_name["vgg11"].latencies[0]
    assert plain.energy_mj == pytest.approx(plain.latency_ms - device.network_ms)
    within = find_rivals([(device, 1e6)], max_mj=1e9)
    assert {r.network.name for r in within.networks} < set(by_name)
    assert all(r.latencies[0].energy_mj is not None for r in within.networks)


def test_a_device_of_a_function_prices_them_too() -> None:
    device = macs_device()
    i = next(i for i, n in enumerate(public_networks().networks) if n.name == "vgg11")
    assert price_public_networks(device)[i].latency_ms > 1e-3 * len(public_networks().of_network[i]) / 3
    assert find_rivals([(device, 10.0)]).networks


def test_a_device_with_tables_only_is_refused() -> None:
    tables_only = load_device("vpu").model_copy(update={"model": {}})
    with pytest.raises(
        TableError, match=r"myriad-vpu has only tables of measured spaces.*give a device with"
    ):
        find_rivals([(tables_only, 30.0)])


def test_a_budget_that_none_meets_says_what_the_least_is() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        find_rivals([(load_device("vpu"), 1.0)], max_params=1e3)
    fastest = min(found.latency_ms for found in price_public_networks(load_device("vpu")))
    smallest = min(public_networks().networks, key=lambda n: n.params)
    assert "within 1.000 ms on myriad-vpu and 1.00K params" in str(caught.value)
    assert f"{fastest:.2f}"[:3] in str(caught.value)
    assert smallest.name in str(caught.value)


def test_operators_that_no_model_knows_are_counted() -> None:
    rivals = find_rivals([(load_device("vpu"), 1000.0)])
    by_name = {r.network.name: r for r in rivals.networks if r.network.resolution_px == 224}
    assert by_name["resnext50_32x4d"].stand_ins == {"gconv": 16}  # a grouped convolution in each block
    assert by_name["resnext50_32x4d"].latencies[0].coverage < 1
    assert by_name["resnet18"].stand_ins == by_name["resnet18"].uncovered == {}
    assert by_name["tf_efficientnet_lite0"].uncovered["pad"] == 5  # one before each stride


def test_csv_and_json_have_the_same_numbers() -> None:
    rivals = find_rivals([(load_device("vpu"), 20.0), (load_device("cpu"), 80.0)])
    rows = list(csv.DictReader(io.StringIO(rivals.csv(5))))
    facts = rivals.facts(5)
    assert facts["within"] == len(rivals.networks) > len(facts["networks"]) == 5
    assert len(rows) == 2 * 5
    for row, (network, on) in zip(
        rows, ((n, on) for n in facts["networks"] for on in n["latencies"]), strict=True
    ):
        assert row["name"] == network["name"]
        assert row["device"] == on["device"]
        assert float(row["latency_ms"]) == on["latency_ms"]
        assert float(row["imagenet_top1"]) == network["imagenet_top1"]
        assert row["on_front"] == str(network["on_front"])
