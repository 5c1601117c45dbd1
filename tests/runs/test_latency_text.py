"""What is printed of a network's latency says on what it rests."""

import re

import pytest

from qnas.latency.device import load_device
from qnas.latency.device_table import load_table, predict_blocks
from qnas.latency.prediction import DEVICE, predict_arch
from qnas.runs.latency_text import describe_predictions, measured_lines
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import load_space


@pytest.mark.parametrize(
    ("name", "device"),
    [("quadranet-mobile", "vpu"), ("quadranet-mobile", "rtx4090"), ("proxyless-mobile", "vpu")],
)
def test_a_latency_of_which_a_fifth_was_never_measured_comes_with_a_warning(name: str, device: str) -> None:
    space, known = load_space(name), load_device(device)
    arch = arch_from_indices(space, (0,) * len(space.positions))
    table = load_table(known, space)
    limits = (latency_limit(table, 1000.0),)
    printed = " ".join("\n".join(measured_lines(limits, space, arch, DEVICE, [device])).split())
    predicted = " ".join(describe_predictions([predict_arch(DEVICE, known, space, arch)], 3).split())
    rows = predict_blocks(known, lower(space, arch))
    total_ms = known.network_ms + sum(row.latency_ms for row in rows)
    unknown = {row.kernel.kind for row in rows if row.kind == "estimated"}
    shares = {
        kind: sum(row.latency_ms for row in rows if row.kernel.kind == kind) / total_ms for kind in unknown
    }
    measured = 1 - sum(shares.values())
    for text in (printed, predicted):
        assert ("warning" in text) == (measured < 0.8)
        if measured < 0.8:
            begin = f"{measured:.0%} of the latency on {known.name} rests on measured kernels, less than 80%"
            assert f"warning {begin}; estimates: " in text
            named = re.findall(r"(\w+) \((\d+%)\)", text.partition("estimates: ")[2])
            assert dict(named) == {kind: f"{share:.0%}" for kind, share in shares.items()}


def test_the_mobile_space_is_mostly_an_estimate_on_the_vpu_and_the_union_is_not() -> None:
    vpu = load_device("vpu")
    shares = {}
    for name in ("quadranet-mobile", "quadranet-mobile-bn", "union-mobile"):
        space = load_space(name)
        indices = (0,) * len(space.positions)  # for the union, inverted residuals
        shares[name] = load_table(vpu, space).coverage(indices)
    assert shares["quadranet-mobile"] < shares["quadranet-mobile-bn"] < 0.8 < shares["union-mobile"]
