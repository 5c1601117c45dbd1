"""Trainings and searches on classes of different sizes and on few images, through `import qnas`."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.imbalanced import imbalanced, overlapping
from helpers.tiny import TINY_SPACE
from safetensors.numpy import load_file
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import TensorDataset

import qnas
from qnas.commands.search import _lines as describe_search
from qnas.common.errors import Interrupted, QnasWarning, UsageError
from qnas.runs.names import EPOCHS_FILE, METRICS_FILE, PREDICTIONS_FILE
from qnas.runs.run_text import describe_training
from qnas.spaces.arch import make_arch
from qnas.spaces.space import parse_space
from qnas.training.recipe import Recipe

SPACE = parse_space(TINY_SPACE, "tiny.yaml")
BATCH_NORMS = parse_space(TINY_SPACE.replace("layernorm", "batchnorm"), "tiny.yaml")
CHOICES = ("quadra_k3_e2", "identity", "quadra_k3_e2", "identity")
PX = 8
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 32, "learning_rate": 2e-3, "warmup_epochs": 1.0}


def train(folder: Path, space: qnas.SearchSpace = SPACE, **options: Any) -> qnas.TrainedNetwork:
    asked = {"data": imbalanced(), "recipe": "small", "resolution_px": PX, "threads": 1, **SHORT, **options}
    return qnas.train_subnet((space, make_arch(space, CHOICES)), out=folder, **asked)


def search(folder: Path, space: qnas.SearchSpace = SPACE, **options: Any) -> qnas.SearchResult:
    asked = {"data": imbalanced(), "search_epochs": 1, "warmup_epochs": 1, "resolution_px": PX, "threads": 1}
    short = {"random_networks": 2, "k_best": 4, "screened": 4, "effect_networks": 40}
    return qnas.run_search(space, {"cpu": "250us"}, out=folder, **{**asked, **short, **options})


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collect our warnings."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True, action="always") as caught:
        yield notes
    notes += [str(each.message) for each in caught if issubclass(each.category, QnasWarning)]


def stop_at(step: int) -> Callable[[Any], None]:
    """Return a display that interrupts a run, as Ctrl-C does."""

    def stop(report: Any) -> None:
        if report.done == step:
            raise KeyboardInterrupt

    return stop


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> qnas.TrainedNetwork:
    return train(tmp_path_factory.mktemp("plain") / "run")


# ---- 95 to 5


def test_a_network_that_never_predicts_a_class_is_said_in_words(plain: qnas.TrainedNetwork) -> None:
    assert plain.accuracy == 0.95
    assert plain.balanced_accuracy == 0.5
    assert plain.never_predicted == ("rare",)
    speed = json.loads((plain.folder / "speed.json").read_text())
    text = " ".join(describe_training("95.00%", plain.result, speed, "").split())
    assert "balanced accuracy 50.00%, the mean recall of the classes" in text
    assert (
        "warning never predicts 1 of 2 classes: rare; --class-weights balanced or --sampler balanced" in text
    )
    page = (plain.folder / "report.html").read_text()
    assert "The network never predicts 1 of 2 classes: rare." in page
    assert 'data-key="result.test_balanced_accuracy"' in page


@pytest.mark.parametrize(
    "options",
    [
        {"class_weights": "balanced"},
        {"sampler": "balanced"},
        {"loss": "balanced"},
        {"class_weights": "balanced", "loss": "focal"},
    ],
    ids=str,
)
def test_a_training_that_balances_the_classes_finds_the_rare_one(
    options: dict[str, Any], plain: qnas.TrainedNetwork, tmp_path: Path
) -> None:
    found = train(tmp_path / "run", **options)
    assert found.balanced_accuracy is not None
    assert found.balanced_accuracy > 0.75
    assert found.never_predicted == ()
    assert {key: found.config["train"][key] for key in options} == options
    assert not {"class_weights", "sampler"} & plain.config["train"].keys()
    predictions = load_file(found.folder / PREDICTIONS_FILE)
    expected = balanced_accuracy_score(predictions["labels"], predictions["predicted"])
    assert found.balanced_accuracy == pytest.approx(expected)
    # rare images weigh more in the test loss
    rows = [json.loads(line) for line in (found.folder / METRICS_FILE).read_text().splitlines()]
    assert rows[-1]["test_balanced_accuracy"] == found.balanced_accuracy
    assert "test_balanced_accuracy" in (found.folder / EPOCHS_FILE).read_text().splitlines()[0].split(",")


@pytest.mark.parametrize(
    "options",
    [
        {"class_weights": "balanced", "sampler": "balanced"},
        {"loss": "balanced", "sampler": "balanced"},
        {"loss": "balanced", "class_weights": "balanced"},
    ],
    ids=str,
)
def test_rare_classes_are_not_made_up_for_twice(options: dict[str, Any], tmp_path: Path) -> None:
    names = " and ".join(
        f"`{key}='balanced'`" for key in ("loss", "class_weights", "sampler") if key in options
    )
    for start in (train, search):
        with pytest.raises(UsageError, match=f"^{names} both make up for rare classes: expected one of them"):
            start(tmp_path / "run", **options)


def test_a_search_on_rare_classes_reports_and_ranks_by_all_classes(tmp_path: Path) -> None:
    plain = search(tmp_path / "plain", batch_size=32)
    found = search(tmp_path / "sampled", batch_size=32, sampler="balanced", search_epochs=2)
    assert plain.accuracy > 0.9 > found.accuracy
    assert plain.balanced_accuracy is not None
    assert found.balanced_accuracy is not None
    assert plain.balanced_accuracy < 0.7 < 0.8 < found.balanced_accuracy
    assert found.never_predicted == ()
    assert found.config["search"]["sampler"] == "balanced"
    first = found.ranking[0]
    assert first["heldout_balanced_accuracy"] == found.heldout_balanced_accuracy
    assert found.document["supernet_balanced_accuracy"] == found.balanced_accuracy
    steps = [json.loads(line) for line in (found.folder / METRICS_FILE).read_text().splitlines()]
    assert all(0 <= row["arch_balanced_accuracy"] <= 1 for row in steps if "arch_loss" in row)
    # again from the folder, with the same weights of the classes
    budgets = {"cpu": "250us"}
    again = qnas.derive(found, budgets, data=imbalanced(), rerank=True, k_best=4, out=tmp_path / "again")
    of_again = {tuple(r["choices"]): r["heldout_loss"] for r in again.document["ranking"]}
    of_found = {tuple(r["choices"]): r["heldout_loss"] for r in found.ranking}
    assert of_again == pytest.approx(of_found, rel=1e-4)


def test_a_search_says_which_classes_its_network_never_predicts(tmp_path: Path) -> None:
    found = search(tmp_path / "run", data=imbalanced(rare=110.0), batch_size=32)
    assert found.accuracy == 0.95
    assert found.balanced_accuracy == 0.5
    assert found.never_predicted == ("rare",)
    text = " ".join("\n".join(describe_search(found)).split())
    assert "balanced accuracy 50.0%, the mean recall of the classes" in text
    assert (
        "warning never predicts 1 of 2 classes: rare; --class-weights balanced or --sampler balanced" in text
    )
    assert "the derived network never predicts 1 of 2 classes: rare." in found.report.read_text()


@pytest.mark.parametrize("options", [{"sampler": "balanced"}, {"class_weights": "balanced"}], ids=str)
def test_a_search_that_balances_goes_on_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", batch_size=32, **options)

    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        search(stopped, batch_size=32, progress=stop_at(29), **options)
    again = qnas.run_search(out=stopped, data=imbalanced(), space=SPACE, resume=True)
    assert again.document["choices"] == whole.document["choices"]
    for name in ("supernet.safetensors", METRICS_FILE):
        assert (stopped / name).read_bytes() == (whole.folder / name).read_bytes(), name


# ---- few images


def few(train_images: int, heldout: int, seed: int = 0) -> qnas.Datasets:
    """Return so many training and held-out images of two classes, half of each."""
    rng = np.random.default_rng(seed)

    def make(count: int) -> TensorDataset:
        images = rng.integers(0, 256, (count, 3, PX, PX), dtype=np.uint8)
        return TensorDataset(torch.from_numpy(images), torch.arange(count) % 2)

    return qnas.Datasets(make(train_images), make(heldout), make(20), classes=("a", "b"), name="few")


def test_a_search_takes_the_batch_that_was_asked_for_however_few_held_out_images_there_are(
    tmp_path: Path,
) -> None:
    with noted() as notes:
        found = search(tmp_path / "run", data=few(48, 2), batch_size=16)
    assert found.config["search"]["batch_size"] == 16
    assert found.config["arch_batch_size"] == 2
    rows = (found.folder / METRICS_FILE).read_text().splitlines()
    assert len(rows) == 2 * 48 // 16, "steps of two epochs"
    assert "architecture steps take 2 images, not 16: there are 2 held-out images" in notes


def test_a_batch_that_was_asked_for_is_refused_if_there_are_fewer_images(tmp_path: Path) -> None:
    problem = "^`batch_size=49`: there are only 48 training images: expected at most `batch_size=48`$"
    with pytest.raises(UsageError, match=problem):
        search(tmp_path / "run", data=few(48, 20), batch_size=49)
    own = tmp_path / "own.yaml"
    own.write_text("schema: qnas.recipe/1\nepochs: 1\nbatch_size: 69\nlearning_rate: 1e-3\n")
    problem = problem.replace("49", "69").replace("48", "68")
    asked: dict[str, Any] = {"data": few(48, 20), "batch_size": None}
    for recipe in (own, Recipe(epochs=1, batch_size=69, learning_rate=1e-3)):
        with pytest.raises(UsageError, match=problem):
            train(tmp_path / "run", recipe=recipe, **asked)
    with pytest.raises(UsageError, match=problem):
        train(tmp_path / "run", **asked | {"batch_size": 69})
    assert not (tmp_path / "run").exists()


def test_a_default_batch_that_does_not_fit_is_made_smaller_with_a_word(tmp_path: Path) -> None:
    with noted() as notes:
        trained = train(tmp_path / "trained", data=few(48, 20), batch_size=None, epochs=1)
        searched = search(tmp_path / "searched", data=few(48, 20))
    assert trained.config["train"]["recipe"]["batch_size"] == 68
    assert searched.config["search"]["batch_size"] == 48
    assert "steps take 68 images, not the default of 128: there are 68 training images" in notes
    assert "steps take 48 images, not the default of 128: there are 48 training images" in notes
    assert "architecture steps take 20 images, not 48: there are 20 held-out images" in notes


def test_a_run_with_a_smaller_default_batch_can_be_resumed(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"data": few(48, 20), "batch_size": None, "epochs": 3}
    with pytest.raises(Interrupted), noted():
        train(tmp_path / "trained", progress=stop_at(2), **asked)
    with pytest.raises(Interrupted), noted():
        search(tmp_path / "searched", data=few(48, 20), progress=stop_at(1))
    with noted():
        trained = train(tmp_path / "trained", resume=True, **asked)
        searched = qnas.run_search(SPACE, data=few(48, 20), out=tmp_path / "searched", resume=True)
    assert trained.config["train"]["recipe"]["batch_size"] == 68
    assert searched.config["search"]["batch_size"] == 48
    assert searched.config["arch_batch_size"] == 20


def test_batch_norms_refuse_batches_of_one_image(tmp_path: Path) -> None:
    for start, options in ((train, {}), (search, {}), (train, {"accumulation": 4, "batch_size": 4})):
        with pytest.raises(
            UsageError, match=r"^`batch_size=[14]`.*: the network has batch norms, which need "
        ):
            start(tmp_path / "run", BATCH_NORMS, data=few(10, 4), **{"batch_size": 1, **options})
    with pytest.raises(UsageError, match=r"^1 held-out images: the network has batch norms"):
        search(tmp_path / "run", BATCH_NORMS, data=few(10, 1), batch_size=4)
    assert train(tmp_path / "layernorm", data=few(10, 4), batch_size=1, epochs=1).accuracy >= 0


@pytest.mark.parametrize("images", [129, 130])
def test_a_last_batch_of_one_image_is_not_measured_for_batch_norms(images: int, tmp_path: Path) -> None:
    """The maps of the last stage are one pixel, of which a batch norm cannot measure one image."""
    found = search(tmp_path / "run", BATCH_NORMS, data=few(images, 4), batch_size=32, resolution_px=4)
    assert np.isfinite(found.ranking[0]["heldout_loss"])


def test_every_epoch_of_a_balanced_sampler_has_as_many_steps(tmp_path: Path) -> None:
    data = qnas.Datasets(overlapping(60, 0), test=overlapping(40, 1), classes=("often", "rare"), name="small")
    found = train(tmp_path / "run", data=data, sampler="balanced", batch_size=20, epochs=2)
    assert len((found.folder / METRICS_FILE).read_text().splitlines()) == 2 * 60 // 20
