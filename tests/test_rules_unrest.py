"""What unrest does to a curve: its size, and the slope of a line through it."""

import math

import numpy as np
import pytest

from fitwatch.rules.noise import Trend, falls, unrest
from fitwatch.rules.overfitting import OverfittingRule


@pytest.mark.parametrize("count", [3, 4, 10, 200])
def test_the_trend_is_the_slope_of_least_squares_over_its_standard_error(count):
    """The strength is the slope that numpy fits, over the standard error that the normal equations give it."""
    losses = np.random.default_rng(count).standard_normal(count) + 0.1 * np.arange(count)
    trend = Trend()
    for loss in losses:
        trend.take(float(loss))
    x = np.arange(1, count + 1)
    slope = np.polyfit(x, losses, 1)[0]
    error = math.sqrt(np.linalg.inv(np.vander(x, 2).T @ np.vander(x, 2))[0, 0])
    assert trend.strength == pytest.approx(slope / error, rel=1e-9)


def test_two_losses_are_no_trend():
    """A line through two points fits any two, so it says nothing."""
    trend = Trend()
    for loss in (0.0, 1.0):
        trend.take(loss)
        assert trend.strength == 0
    trend.take(2.0)
    assert trend.strength == pytest.approx(math.sqrt(2))


def test_the_strength_of_noise_is_that_of_a_standard_normal_number():
    """On noise of 1 without a slope the strength has mean 0 and standard deviation 1, whatever the level is."""
    strengths = []
    for seed in range(2000):
        trend = Trend()
        for loss in 5 + np.random.default_rng(seed).standard_normal(12):
            trend.take(float(loss))
        strengths.append(trend.strength)
    assert abs(np.mean(strengths)) < 0.1
    assert np.std(strengths) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("trend", [lambda i: 0 * i, lambda i: 0.5 * i, lambda i: 20 * np.exp(-i / 5)])
def test_unrest_is_the_noise_about_any_smooth_trend(trend):
    """Noise of .3 is measured as about .3 on a flat curve, on a line, and on one that flattens."""
    i = np.arange(31)
    found = [unrest((trend(i) + 0.3 * np.random.default_rng(s).standard_normal(31)).tolist()) for s in range(300)]
    assert np.median(found) == pytest.approx(0.3, rel=0.15)


def test_unrest_of_few_points_is_unknown():
    """Fewer than five losses say nothing; five of a straight line have no noise."""
    assert unrest([1.0, 2.0, 3.0, 4.0]) == math.inf
    assert unrest([1.0, 2.0, 3.0, 4.0, 5.0]) == 0


def test_falls_needs_more_than_noise():
    """Half a curve that is lower by ten standard errors falls; one that is lower by less than asked does not."""
    noise = 0.01 * np.random.default_rng(0).standard_normal(30)
    assert falls((np.linspace(1, 0.5, 30) + noise).tolist(), 0.01)
    assert not falls((np.linspace(1, 0.5, 30) + noise).tolist(), 0.5)
    assert not falls((1 + noise).tolist(), 0.0)
    assert not falls([1.0, 0.5, 0.2, 0.1], 0.0)


def test_the_trend_begins_anew_at_each_new_minimum():
    """The rule's line goes through the losses after the last minimum only, at whichever of two evaluations it is."""
    val = [1.0, 0.9, 0.8, 0.7, 0.6, 0.3, 0.4, 0.5, 0.7]
    rule = OverfittingRule(span=1)
    for loss in val:
        rule.update(1.0, loss)
    assert rule.state_dict()["trend"] == pytest.approx([3, 0.1 + 0.2 + 0.4, 0.1 + 2 * 0.2 + 3 * 0.4])
    rule.update(1.0, 0.1)
    assert rule.state_dict()["trend"] == [0, 0.0, 0.0]
    slow = OverfittingRule()  # its mean still falls at the loss after the lowest
    for loss in [*val[:6], 0.35]:
        slow.update(1.0, loss)
    assert slow.state_dict()["trend"] == pytest.approx([1, 0.05, 0.05])
