"""The forms of the edge devices, and the device files that were fitted with them."""

import dataclasses
import itertools
import math
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
from fitting.fit import HELD_OUT, SEED
from fitting.forms import FORMS
from fitting.layernorm import read_blocks
from helpers.places import LATENCY_DATA
from make_tables import DATE, ESTIMATED_WEIGHT, EdgeData, left_out_errors

from qnas.common.resources import shipped, stems
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.evaluation import Networks, evaluate_networks, read_networks
from qnas.latency.features import FEATURES
from qnas.latency.intervals import LEVELS, pooled
from qnas.latency.kernels import Kernel, fuse
from qnas.spaces.lower import Slot, fill, skeleton
from qnas.spaces.space import load_space

DATA = LATENCY_DATA / "edge_models.npz"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="the measurements are not here")

DEVICES = list(FORMS)
SPACES = list(stems("search_spaces", ".yaml"))
SEARCHABLE = [name for name in SPACES if not load_space(name).is_fixed]

# percent of networks within 10%: of a random fifth that the fit has not seen, and of a family
BARS = {"cortex-a76": 99, "myriad-vpu": 95, "adreno-640": 98, "adreno-630": 98}
FAMILY_BARS = {"cortex-a76": 95, "myriad-vpu": 90}
FAMILIES = {"proxylessnas", "mobilenetv1", "mobilenetv2", "mobilenetv3", "shufflenetv2", "resnet"}

# operators of other people's graphs, besides those of our spaces
OPERATORS = (
    *("conv", "conv1x1", "patch", "dwconv", "linear", "batchnorm", "relu", "add", "addrelu", "add_scalar"),
    *("mul", "mul_scalar", "scale", "maxpool", "avgpool", "gap", "concat", "split", "slice", "reshape"),
    *("transpose", "shuffle", "sigmoid", "hsigmoid", "hswish", "swish", "clip", "layernorm", "gelu", "sub"),
    "elementwise",
)


@lru_cache
def kernels_of(space_name: str) -> tuple[Kernel, ...]:
    """Return the distinct kernels of all candidates and fixed blocks of a space."""
    space = load_space(space_name)
    found: dict[Kernel, None] = {}
    for part in skeleton(space):
        blocks = (
            [fill(space, part, c) for c in part.position.candidates] if isinstance(part, Slot) else [part]
        )
        for block in blocks:
            found |= dict.fromkeys(fuse(block.layers))
    return tuple(found)


def grown(kernel: Kernel) -> list[Kernel]:
    """Return the kernel with more channels, a larger window and a larger map, one at a time."""
    larger = [dataclasses.replace(kernel, resolution_px=2 * kernel.resolution_px)]
    keeps = kernel.kind not in ("conv", "conv1x1", "patch", "linear")
    for times in (1.25, 1.5, 2, 4):
        c_in, c_out = (int(times * c) for c in (kernel.c_in, kernel.c_out))
        if keeps:
            larger.append(dataclasses.replace(kernel, c_in=c_in, c_out=c_in))
        else:
            larger.append(dataclasses.replace(kernel, c_in=c_in))
            larger.append(dataclasses.replace(kernel, c_out=c_out))
    if kernel.kernel > kernel.stride:
        larger += [dataclasses.replace(kernel, kernel=kernel.kernel + more) for more in (2, 4)]
    return larger


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("space", SPACES)
def test_every_kernel_of_every_space_costs_more_than_zero_and_more_if_it_grows(name: str, space: str) -> None:
    device = load_device(name)
    for kernel in kernels_of(space):
        ms = device.kernel_ms(kernel)
        assert ms > 0, kernel
        for larger in grown(kernel):
            assert device.kernel_ms(larger) >= ms * (1 - 1e-12), (kernel, larger)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("space_name", SEARCHABLE)
