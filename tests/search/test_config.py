from pathlib import Path

import pytest

from qnas.common.errors import UsageError
from qnas.common.resources import stems
from qnas.data.sources import KINDS
from qnas.search.config import FINALISTS, PRESET_OF_DATA, SearchConfig, default_preset

SHORTEST = """\
schema: qnas.search-preset/1
preset: mine
resolution_px: 8
warmup_epochs: 0
search_epochs: 1
batch_size: 8
learning_rate: 2e-3
arch_learning_rate: 0.1
arch_every: 1
"""


def test_every_shipped_preset_can_be_read_and_written_back_and_says_its_name() -> None:
    assert set(stems("recipes/search", ".yaml")) == {"digits", "small", "photos", "pretrained"}
    for name in stems("recipes/search", ".yaml"):
        config = SearchConfig.load(name)
        assert config.preset == name
        assert SearchConfig.parse(config.to_yaml(), name) == config


def test_every_kind_of_data_has_a_preset() -> None:
    assert set(PRESET_OF_DATA) == set(KINDS)
    config = SearchConfig.load("digits")
    assert config.override({"seed": 3, "k_best": None}).override({"seed": 0}) == config


def test_a_preset_of_a_file_is_read_with_all_its_problems(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(SHORTEST)
    assert SearchConfig.load(mine).learning_rate == 2e-3
    mine.write_text(SHORTEST.replace("search_epochs: 1", "search_epoch: 1") + "k_best: 0\n")
    problems = "search_epochs: missing; k_best: expected at least 1, got 0; search_epoch: unknown key"
    with pytest.raises(UsageError, match=f"mine.yaml: {problems}"):
        SearchConfig.load(mine)


def test_the_record_of_a_search_is_that_of_searches_before_losses_had_a_choice() -> None:
    config = SearchConfig.parse(SHORTEST, "mine")
    record = config.record()
    assert list(record)[:3] == ["preset", "resolution_px", "warmup_epochs"]
    assert not {"schema", "file_schema", "loss", "metric", "weight_steps", "head_epochs"} & set(record)
    assert SearchConfig.check(record, "a run") == config
    assert config.override({"loss": "focal"}).record() == {**record, "loss": "focal"}
    changes = {"weight_steps": "sandwich", "step_paths": 3, "pretrained_rate": 0.5}
    assert config.override(changes).record() == {**record, **changes}


def test_a_sandwich_has_two_drawn_paths_unless_asked_otherwise() -> None:
    config = SearchConfig.parse(SHORTEST, "mine")
    assert config.drawn_paths == 1
    assert config.override({"weight_steps": "sandwich"}).drawn_paths == 2
    assert config.override({"weight_steps": "sandwich", "step_paths": 1}).drawn_paths == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weight_steps": "sandwich"}, "`weight_steps=.sandwich.`: there are no paths with"),
        (
            {"weight_steps": "sandwich", "step_paths": 2},
            "`weight_steps=.sandwich.` and `step_paths=2`: there",
        ),
        ({"paths": "fair"}, "`paths='fair'`: there are no paths with `nested_weight_steps='mixture'`"),
    ],
)
def test_a_whole_mixture_has_no_paths(changes: dict[str, object], problem: str) -> None:
    config = SearchConfig.parse(SHORTEST, "mine").override({"weights": "nested"})
    assert config.override(changes).weights == "nested"
    with pytest.raises(UsageError, match=f"^{problem}"):
        config.override({**changes, "nested_weight_steps": "mixture"})


def test_the_classifier_alone_is_trained_in_the_warm_up_only() -> None:
    config = SearchConfig.parse(SHORTEST, "mine").override({"warmup_epochs": 2})
    assert config.override({"head_epochs": 2}).head_epochs == 2
    problem = "`head_epochs=3`: expected at most as many as of the warm-up, `warmup_epochs=2`"
    with pytest.raises(UsageError, match=f"^{problem}$"):
        config.override({"head_epochs": 3})


@pytest.mark.parametrize(
    ("weights", "gradient", "allowed"),
    [
        ("nested", None, True),
        ("nested", "exact", True),
        ("nested", "gumbel", False),
        ("shared", "exact", False),
        ("shared", "gumbel", True),
    ],
)
def test_the_exact_gradient_goes_with_nested_weights_and_no_other(
    weights: str, gradient: str | None, allowed: bool
) -> None:
    config = SearchConfig.parse(SHORTEST, "mine")
    changes = {"weights": weights, "gradient": gradient}
    if allowed:
        assert config.override(changes).gradient == gradient
    else:
        with pytest.raises(UsageError, match="`weights='nested'`"):
            config.override(changes)


def test_a_shorter_warm_up_has_fewer_epochs_for_the_classifier_alone() -> None:
    preset = SearchConfig.load("pretrained")
    assert preset.head_epochs == 2
    assert preset.override({"warmup_epochs": 1}).head_epochs == 1
    assert preset.override({"warmup_epochs": 3}).head_epochs == 2
    with pytest.raises(UsageError, match=r"`head_epochs=2`: expected at most"):
        preset.override({"warmup_epochs": 1, "head_epochs": 2})


def test_without_the_finalists_of_a_preset_their_settings_are_gone() -> None:
    preset = SearchConfig.load("small")
    assert preset.finalists
    assert preset.changed(FINALISTS) != preset.override({"finalists": 2}).changed(FINALISTS) != ""
    assert preset.override({"finalists": 0}).changed(FINALISTS) == ""
    with pytest.raises(UsageError, match="there are no finalists"):
        preset.override({"finalists": 0, "finalist_epochs": 3})


def test_a_whole_mixture_leaves_the_fair_paths_of_a_preset() -> None:
    preset = SearchConfig.load("small")
    assert preset.paths == "fair"
    mixture = {"weights": "nested", "nested_weight_steps": "mixture"}
    assert preset.override(mixture).paths == "even"
    with pytest.raises(UsageError, match="`paths='fair'`: there are no paths"):
        preset.override(mixture | {"paths": "fair"})


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_weights_have_a_preset_of_their_own(kind: str) -> None:
    assert default_preset(kind, is_pretrained=True) == "pretrained"
    assert default_preset(kind, is_pretrained=False) == PRESET_OF_DATA[kind]
