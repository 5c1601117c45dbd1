"""The ways in which a supernet keeps its weights and estimates the architecture's gradient, by name."""

from typing import Literal, get_args

WeightsMode = Literal["independent", "shared", "nested"]
WEIGHTS_MODES: tuple[WeightsMode, ...] = get_args(WeightsMode)
GradientForm = Literal["two-path", "all-paths", "gumbel", "exact"]
GRADIENT_FORMS: tuple[GradientForm, ...] = get_args(GradientForm)


def gradient_for(weights: WeightsMode, form: GradientForm | None) -> GradientForm:
    """Return the gradient for a mode of weights: `form`, else the default of the mode.

    Raises ValueError where the two do not go together.
    """
    if weights == "nested" and form not in (None, "exact"):
        raise ValueError(f"`gradient='{form}'`: expected 'exact', as `weights='nested'` has no other")
    if weights != "nested" and form == "exact":
        raise ValueError(f"`gradient='exact'` needs `weights='nested'`, got '{weights}'")
    return form or ("exact" if weights == "nested" else "two-path")