def test_latency_rises_with_the_kernel_size_and_the_expansion_of_a_candidate(
    name: str, space_name: str
) -> None:
    space = load_space(space_name)
    table = compute_table(load_device(name), space)
    for position, row in zip(space.positions, table.ms, strict=True):
        ms = dict(zip(position.candidates, row, strict=True))
        for a, b in itertools.permutations(ms, 2):
            if a.is_within(b):
                assert ms[a] < ms[b], (position.name, a, b)


@pytest.mark.parametrize("name", DEVICES)
def test_depthwise_kernels_differ_as_an_implementation_might(name: str) -> None:
    device = load_device(name)
    for px, channels in itertools.product((7, 14, 28, 56), (24, 96, 320)):
        k3, k5, k7 = (device.kernel_ms(Kernel("dwconv", px, channels, channels, k)) for k in (3, 5, 7))
        assert 1.02 < k5 / k3 < 4  # above 25 / 9 where 3x3 has a path of its own
        assert 1.01 < k7 / k5 < 49 / 25


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_every_operator_of_other_graphs_has_a_cost(name: str, kind: str) -> None:
    device = load_device(name)
    small, large = Kernel(kind, 1, 8, 8), Kernel(kind, 56, 96, 96)
    assert 0 < device.kernel_ms(small) < 0.6
    assert device.kernel_ms(small) <= device.kernel_ms(large)


@pytest.mark.parametrize("name", DEVICES)
def test_what_was_never_timed_says_how_it_was_estimated(name: str) -> None:
    model = load_device(name).model
    estimated = {kind for kind, m in model.items() if m.kind == "estimated"}
    assert {"layernorm", "gelu", "mul", "clip", "relu", "sigmoid", "swish", "elementwise"} <= estimated
    assert not {"conv", "conv1x1", "dwconv", "linear", "add", "hswish"} & estimated
    for kind in estimated:
        assert model[kind].note.startswith("not in the measured networks: "), kind


@pytest.mark.parametrize("name", DEVICES)
def test_layer_normalisation_is_dearer_than_reading_and_writing_its_map_twice(name: str) -> None:
    device = load_device(name)
    for px, channels in ((56, 24), (14, 96), (7, 320)):
        norm, relu = (
            device.kernel_ms(Kernel(kind, px, channels, channels)) for kind in ("layernorm", "relu")
        )
        assert 2 * relu < norm


@pytest.mark.parametrize("name", DEVICES)
def test_batch_normalisation_makes_the_blocks_of_a_space_cheaper(name: str) -> None:
    device = load_device(name)
    pre, folded = (compute_table(device, load_space(f"quadranet-mobile{end}")) for end in ("", "-bn"))
    assert folded.slowest_ms < pre.slowest_ms
    assert folded.fastest_ms < pre.fastest_ms


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_file_is_small(name: str) -> None:
    text = shipped("latency_tables").joinpath(f"{name}.json").read_text(encoding="utf-8")
    assert len(text.encode()) < 2**20


