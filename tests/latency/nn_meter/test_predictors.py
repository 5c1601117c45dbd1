import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mutants import check_refusal
from helpers.pickled_forests import predictor_files, train_forest, write_zip

from qnas.common import arrays as arrays_module
from qnas.common.errors import TableError
from qnas.latency.nn_meter import predictors
from qnas.latency.nn_meter.predictors import (
    FEATURE_COUNTS,
    PUBLISHED,
    import_predictors,
    is_imported,
    list_predictors,
    load_forests,
    remove_predictors,
    store_folder,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    return tmp_path / "home"


def published(tmp_path: Path, device: str = "myriad-vpu", /, **changes: Any) -> Path:
    """Return the archive of a device as it is published, with these files changed or left out."""
    files = {**predictor_files(device), **{f"{name}.pkl": content for name, content in changes.items()}}
    kept = {name: content for name, content in files.items() if content is not None}
    title = PUBLISHED[device].title
    return write_zip(tmp_path / f"{title}.zip", kept, title)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("device", PUBLISHED)
def test_imported_forests_predict_what_scikit_learn_predicts(device: str, tmp_path: Path) -> None:
    found = import_predictors(published(tmp_path, device), device)
    assert found.device == device
    assert set(found.forests) == set(PUBLISHED[device].kernels)
    forests = load_forests(device, PUBLISHED[device].kernels)
    for i, kernel in enumerate(PUBLISHED[device].kernels):
        forest, x = train_forest(FEATURE_COUNTS[kernel], seed=i)
        np.testing.assert_allclose(forests[kernel].predict(x), forest.predict(x), rtol=1e-12)
        assert found.forests[kernel].trees == 5
        assert found.forests[kernel].nodes == sum(tree.tree_.node_count for tree in forest.estimators_)


def test_nn_meters_own_list_names_the_same_kernels_and_files() -> None:
    import importlib.util

    import yaml

    package = importlib.util.find_spec("nn_meter")
    assert package is not None
    assert package.origin is not None
    own = yaml.safe_load((Path(package.origin).parent / "configs" / "predictors.yaml").read_text())
    for entry in own:
        ours = next(p for p in PUBLISHED.values() if p.title == entry["name"])
        assert set(entry["kernel_predictors"]) == set(ours.kernels)
        assert entry["download"].endswith(f"/v1.0-data/{ours.title}.zip")
    assert len(own) == len(PUBLISHED)


def test_a_folder_is_read_as_an_archive_is(tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    for place in (folder, folder / "top"):
        place.mkdir()
        for name, content in predictor_files("myriad-vpu").items():
            (place / name).write_bytes(content)
        import_predictors(place, "vpu")
        assert is_imported("myriad-vpu")


def test_an_import_replaces_the_former(tmp_path: Path) -> None:
    import_predictors(published(tmp_path), "vpu")
    forest, x = train_forest(2, seed=99)
    again = published(tmp_path, relu=pickle.dumps(forest))
    import_predictors(again, "vpu")
    np.testing.assert_allclose(load_forests("vpu", ["relu"])["relu"].predict(x), forest.predict(x))


def test_more_forests_than_needed_are_imported_and_unknown_ones_named(
    tmp_path: Path,
) -> None:
    files = {**predictor_files("myriad-vpu"), "add.pkl": pickle.dumps(train_forest(3)[0]), "mul.pkl": b"evil"}
    found = import_predictors(write_zip(tmp_path / "a.zip", files), "vpu")
    assert "add" in found.forests
    assert found.ignored == ("fusion_rules.json", "mul.pkl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc": None}, r"not the predictors of myriad-vpu .*: no fc\.pkl"),
        ({"fc": None, "bn": None}, r"no fc\.pkl, bn\.pkl"),
        ({"relu": pickle.dumps(train_forest(3)[0])}, r"relu\.pkl: a forest with 3 features, expected 2"),
        ({"bn": b"cos\nsystem\n(S'true'\ntR."}, r"bn\.pkl: .*os\.system"),
        ({"bn": b""}, r"bn\.pkl: .*too soon"),
        ({"bn": pickle.dumps(train_forest(2)[0])[:-100]}, r"bn\.pkl: .*too soon"),
        ({"channelshuffle": pickle.dumps([1, 2])}, r"channelshuffle\.pkl: .*no RandomForestRegressor"),
    ],
)
def test_an_import_that_fails_changes_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, home: Path
) -> None:
    import_predictors(published(tmp_path), "vpu")
    before = everything(home)
    assert before
    with pytest.raises(TableError, match=message):
        import_predictors(published(tmp_path, **changes), "vpu")
    assert everything(home) == before
    remove_predictors("vpu")
    with pytest.raises(TableError, match=message):
        import_predictors(published(tmp_path, **changes), "vpu")
    assert not everything(home)


