"""Every file that people write or download is read, or refused in one line, however it is damaged."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.measured_networks import write_networks
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, read_or_refuse
from helpers.mutated_files import faults, npz_mutants, yaml_mutants
from helpers.pickled_forests import dump_old, predictor_files, train_forest, write_zip
from hypothesis import given
from hypothesis import strategies as st

from qnas.common.resources import shipped
from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.evaluation import evaluate_networks, read_networks
from qnas.latency.fitting.measurements import Measured, read_measured, the_one, write_measured
from qnas.latency.nn_meter import predictors
from qnas.latency.nn_meter.pickles import read_forest
from qnas.latency.own_latency import device_from_blocks
from qnas.latency.table import read_table
from qnas.search.config import SearchConfig
from qnas.spaces.arch import sample_arch
from qnas.spaces.lower import all_blocks
from qnas.spaces.space import load_space
from qnas.training.recipe import Recipe

SMALL, FIXED = "quadranet-small", "quadranet25-xxs"


class Loader(NamedTuple):
    """How a kind of file is read, and its mutants: of a count, from a seed."""

    path: Path
    load: Callable[[Path], Any]
    mutants: Callable[[int, int], Iterator[bytes]]


def text_of(folder: str, name: str) -> str:
    return shipped(folder).joinpath(name).read_text(encoding="utf-8")


def of_texts(folder: str, *names: str, suffix: str) -> Callable[[int, int], Iterator[bytes]]:
    texts = [text_of(folder, f"{name}{suffix}") for name in names]
    return lambda count, seed: yaml_mutants(texts, count, seed=seed)


def space(tmp_path: Path) -> Loader:
    def load(path: Path) -> None:
        found = load_space(path)
        assert found.digest
        assert found.to_yaml()
        all_blocks(found)

    names = ("proxyless-mobile", "quadranet-small-mixed", FIXED)
    return Loader(tmp_path / "space.yaml", load, of_texts("search_spaces", *names, suffix=".yaml"))


def recipe(tmp_path: Path) -> Loader:
    names = ("imagenet", "digits", "photos")
    return Loader(tmp_path / "recipe.yaml", Recipe.load, of_texts("recipes", *names, suffix=".yaml"))


def preset(tmp_path: Path) -> Loader:
    names = ("small", "digits", "photos")
    return Loader(
        tmp_path / "preset.yaml", SearchConfig.load, of_texts("recipes/search", *names, suffix=".yaml")
    )


def device(tmp_path: Path) -> Loader:
    fixed = load_space(FIXED)

    def load(path: Path) -> None:
        found = load_device(path)
        assert found.to_json()
        load_table(found, fixed)

    names = ("a100", "cortex-a76", "myriad-vpu")
    return Loader(tmp_path / "device.json", load, of_texts("latency_tables", *names, suffix=".json"))


def table(tmp_path: Path) -> Loader:
    small, text = load_space(SMALL), text_of("latency_tables", f"cortex-a76/{SMALL}.csv")
    return Loader(
        tmp_path / "table.csv",
        lambda path: read_table(path, small),
        lambda count, seed: byte_mutants(text.encode(), count, seed=seed),
    )


def blocks(tmp_path: Path) -> Loader:
    small = load_space(SMALL)
    return Loader(
        tmp_path / "blocks.csv",
        lambda path: load_table(device_from_blocks("board", path, small), small),
        table(tmp_path).mutants,
    )


def measured(tmp_path: Path) -> Loader:
    small, rng, path = load_space(SMALL), np.random.default_rng(0), tmp_path / "measured.csv"
    rows = [
        Measured(f"n{i}", sample_arch(small, rng), 1.0 + i, 2.0 + i, "onnxruntime 1.20") for i in range(9)
    ]
    write_measured(path, rows)
    content = path.read_bytes()
    return Loader(
        path,
        lambda path: the_one("runtime", read_measured(path, small), path),
        lambda count, seed: byte_mutants(content, count, seed=seed),
    )


def networks(tmp_path: Path) -> Loader:
    path, cpu = tmp_path / "networks.npz", load_device("cpu")
    write_networks(path, "cpu", [1.0, 1.1, 0.9, float("nan")], ["a", "a", "b", "b"])
    content = path.read_bytes()
    return Loader(
        path,
        lambda path: evaluate_networks(cpu, read_networks(path)),
        lambda count, seed: npz_mutants(content, count, seed=seed),
    )


def archive(tmp_path: Path) -> Loader:
    path = write_zip(tmp_path / "vpu.zip", predictor_files("myriad-vpu", trees=1, rows=6))
    content = path.read_bytes()
    return Loader(
        path,
        lambda path: predictors.import_predictors(path, "vpu"),
        lambda count, seed: npz_mutants(content, count, seed=seed),
    )


def store(tmp_path: Path) -> Loader:
    path = predictors.import_predictors(archive(tmp_path).path, "vpu").path
    content, rows = path.read_bytes(), np.random.default_rng(0).integers(1, 225, (4, 7)).astype(float)

    def load(_: Path) -> None:
        about = predictors.describe_predictors("vpu")
        for forest in predictors.load_forests("vpu", about.forests).values():
            assert np.isfinite(forest.predict(rows[:, : forest.n_features])).all()

    return Loader(path, load, lambda count, seed: npz_mutants(content, count, seed=seed))


def forest(tmp_path: Path) -> Loader:
    trained, _ = train_forest(trees=2, rows=12)
    old, new = dump_old(trained), pickle.dumps(trained)

    def load(path: Path) -> None:
        with path.open("rb") as stream:
            found = read_forest(stream, str(path))
        assert np.isfinite(found.predict(np.ones((3, found.n_features)))).all()

    def mutants(count: int, seed: int) -> Iterator[bytes]:
        yield from byte_mutants(old, count // 2, seed=seed)
        yield from byte_mutants(new, count - count // 2, seed=seed)

    return Loader(tmp_path / "forest.pkl", load, mutants)


LOADERS: dict[str, Callable[[Path], Loader]] = {
    "space": space,
    "recipe": recipe,
    "preset": preset,
    "device": device,
    "table": table,
    "blocks": blocks,
    "measured": measured,
    "networks": networks,
    "archive": archive,
    "store": store,
    "forest": forest,
}


@pytest.fixture(scope="module", params=LOADERS)
def loader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QNAS_HOME", str(tmp_path_factory.mktemp("home")))
        yield LOADERS[request.param](tmp_path_factory.mktemp(request.param))


@bounded
@given(seed=st.integers(0, 2**32))
def test_a_mutant_is_read_or_refused_in_one_line(loader: Loader, seed: int) -> None:
    for content in loader.mutants(1, seed):
        read_or_refuse(loader.load, loader.path, content)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused_in_time_and_memory(loader: Loader) -> None:
    assert attack(loader.load, loader.path, loader.mutants(MUTANTS, 0)) == []


@pytest.mark.parametrize("name", LOADERS)
def test_inputs_that_once_ended_in_a_traceback_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = faults(name)
    if not found:
        pytest.skip("no shared inputs of this kind")
    monkeypatch.setenv("QNAS_HOME", str(tmp_path))
    loader = LOADERS[name](tmp_path)
    assert attack(loader.load, loader.path, [path.read_bytes() for path in found]) == []
