from itertools import pairwise

import pytest

from qnas.search.halving import best_first, count_epochs, count_rungs, epochs_within, plan_rungs


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("networks", [1, 2, 3, 5, 8, 9, 16, 27])
@pytest.mark.parametrize("more", [0, 1, 7, 40])
def test_each_rung_has_fewer_networks_with_more_epochs(networks: int, factor: int, more: int) -> None:
    epochs = count_rungs(networks, factor) + more
    rungs = plan_rungs(networks, epochs, factor)
    assert rungs[0].networks == networks
    assert rungs[-1].epochs == epochs
    assert rungs[-1].networks >= min(networks, 2)
    assert rungs[-1].networks < 2 * factor
    assert rungs[0].epochs >= 1
    for before, after in pairwise(rungs):
        assert after.networks == before.networks // factor or after.networks == networks // factor ** (
            rungs.index(after)
        )
        assert before.networks > after.networks
        assert before.epochs < after.epochs


def test_rungs_take_about_the_same_time() -> None:
    rungs = plan_rungs(8, 16, 2)
    assert [(rung.networks, rung.epochs) for rung in rungs] == [(8, 4), (4, 8), (2, 16)]
    assert count_epochs(rungs) == 8 * 4 + 4 * 4 + 2 * 8


@pytest.mark.parametrize("most", [3, 10, 60, 200])
def test_the_default_epochs_fill_the_time_of_the_search(most: int) -> None:
    epochs = epochs_within(8, 2, most)
    taken, more = (count_epochs(plan_rungs(8, each, 2)) for each in (epochs, epochs + 1))
    assert more > most
    assert taken <= most or epochs == count_rungs(8, 2)


def test_the_most_accurate_stay_and_the_loss_decides_between_equals() -> None:
    assert best_first([0.5, 0.7, 0.7, 0.6], [1.0, 0.9, 0.8, 0.1]) == [2, 1, 3, 0]
    assert best_first([0.5, 0.5], [1.0, 1.0]) == [0, 1]
