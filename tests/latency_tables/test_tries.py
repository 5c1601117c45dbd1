"""What was tried and did not ship: the forms and networks of show_tries.py."""

import numpy as np
import pytest
import show_tries
from fitting.a100_latency import SUMS
from fitting.forms import MYRIAD_VPU
from helpers.places import LATENCY_DATA

from qnas.latency.device import load_device
from qnas.latency.kernels import fuse_operators
from qnas.spaces.space import load_space

needs_data = pytest.mark.skipif(not LATENCY_DATA.is_dir(), reason="the measurements are not here")


def test_a_form_with_another_hard_swish_differs_in_nothing_else() -> None:
    form = show_tries.with_hard_swish(2.5)
    assert form.own == MYRIAD_VPU.own
    before, after = MYRIAD_VPU.shared, form.shared
    changed = {
        (name, *column)
        for name, columns in after.items()
        for column in columns
        if columns[column] != before[name][column]
    }
    assert changed == {("pass.launch", "hswish", "launch"), ("pass.kelements", "hswish", "kelements_in")}
    assert show_tries.with_hard_swish(3.5).shared == MYRIAD_VPU.shared  # what ships


def test_networks_of_gates_have_one_in_each_block_and_no_hard_swish() -> None:
    device = load_device("vpu")
    for seed in range(5):
        kernels = fuse_operators(show_tries.gated_network(seed), "edge")
        kinds = [kernel.kind for kernel in kernels]
        assert kinds.count("dwconv") == kinds.count("scale") == kinds.count("hsigmoid") == 15
        assert "hswish" not in kinds
        assert all(device.prices(kernel) for kernel in kernels)


def test_the_papers_network_has_all_blocks_of_the_space() -> None:
    space = load_space("quadranet-gpu")
    kernels = show_tries.paper_network()
    assert sum(kernel.kind == "dwconv" for kernel in kernels) == 3 * len(space.positions)
    macs = sum(
        k.rows * k.kernel**2 * (1 if k.kind == "dwconv" else k.c_in) * k.c_out
        for k in kernels
        if k.kind in (*SUMS, "linear")
    )
    assert macs == pytest.approx(948e6, rel=0.1)


@needs_data
@pytest.mark.slow
def test_the_tries_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_tries.show_batch_1(LATENCY_DATA)
    lines = capsys.readouterr().out.splitlines()
    (shipped,) = (line for line in lines if "(a100)" in line)
    others = [line for line in lines if "within 20%" in line and line != shipped]
    share = [int(line.split("within 20%:")[1].split(" of ")[0]) for line in (shipped, *others)]
    assert len(share) == 4
    assert share[0] == np.max(share)
    assert share[0] > 3 * np.sort(share)[-2]
