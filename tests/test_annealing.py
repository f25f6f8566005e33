"""The annealing of fine-tuning's two rewards."""

import pytest

from booster_soccer.rewards.annealing import anneal


@pytest.mark.parametrize(
    ("step", "alpha", "beta"),
    [(0, 1.0, 0.1), (25_000, 0.775, 0.325), (50_000, 0.55, 0.55), (75_000, 0.325, 0.775), (100_000, 0.1, 1.0)],
)
def test_is_linear_over_the_whole_run(step, alpha, beta):
    assert anneal(step, 100_000) == pytest.approx((alpha, beta), abs=1e-12)


def test_ends_are_exact_and_held():
    assert anneal(0, 7) == (1.0, 0.1)
    assert anneal(7, 7) == (0.1, 1.0)
    assert anneal(9, 7) == (0.1, 1.0)
