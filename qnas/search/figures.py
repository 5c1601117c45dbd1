"""The figures of a search that are logged: the budget, the probabilities, and what diagnostics look at."""

import math
from collections.abc import Mapping

from qnas.nn.supernet import log_probabilities
from qnas.search.diagnostics import Sight
from qnas.search.state import SearchState


def budget_figures(state: SearchState) -> dict[str, float]:
    """Return the expected amounts of all limits, and the pressure on them."""
    problem, expected = state.problem, state.expected
    ratios = (expected / problem.limit_tensors.limit).tolist()
    return {
        "expected_ms": float(expected[0]),
        "limit_ms": problem.limit_ms,
        **{f"of_limit_{limit.name}": ratio for limit, ratio in zip(problem.limits, ratios, strict=True)},
        "multiplier": state.multiplier.value,
        "temperature": state.temperature,
    }


def probability_figures(state: SearchState) -> dict[str, float]:
    """Return the mean entropy a position (nats), and the mean probability of identity where there is one."""
    mask = state.supernet.mask
    log_p = log_probabilities(state.logits, mask)
    entropy = -(log_p.exp() * log_p.masked_fill(~mask, 0.0)).sum(1).mean()
    identities = _shares(state).get("identity", [])
    return {
        "entropy": float(entropy),
        "identity_share": sum(identities) / len(identities) if identities else 0.0,
    }


def rounded_probabilities(state: SearchState) -> list[list[float]]:
    """Return every candidate's probability, by position, to four decimals."""
    return [[round(math.exp(log_p), 4) for log_p in row] for row in state.log_probabilities]


def sight(state: SearchState, figures: Mapping[str, float]) -> Sight:
    """Return what the diagnostics look at after an architecture step with these figures."""
    schedule = state.problem.schedule
    choices = sum(len(position.names) > 1 for position in state.problem.space.positions)
    return Sight(
        progress=schedule.progress(state.step),
        settling=schedule.is_settling(state.step),
        ratio=state.expected_ratio,
        multiplier=figures["multiplier"],
        entropy=figures["entropy"],
        identity_share=figures["identity_share"],
        shares={name: sum(found) / choices for name, found in _shares(state).items()},
    )


def _shares(state: SearchState) -> dict[str, list[float]]:
    """Return each candidate's probability at every position where it is one of several, by name."""
    p = log_probabilities(state.logits, state.supernet.mask).exp().tolist()
    found: dict[str, list[float]] = {}
    for row, position in zip(p, state.problem.space.positions, strict=True):
        if len(position.names) > 1:
            for name, share in zip(position.names, row, strict=False):
                found.setdefault(name, []).append(share)
    return found