def test_an_interrupted_import_changes_nothing(tmp_path: Path, home: Path) -> None:
    import_predictors(published(tmp_path), "vpu")
    before = everything(home)

    def interrupt(kernel: str, done: int, total: int) -> None:
        if kernel == "relu":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_predictors(published(tmp_path), "vpu", interrupt)
    assert everything(home) == before


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TableError, match=r"bn\.pkl: .*opcode"):
        import_predictors(published(tmp_path, bn=bytes(50 << 20)), "vpu")
    block = b"\x8e" + (200 << 20).to_bytes(8, "little")
    with pytest.raises(TableError, match=r"bn\.pkl: .*too soon"):
        import_predictors(published(tmp_path, bn=block), "vpu")
    monkeypatch.setattr(predictors, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(TableError, match=r"conv-bn-relu\.pkl has \d+ bytes, expected at most 1000"):
        import_predictors(published(tmp_path), "vpu")


def test_the_archive_of_another_device_is_refused(tmp_path: Path) -> None:
    # the same kernels in both: only the names tell them apart
    with pytest.raises(TableError, match=r"of adreno-640, not of adreno-630 .*`device='adreno-640'`"):
        import_predictors(published(tmp_path, "adreno-640"), "adreno-630")
    with pytest.raises(TableError, match="not of cortex-a76"):
        import_predictors(published(tmp_path), "cpu")


def test_progress_ends_at_the_size_of_all_pickles(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    source = published(tmp_path)
    import_predictors(source, "vpu", lambda *report: seen.append(report))
    with zipfile.ZipFile(source) as archive:
        total = sum(info.file_size for info in archive.infolist() if info.filename.endswith(".pkl"))
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {kernel for kernel, _, _ in seen} == set(PUBLISHED["myriad-vpu"].kernels)


def test_what_was_imported_is_listed_and_removed(tmp_path: Path, home: Path) -> None:
    assert list_predictors() == ()
    for device in ("adreno-640", "myriad-vpu"):
        import_predictors(published(tmp_path, device), device)
    assert {found.device for found in list_predictors()} == {"adreno-640", "myriad-vpu"}
    found = next(found for found in list_predictors() if found.device == "myriad-vpu")
    assert found.title == "myriadvpu_openvino2019r2"
    assert found.source == "myriadvpu_openvino2019r2.zip"
    assert found.size_bytes == found.path.stat().st_size
    assert remove_predictors("vpu") == found.path
    assert {found.device for found in list_predictors()} == {"adreno-640"}
    with pytest.raises(TableError, match="no predictors for myriad-vpu"):
        remove_predictors("vpu")
    assert os.listdir(home / "predictors") == ["adreno-640.npz"]


def test_a_damaged_store_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = import_predictors(published(tmp_path), "vpu").path
    whole = path.read_bytes()
    about = np.array(json.dumps({"schema": "qnas.predictors/9"}))
    for content in (b"", b"junk", whole[:-200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(TableError, match=r"damaged .*import the predictors again"):
            load_forests("vpu", ["relu"])
        with pytest.raises(TableError, match=r"damaged .*import the predictors again"):
            list_predictors()
    np.savez(path, about=about)
    with pytest.raises(TableError, match=r"damaged .*qnas\.predictors/9"):
        list_predictors()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cortex-a76"}, "the predictors of cortex-a76"),
        ({"device": "\x1b[2J" + 5000 * "x"}, "the predictors of"),
        ({"forests": {"x" * 5000: {"trees": 1, "nodes": 1}}}, "unknown forests xxx"),
        ({"forests": {"relu": {"trees": 1}}}, "no trees or nodes of relu"),
        ({"forests": {"relu": {"trees": "1", "nodes": 1}}}, "expected a whole number"),
        ({"forests": {"relu": {"trees": 0, "nodes": 1}}}, "expected at least 1"),
        ({"forests": 3}, "forests: expected a mapping"),
        ({"ignored": 3}, "ignored: expected a list"),
        ({"ignored": [3]}, "expected text, got 3"),
        ({"date": None}, "date: expected text"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_what_a_store_says_of_itself_is_checked(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = import_predictors(published(tmp_path), "vpu").path
    with np.load(path) as content:
        arrays = dict(content)
    about = {**json.loads(str(arrays["about"])), **changes}
    np.savez(path, **{**arrays, "about": np.array(json.dumps(about))})
    with pytest.raises(TableError) as error:
        list_predictors()
    assert f"{path}: damaged (" in str(error.value)
    assert message in str(error.value)
    assert "qnas predictors remove --device myriad-vpu" in str(error.value)
    check_refusal(error.value, path)


def test_a_forest_of_other_features_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    path = import_predictors(published(tmp_path), "vpu").path
    with np.load(path) as content:
        arrays = dict(content)
    np.savez(path, **{**arrays, "relu.n_features": np.array(3)})
    with pytest.raises(TableError, match=r"damaged .relu: 3 features, expected 2"):
        load_forests("vpu", ["relu"])


def test_a_store_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = import_predictors(published(tmp_path), "vpu").path

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(arrays_module, "open_regular", refuse)
    with pytest.raises(TableError, match=r"npz: cannot be read: Permission denied$"):
        list_predictors()


def test_a_store_cannot_run_anything(tmp_path: Path) -> None:
    path = import_predictors(published(tmp_path), "vpu").path

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'called'}",)

    np.savez(path, about=np.array([Evil()], dtype=object))
    with pytest.raises(TableError, match="damaged"):
        list_predictors()
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TableError, match="damaged"):
        list_predictors()
    assert not (tmp_path / "called").exists()


def test_missing_predictors_name_the_download_and_the_command() -> None:
    for device, published in PUBLISHED.items():
        with pytest.raises(TableError) as caught:
            load_forests(device, ["relu"])
        assert f"{published.title}.zip" in str(caught.value)
        assert "/releases/tag/v1.0-data" in str(caught.value)
        assert f"qnas predictors import {published.title}.zip --device {device}" in str(caught.value)


def test_an_unknown_device_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        TableError, match="no predictors for 'a100': known: adreno-630, adreno-640, cortex-a76"
    ):
        import_predictors(tmp_path, "a100")
    assert not is_imported("a100")


def test_the_store_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store_folder() == tmp_path / "home" / "predictors"
    monkeypatch.delenv("QNAS_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert store_folder() == tmp_path / "data" / "qnas" / "predictors"
    for passed_over in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", passed_over)
        assert store_folder() == tmp_path / "nobody" / ".local" / "share" / "qnas" / "predictors"
