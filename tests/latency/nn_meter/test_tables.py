import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pickled_forests import predictor_files, train_forest, write_zip
from sklearn.ensemble import RandomForestRegressor

from qnas.common.errors import TableError
from qnas.common.resources import stems
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import load_table
from qnas.latency.kernels import Kernel, fuse
from qnas.latency.nn_meter import tables as nn_meter
from qnas.latency.nn_meter.forests import Forest
from qnas.latency.nn_meter.predictors import FEATURE_COUNTS, PUBLISHED, import_predictors
from qnas.latency.nn_meter.tables import (
    FORESTS_OF_KIND,
    cover,
    describe_mapping,
    estimate,
    in_range,
    predict_rows,
)
from qnas.latency.table import read_table, write_table
from qnas.solver.limits import latency_limit
from qnas.solver.solve import solve
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import BlockSpec, fill, skeleton
from qnas.spaces.space import SearchSpace, load_space

SIMPLE = ("cortex-a76", "myriad-vpu")


def sklearn_forests(device: str) -> dict[str, RandomForestRegressor]:
    """Return the forests that `imported` imports."""
    return {
        kernel: train_forest(FEATURE_COUNTS[kernel], seed=i)[0]
        for i, kernel in enumerate(PUBLISHED[device].kernels)
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    os.environ["QNAS_HOME"] = str(home)
    try:
        for device in PUBLISHED:
            import_predictors(write_zip(home / "a.zip", predictor_files(device)), device)
    finally:
        del os.environ["QNAS_HOME"]
    return home


@pytest.fixture
def imported(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNAS_HOME", str(store))


def a76() -> Device:
    return load_device("cortex-a76")


def as_device(name: str) -> Device:
    """Return the A76's kernel models under the name of another device."""
    return a76().model_copy(update={"name": name})


def vectors(px: int, c_in: int, c_out: int, kernel: int, stride: int) -> dict[str, list[float]]:
    """Return each predictor's features, in the order in which nn-Meter takes them."""
    conv = c_out * (kernel**2 * c_in + 1)
    dwconv = c_in * (kernel**2 + 1)
    fc = (2 * c_in + 1) * c_out
    out = 2 * (px / stride) ** 2
    return {
        "conv-bn-relu": [px, c_in, c_out, kernel, stride, out * conv / 2e6, conv / 1e6],
        "dwconv-bn-relu": [px, c_in, c_out, kernel, stride, out * dwconv / 2e6, dwconv / 1e6],
        "fc": [c_in, c_out, fc / 2e6, fc / 1e6],
        **{name: [px, c_in, c_out, kernel, stride] for name in ("maxpool", "avgpool")},
        "global-avgpool": [1, c_in],
        **{name: [px, c_in, c_in] for name in ("add", "addrelu")},
        **{name: [px, c_in] for name in ("bn", "relu", "hswish", "split", "channelshuffle")},
    }


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("device", PUBLISHED)
@pytest.mark.parametrize("kind", FORESTS_OF_KIND)
def test_a_kernel_takes_what_its_forest_says_of_its_features(kind: str, device: str) -> None:
    forests = sklearn_forests(device)
    shape = (56, 24, 24 if kind == "dwconv" else 40, 3, 2)
    kernel = Kernel(kind, *shape)
    found = estimate(as_device(device), [kernel])[kernel]
    choice = next((c for c in FORESTS_OF_KIND[kind] if c.predictor in forests), None)
    if choice is None:
        assert found.mapped == "uncovered"
        assert found.latency_ms == a76().kernel_ms(kernel) > 0
    else:
        said = forests[choice.predictor].predict([vectors(*shape)[choice.predictor]])[0]
        assert found.latency_ms == pytest.approx(said, rel=1e-6)
        assert (found.predictor, found.mapped) == choice


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("stride", [1, 2])
def test_nn_meters_code_makes_the_features_of_the_reference(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    predict = Forest.predict

    def recording(forest: Forest, rows: list[list[float]]) -> object:
        asked.append(rows)
        return predict(forest, rows)

    monkeypatch.setattr(Forest, "predict", recording)
    for kind, choices in FORESTS_OF_KIND.items():
        shape = (56, 24, 24 if kind == "dwconv" else 40, 3, stride)
        estimate(a76(), [Kernel(kind, *shape)])
        assert asked.pop() == [pytest.approx(vectors(*shape)[choices[0].predictor])]
        assert not asked


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("device", "add", "uncovered"),
    [
        ("cortex-a76", "add", set()),
        ("myriad-vpu", "addrelu", {"gap"}),
        ("adreno-640", "", {"add", "mul", "gap", "linear"}),
        ("adreno-630", "", {"add", "mul", "gap", "linear"}),
    ],
)
def test_a_quadra_block_maps_as_the_reference_says(device: str, add: str, uncovered: set[str]) -> None:
    space = load_space("quadranet25-t")
    parts = skeleton(space)
    blocks = [p if isinstance(p, BlockSpec) else fill(space, p, p.position.candidates[0]) for p in parts]
    rows = predict_rows(as_device(device), blocks)
    inside = [row for row in rows if row.name == "1.1"]
    assert [row.kernel.kind for row in inside] == [
        *("layernorm", "dwconv", "dwconv", "mul", "dwconv", "add", "add"),
        *("layernorm", "conv1x1", "gelu", "conv1x1", "add"),
    ]
    expected = {
        "layernorm": ("bn", "stand-in"),
        "dwconv": ("dwconv-bn-relu", "direct"),
        "conv1x1": ("conv-bn-relu", "direct"),
        "gelu": ("hswish", "stand-in"),
        "add": (add, "direct"),
        "mul": (add, "stand-in"),
        **dict.fromkeys(uncovered, ("", "uncovered")),
    }
    assert all((row.predictor, row.mapped) == expected[row.kernel.kind] for row in inside)
    assert {row.kernel.kind for row in rows if row.mapped == "uncovered"} == uncovered
    assert all((row.kind == "fitted") == (row.mapped == "direct") for row in rows)
    text = describe_mapping(rows)
    assert "layernorm by bn" in text
    assert ("uncovered: " in text) == bool(uncovered)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("device", PUBLISHED)
@pytest.mark.parametrize("name", stems("search_spaces", ".yaml"))
def test_every_block_of_every_space_costs_more_than_zero(name: str, device: str) -> None:
    found = nn_meter.compute_table(as_device(device), load_space(name))
    cells = [cell for row in found.cells for cell in row] + [cell for _, cell in found.fixed[1:]]
    assert all(cell.latency_ms > 0 or cell.source == "no operator" for cell in cells)
    assert found.fixed_ms == math.fsum(cell.latency_ms for _, cell in found.fixed[1:])


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("device", SIMPLE)
def test_a_table_is_the_sum_of_the_rows(device: str, tiny_space: SearchSpace, tmp_path: Path) -> None:
    found = nn_meter.compute_table(load_device(device), tiny_space)
    for k in range(2):
        blocks = [
            part if isinstance(part, BlockSpec) else fill(tiny_space, part, part.position.candidates[k])
            for part in skeleton(tiny_space)
        ]
        rows = predict_rows(load_device(device), blocks)
        indices = [k] * len(found.cells)
        assert found.latency_ms(indices) == pytest.approx(math.fsum(r.latency_ms for r in rows), abs=1e-4)
        assert found.coverage(indices) == pytest.approx(cover(rows).shares["direct"], abs=1e-5)
    write_table(found, tiny_space, tmp_path / device / "tiny.csv")
    read = read_table(tmp_path / device / "tiny.csv", tiny_space)
    assert read == found
    assert read.digest == found.digest


@pytest.mark.usefixtures("imported")
def test_shares_add_up_and_name_what_is_out_of_range(tiny_space: SearchSpace) -> None:
    blocks = [part for part in skeleton(tiny_space) if isinstance(part, BlockSpec)]
    rows = predict_rows(load_device("cpu"), blocks)
    found = cover(rows)
    assert math.fsum(found.shares.values()) == pytest.approx(1.0)
    assert found.kernels == len(rows)
    # 2x2 patches of 32 and 16 px are outside, so are maps of 16 and 8 px; fc and the global pool are not
    outside = [row for row in rows if not row.in_range]
    assert {row.kernel.kind for row in outside} == {"patch", "layernorm"}
    assert found.outside == len(outside) > 0
    share = math.fsum(row.latency_ms for row in outside) / math.fsum(row.latency_ms for row in rows)
    assert found.outside_share == pytest.approx(share)
    assert f"{len(outside)} of {len(rows)} kernels of sizes" in describe_mapping(rows)


@pytest.mark.parametrize(
    ("predictor", "px", "kernel", "stride", "known"),
    [  # the sizes that its predictors were trained for
        ("conv-bn-relu", 224, 3, 2, True),
        ("conv-bn-relu", 13, 7, 4, True),
        ("conv-bn-relu", 256, 3, 2, False),
        ("conv-bn-relu", 16, 3, 1, False),
        ("conv-bn-relu", 56, 2, 2, False),
        ("conv-bn-relu", 56, 9, 1, False),
        ("conv-bn-relu", 56, 3, 3, False),
        ("dwconv-bn-relu", 56, 7, 1, True),
        ("dwconv-bn-relu", 13, 7, 1, False),
        ("dwconv-bn-relu", 56, 21, 1, False),
        ("bn", 1, 1, 1, True),
        ("bn", 15, 1, 1, False),
        ("fc", 1, 1, 1, True),
    ],
)
def test_sizes_that_a_forest_was_not_trained_on_are_told(
    predictor: str, px: int, kernel: int, stride: int, known: bool
) -> None:
    assert in_range(Kernel("conv", px, 8, 8, kernel, stride), predictor) is known


@pytest.mark.usefixtures("imported")
def test_a_batch_is_uncovered_for_all_was_measured_one_by_one() -> None:
    kernel = Kernel("conv", 56, 24, 40, 3, 1, batch=2)
    assert estimate(a76(), [kernel])[kernel].mapped == "uncovered"


@pytest.mark.usefixtures("imported")
def test_a_kernel_that_nothing_knows_is_refused() -> None:
    with pytest.raises(TableError, match="no cost for 'softmax' kernels"):
        estimate(a76(), [Kernel("softmax", 1, 10, 10)])


def test_a_forest_that_says_zero_leaves_the_kernel_uncovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))
    zero = RandomForestRegressor(2).fit([[1, 2], [3, 4]], [0, 0])
    files = {**predictor_files("cortex-a76"), "hswish.pkl": pickle.dumps(zero)}
    import_predictors(write_zip(tmp_path / "a.zip", files), "cpu")
    kernel = Kernel("gelu", 56, 24, 24)
    found = estimate(a76(), [kernel])[kernel]
    assert found.mapped == "uncovered"
    assert found.latency_ms == a76().kernel_ms(kernel) > 0


