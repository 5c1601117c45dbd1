"""The names of a supernet's weight sharing modes and of the forms of the architecture gradient."""

from typing import Literal

WeightsMode = Literal["independent", "shared", "nested"]
GradientForm = Literal["two-path", "all-paths", "gumbel", "exact"]


def gradient_for(weights: WeightsMode, form: GradientForm | None) -> GradientForm:
    """Return the gradient form for a weights mode: `form`, or the mode's default if it is None.

    Raises ValueError if the two cannot be combined.
    """
    if weights == "nested" and form not in (None, "exact"):
        raise ValueError(f"`gradient='{form}'`: expected 'exact', the only one with `weights='nested'`")
    if weights != "nested" and form == "exact":
        raise ValueError(f"`gradient='exact'` needs `weights='nested'`, got '{weights}'")
    return form or ("exact" if weights == "nested" else "two-path")