def test_a_table_takes_well_under_half_a_second_and_no_torch() -> None:
    # processor time, a tenth of which is needed: a busy machine must not fail the test
    code = (
        "import sys, time; from qnas.latency.device import load_device; "
        "from qnas.latency.device_table import compute_table; from qnas.spaces.space import load_space\n"
        "for name in ('cortex-a76', 'myriad-vpu', 'adreno-640', 'adreno-630'):\n"
        "    device, space, start = load_device(name), load_space('quadranet-mobile'), time.process_time()\n"
        "    compute_table(device, space)\n"
        "    assert time.process_time() - start < 0.5, name\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DEVICES)
def test_the_shipped_figures_reach_the_bars(name: str) -> None:
    accuracy = load_device(name).accuracy
    assert accuracy["unseen networks"]["all"].within_10_pct >= BARS[name]
    families = accuracy["unseen family"]
    assert set(families) >= FAMILIES - {"shufflenetv2"}
    if name in FAMILY_BARS:
        assert set(families) == FAMILIES
        for family, found in families.items():
            assert found.within_10_pct >= FAMILY_BARS[name], family


@pytest.mark.parametrize("name", DEVICES)
def test_terms_of_the_shipped_files_are_those_of_the_form(name: str) -> None:
    device = load_device(name)
    for kind in FORMS[name].kinds:
        terms = device.model[kind].terms
        assert terms is not None
        assert set(terms) <= {feature for k, feature in FORMS[name].columns if k == kind}
        assert set(terms) <= set(FEATURES)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return read_networks(DATA)


@needs_data
@pytest.mark.parametrize("name", DEVICES)
def test_the_shipped_files_have_the_figures_that_evaluation_gives(name: str, networks: Networks) -> None:
    known = np.isfinite(networks.latency_ms[name])
    held_out = np.zeros_like(known)
    held_out[known] = np.random.default_rng(SEED).random(int(known.sum())) < HELD_OUT
    device = load_device(name)
    found = evaluate_networks(device, networks.only(held_out))
    assert found == device.accuracy["unseen networks"]
    assert found["all"].within_10_pct >= BARS[name]


def test_a_hard_swish_and_its_scale_cost_what_the_compiler_leaves_of_them() -> None:
    device = load_device("vpu")
    one = device.model["add"].terms
    swish = device.model["hswish"].terms
    assert one is not None
    assert swish is not None
    assert swish["kelements_in"] / one["kelements_in"] == pytest.approx(3.5 / 1.5, rel=1e-4)
    # maps of as many elements in 1,024 and in 8,192 lines differ by the copies of lines, at 30 ns or more
    wide, narrow = (device.kernel_ms(Kernel("scale", px, c, c)) for px, c in ((64, 16), (8, 1024)))
    assert narrow - wide >= 0.03 * (8192 - 1024) / 1e3


@pytest.mark.parametrize("name", DEVICES)
def test_a_kernel_larger_than_any_measured_is_an_estimate(name: str) -> None:
    device = load_device(name)
    for kind in FORMS[name].kinds & {"conv1x1", "dwconv", "add", "hswish"}:
        sizes = device.model[kind].measured_up_to
        assert sizes is not None
        largest = Kernel(kind, **sizes)
        assert device.kernel_source(largest) == "fitted"
        for size in sizes:
            beyond = Kernel(kind, **{**sizes, size: sizes[size] + 1})
            assert device.kernel_source(beyond) == "estimated", (kind, size)


@pytest.mark.parametrize("name", DEVICES)
def test_a_shipped_prediction_has_an_interval_that_its_estimates_widen(name: str) -> None:
    device = load_device(name)
    widths = []
    for end in ("-bn", ""):  # layer normalisation is an estimate
        space = load_space(f"quadranet-mobile{end}")
        table, fastest = compute_table(device, space), (0,) * len(space.positions)
        interval = table.interval(fastest)
        assert interval is not None
        assert interval.level == 0.9
        assert interval.low_ms < table.latency_ms(fastest) < interval.high_ms
        widths.append((interval.high_ms - interval.low_ms) / table.latency_ms(fastest))
    assert widths[0] < widths[1]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_intervals_cover_a_family_that_neither_fit_nor_errors_saw(name: str, networks: Networks) -> None:
    blocks = read_blocks(LATENCY_DATA / "pixel4_blocks.json.gz")
    errors, _ = left_out_errors(name, networks, EdgeData(*networks.fused("edge")), blocks, DATE)
    shipped = load_device(name).uncertainty
    assert shipped is not None
    assert pooled(errors, weight=ESTIMATED_WEIGHT, source="").errors == shipped.errors
    for level in LEVELS:
        covered = {}
        for family in errors:
            others = {other: of for other, of in errors.items() if other != family}
            ends = pooled(others, weight=ESTIMATED_WEIGHT, source="").at(level)
            covered[family] = float(np.mean((errors[family] >= ends.low) & (errors[family] <= ends.high)))
        mean = float(np.mean(list(covered.values())))
        print(f"{name}: {level:.0%} intervals cover {mean:.1%} of a new family:", covered)
        # families are the independent draws: two standard errors of a share over them
        assert mean >= level - 2 * math.sqrt(level * (1 - level) / len(covered))
