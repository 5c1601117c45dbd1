from pathlib import Path

import pytest
from helpers.mutants import check_refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

from qnas.commands import cli
from qnas.common.errors import UsageError
from qnas.common.resources import stems
from qnas.data.sources import KINDS
from qnas.training.recipe import DEFAULTS, Recipe, TrainConfig, default_recipe

SHORTEST = "schema: qnas.recipe/1\nepochs: 3\nbatch_size: 8\nlearning_rate: 0.01\n"


def test_every_shipped_recipe_can_be_read_and_written_back() -> None:
    for name in stems("recipes", ".yaml"):
        recipe = Recipe.load(name)
        assert Recipe.parse(recipe.to_yaml(), name) == recipe


def test_every_kind_of_data_has_a_recipe_that_ends_at_the_resolution_of_the_space() -> None:
    assert set(DEFAULTS) == set(KINDS)
    for kind, name in DEFAULTS.items():
        recipe = Recipe.load(name)
        assert recipe.resolution_px is None, "left to the space"
        # pictures of few pixels start small; photographs have the space's size throughout
        assert (recipe.start_resolution_px is None) == (kind in ("imagefolder", "shards"))


@settings(max_examples=200, deadline=None)
@given(
    epochs=st.integers(1, 400),
    start=st.none() | st.integers(1, 512),
    last=st.integers(1, 512),
)
def test_sizes_grow_to_the_last_one_with_epochs_in_inverse_proportion(
    epochs: int, start: int | None, last: int
) -> None:
    recipe = Recipe(
        epochs=epochs, batch_size=8, learning_rate=0, resolution_px=last, start_resolution_px=start
    )
    sizes, counts = zip(*recipe.stages, strict=True)
    assert sum(counts) == epochs
    assert min(counts) >= 1
    assert sizes[-1] == last
    assert list(sizes) == sorted(set(sizes))
    first = start or last
    if first >= last:
        assert sizes == (last,)
        return
    assert all(px == last or (px % first == 0 and (px // first).bit_count() == 1) for px in sizes), "doubled"
    if epochs >= 8 * last / first:  # long enough for several epochs of the largest
        assert sizes[0] == first
        shown = [count * px for px, count in recipe.stages]
        assert max(shown) < 1.5 * min(shown)


def test_the_recipe_for_imagenet_is_the_papers() -> None:
    """QuadraNet, arXiv 2311.17956, and the augmentations of ConvNeXt, arXiv 2201.03545."""
    recipe = Recipe.load("imagenet")
    assert (recipe.epochs, recipe.warmup_epochs, recipe.resolution_px) == (300, 20, 224)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.gradient_clip) == (4e-3, 0.05, 5)
    assert (recipe.randaugment, recipe.randaugment_std) == (9, 0.5)
    assert (recipe.mixup, recipe.cutmix, recipe.random_erasing) == (0.8, 1.0, 0.25)
    assert recipe.label_smoothing == 0.1
    assert recipe.random_resized_crop == 0.08
    assert recipe.stochastic_depth > 0
    assert recipe.ema_decay > 0


def test_what_a_recipe_leaves_out_is_off() -> None:
    recipe = Recipe.parse(SHORTEST, "mine.yaml")
    off = (
        "random_resized_crop",
        "randaugment",
        "mixup",
        "cutmix",
        "random_erasing",
        "stochastic_depth",
        "ema_decay",
    )
    assert all(getattr(recipe, name) == 0 for name in off)
    assert recipe.accumulation == 1
    assert not recipe.linear_start


def test_files_of_a_recipe_are_those_of_recipes_before_heads_had_epochs() -> None:
    recipe = Recipe.parse(SHORTEST, "mine.yaml")
    config = TrainConfig(recipe=recipe)
    for kept in (recipe.to_yaml(), str(config.record())):
        assert "epochs" in kept
        assert not any(name in kept for name in ("head_epochs", "backbone_rate"))
    slow = recipe.override({"backbone_rate": 0.1})
    assert "backbone_rate: 0.1\n" in slow.to_yaml()
    assert "head_epochs" not in slow.to_yaml()
    assert Recipe.parse(slow.to_yaml(), "mine.yaml") == slow
    recorded = TrainConfig(recipe=slow).record()
    assert recorded["recipe"] == config.record()["recipe"] | {"backbone_rate": 0.1}
    assert TrainConfig.check(recorded, "config.json").recipe == slow


def test_the_head_is_not_all_that_is_trained() -> None:
    recipe = Recipe.parse(SHORTEST, "mine.yaml")
    assert recipe.override({"head_epochs": 2}).head_epochs == 2
    with pytest.raises(UsageError, match=r"^`head_epochs=3`: expected fewer than the epochs, `epochs=3`$"):
        recipe.override({"head_epochs": 3})
    with pytest.raises(UsageError, match=r"^`backbone_rate`: expected at most 1, got 1\.5"):
        recipe.override({"backbone_rate": 1.5})


def test_every_field_has_a_flag_that_overrides_it() -> None:
    fields = set(Recipe.model_fields) - {"file_schema"}
    command = get_command(cli.app).commands["train-subnet"]  # type: ignore[attr-defined]  # a group
    flags = {option for parameter in command.params for option in parameter.opts}
    for name in fields:
        assert f"--{name.removesuffix('_px').replace('_', '-')}" in flags
    recipe = Recipe.parse(SHORTEST, "mine.yaml").override({"mixup": 0.5, "cutmix": None})
    assert (recipe.mixup, recipe.cutmix, recipe.epochs) == (0.5, 0, 3)


def test_a_power_of_ten_without_a_point_is_a_number() -> None:
    """YAML 1.1 has 4e-3 as text."""
    assert Recipe.parse(SHORTEST.replace("0.01", "1e-2"), "mine.yaml").learning_rate == 0.01


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("epoch: 3", r"epoch: unknown key \(did you mean epochs"),
        ("mixup: lots", "mixup: expected a number, got 'lots'"),
        ("mixup: 1e-x", "mixup: expected a number, got '1e-x'"),
        ("accumulation: 1.5", r"accumulation: expected a whole number, got 1.5"),
        ("accumulation: 0", "accumulation: expected at least 1, got 0"),
        ("randaugment: 11", "randaugment: expected at most 10, got 11"),
        ("ema_decay: 1.0", "ema_decay: expected less than 1, got 1.0"),
        ("gradient_clip: 0.0", "gradient_clip: expected more than 0, got 0.0"),
        ("weight_decay: .nan", "weight_decay: .*got nan"),
        ("linear_start: 1", "linear_start: .*got 1"),
    ],
)
def test_a_problem_is_named_with_its_place(line: str, problem: str) -> None:
    with pytest.raises(UsageError, match=f"^mine.yaml: {problem}"):
        Recipe.parse(SHORTEST + line, "mine.yaml")