@pytest.mark.usefixtures("imported")
def test_nn_meters_own_code_is_asked_once_for_a_whole_space(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = nn_meter._nn_predict()

    def counting(predictors: object, kernels: list[object]) -> float:
        asked.append(len(kernels))
        return real(predictors, kernels)  # type: ignore[arg-type]

    monkeypatch.setattr(nn_meter, "_nn_predict", lambda: counting)
    space = load_space("quadranet-mobile")
    nn_meter.compute_table(a76(), space)
    distinct = {
        kernel
        for part in skeleton(space)
        for block in (
            [part]
            if isinstance(part, BlockSpec)
            else [fill(space, part, candidate) for candidate in part.position.candidates]
        )
        for kernel in fuse(block.layers)
    }
    assert asked == [len(distinct)]


@pytest.mark.usefixtures("imported")
def test_the_solver_takes_the_table(tiny_space: SearchSpace) -> None:
    found = nn_meter.compute_table(a76(), tiny_space)
    budget = (found.fastest_ms + found.slowest_ms) / 2
    scores = tuple((math.log(1 / len(row)),) * len(row) for row in found.cells)
    solution = solve(scores, (latency_limit(found, budget),))
    assert found.latency_ms(solution.indices) <= budget


def test_without_predictors_the_message_says_all_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_space: SearchSpace
) -> None:
    monkeypatch.setenv("QNAS_HOME", str(tmp_path))
    own = load_table(load_device("vpu"), tiny_space)
    with pytest.raises(TableError) as caught:
        nn_meter.compute_table(load_device("vpu"), tiny_space)
    message = str(caught.value)
    assert "no nn-Meter predictors for myriad-vpu" in message
    assert "download myriadvpu_openvino2019r2.zip from https://" in message
    assert "qnas predictors import myriadvpu_openvino2019r2.zip --device myriad-vpu" in message
    assert f"{own.fastest_ms:.4g} to {own.slowest_ms:.4g} ms" in message
    layers = (LayerSpec("a", "dwconv", 28, 40, 40, 5),)
    device = load_device("vpu")
    with pytest.raises(TableError) as caught:
        predict_rows(device, [BlockSpec("1.1", "quadra", layers)])
    default = device.network_ms + device.kernel_ms(fuse(layers)[0])
    assert f"own model says {default:.4g} ms" in str(caught.value)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("nn_meter", 'nn-Meter is not installed: pip install "nn-meter>=2.0,<3"'),
        ("pkg_resources", 'nn-Meter needs pkg_resources, .*: pip install "setuptools>=77'),
        ("nn_meter.predictor", r'nn-Meter cannot be imported .*: pip install "nn-meter.*setuptools>=77'),
    ],
)
def test_a_broken_installation_names_what_to_install(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nn_meter"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TableError, match=message):
        estimate(a76(), [Kernel("relu", 56, 24, 24)])
    assert os.environ.get("HOME") == os.path.expanduser("~")


def test_a_device_that_nn_meter_does_not_know_is_refused(tiny_space: SearchSpace) -> None:
    with pytest.raises(TableError, match="nn-Meter has no predictors for 'a100'"):
        nn_meter.compute_table(load_device("a100"), tiny_space)


@pytest.mark.parametrize("writable", [True, False])
def test_nothing_is_written_into_the_home_folder(writable: bool, store: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    if writable:
        home.mkdir()
    else:
        home.write_text("a file, in which no folder can be made", encoding="utf-8")
    code = (
        "import os, sys\n"
        "from qnas.latency.device import load_device\n"
        "from qnas.latency.nn_meter.tables import compute_table\n"
        "from qnas.spaces.space import load_space\n"
        "assert 'nn_meter' not in sys.modules\n"
        "assert compute_table(load_device('cpu'), load_space('quadranet-small')).fastest_ms > 0\n"
        "assert 'nn_meter' in sys.modules and 'torch' not in sys.modules\n"
        "assert os.environ['HOME'].endswith('home')\n"
    )
    environ = {**os.environ, "QNAS_HOME": str(store), "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert not done.stderr
    assert not writable or not list(home.iterdir())
