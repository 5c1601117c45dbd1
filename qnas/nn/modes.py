"""The ways in which a supernet keeps its weights and estimates the architecture's gradient, by name."""

from typing import Literal, get_args

WeightsMode = Literal["independent", "shared", "nested"]
WEIGHTS_MODES: tuple[WeightsMode, ...] = get_args(WeightsMode)
GradientForm = Literal["two-path", "all-paths", "gumbel", "exact"]
GRADIENT_FORMS: tuple[GradientForm, ...] = get_args(GradientForm)


def check_gradient(weights: WeightsMode, form: GradientForm | None) -> None:
    """Raise ValueError where a gradient does not go with a mode of weights."""
    if weights == "nested" and form not in (None, "exact"):
        raise ValueError(f"gradient: nested weights have the exact gradient, not {form}")
    if weights != "nested" and form == "exact":
        raise ValueError(f"gradient: exact needs nested weights, not {weights}")


def gradient_for(weights: WeightsMode, form: GradientForm | None) -> GradientForm:
    """Return the gradient of a mode of weights: the one that is asked for, else the default.

    Raises ValueError where the two do not go together.
    """
    check_gradient(weights, form)
    return form or ("exact" if weights == "nested" else "two-path")