def test_all_problems_are_said_together() -> None:
    with pytest.raises(
        UsageError, match="`epochs`: expected at least 1, got 0; `mixup`: expected at least 0"
    ):
        Recipe.parse(SHORTEST, "mine.yaml").override({"epochs": 0, "mixup": -1.0})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a mapping with schema: qnas.recipe/1, got an empty file"),
        ("epochs: 3", "schema: missing, expected qnas.recipe/1"),
        (SHORTEST.replace("recipe/1", "recipe/2"), "schema: expected 'qnas.recipe/1', got 'qnas.recipe/2'"),
        ("a: [", "line 1: not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Recipe.parse(text, "mine.yaml")


def test_a_recipe_is_found_by_name_or_path(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(SHORTEST, encoding="utf-8")
    assert Recipe.load(mine).epochs == 3
    with pytest.raises(UsageError, match="unknown recipe 'cifer': did you mean cifar"):
        Recipe.load("cifer")
    with pytest.raises(UsageError, match="no such file"):
        Recipe.load(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs: 2000000", "epochs: expected at most 1000000, got 2000000"),
        ("epochs: " + "9" * 39, "epochs: expected at most 1000000, got 999"),
        ("epochs: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("warmup_epochs: 1e300", "warmup_epochs: expected at most 1e+09"),
        ("warmup_epochs: .nan", "warmup_epochs: expected "),
        ("warmup_epochs: 1e999", "warmup_epochs: expected "),
        ("learning_rate: 2001-99-99", "not YAML: "),
        ("learning_rate: !!int ''", "not YAML: "),
        ('"\\UFFFFFFFF": 1', "not YAML: "),
        ("learning_rate: " + "[" * 500, ""),
        ("learning_rate: &a [*a]", ""),
        ("!!python/object:os.system x: 1", ""),
        ('"a\\e[2J": 1', "a\\x1b[2J: unknown key"),
        (f"{'k' * 5000}: 1", ""),
        (f"learning_rate: {'v' * 5000}", "learning_rate: expected a number, got 'vvv"),
        ("? {a: b}\n: 1", ""),
    ],
)
def test_what_a_recipe_may_not_hold_is_one_short_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    key = line.partition(":")[0]
    kept = "".join(each for each in SHORTEST.splitlines(True) if not each.startswith(f"{key}:"))
    path.write_text(f"{kept}{line}\n")
    with pytest.raises(UsageError) as error:
        Recipe.load(path)
    assert message in str(error.value)
    check_refusal(error.value, path)


def test_bounds_of_a_field_and_of_its_kind_hold_together() -> None:
    for changes in (
        {"randaugment": 10.5},
        {"teacher_temperature": 0.0},
        {"gradient_clip": 2e9},
        {"mixup": -1.0},
    ):
        with pytest.raises(UsageError):
            Recipe.parse(SHORTEST, "x").override(changes)


def test_numbers_of_any_size_given_in_python_are_one_line() -> None:
    for value in (10**5000, -(10**5000), float("inf"), "x" * 10**6, b"x" * 10**6):
        with pytest.raises(UsageError) as error:
            Recipe.parse(SHORTEST, "x").override({"epochs": value})
        check_refusal(error.value)


def test_a_shorter_training_has_fewer_epochs_for_the_classifier_alone() -> None:
    recipe = Recipe.load("finetune-pretrained").override({"head_epochs": 2})
    assert recipe.override({"epochs": 2}).head_epochs == 1
    assert recipe.override({"epochs": 3}).head_epochs == 2
    with pytest.raises(UsageError, match=r"`head_epochs=2`: expected fewer"):
        recipe.override({"epochs": 2, "head_epochs": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_weights_have_a_recipe_of_their_own(kind: str) -> None:
    assert default_recipe(kind, is_pretrained=True) == "finetune-pretrained"
    assert default_recipe(kind, is_pretrained=False) == DEFAULTS[kind]
