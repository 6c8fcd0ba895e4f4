"""Noise of a curve: its standard deviation, and the slope of a line through it."""

import math

import numpy as np
import pytest

from fitwatch.rules.noise import Trend, is_falling, noise_level
from fitwatch.rules.overfitting import OverfittingRule


@pytest.mark.parametrize("count", [3, 4, 10, 200])
def test_the_trend_is_the_slope_of_least_squares_over_its_standard_error(count):
    """The t statistic is the slope fitted by numpy over its standard error from the normal equations."""
    losses = np.random.default_rng(count).standard_normal(count) + 0.1 * np.arange(count)
    trend = Trend()
    for loss in losses:
        trend.add(float(loss))
    x = np.arange(1, count + 1)
    slope = np.polyfit(x, losses, 1)[0]
    error = math.sqrt(np.linalg.inv(np.vander(x, 2).T @ np.vander(x, 2))[0, 0])
    assert trend.t_statistic == pytest.approx(slope / error, rel=1e-9)


def test_two_losses_are_no_trend():
    """A line fits any two points, so two losses give a t statistic of 0."""
    trend = Trend()
    for loss in (0.0, 1.0):
        trend.add(loss)
        assert trend.t_statistic == 0
    trend.add(2.0)
    assert trend.t_statistic == pytest.approx(math.sqrt(2))


def test_the_t_statistic_of_noise_is_standard_normal():
    """For noise of 1 without a slope, the t statistic has mean 0 and standard deviation 1 at any level."""
    statistics = []
    for seed in range(2000):
        trend = Trend()
        for loss in 5 + np.random.default_rng(seed).standard_normal(12):
            trend.add(float(loss))
        statistics.append(trend.t_statistic)
    assert abs(np.mean(statistics)) < 0.1
    assert np.std(statistics) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("trend", [lambda i: 0 * i, lambda i: 0.5 * i, lambda i: 20 * np.exp(-i / 5)])
def test_the_noise_level_does_not_depend_on_a_smooth_trend(trend):
    """Noise of 0.3 is estimated as about 0.3 on a flat curve, a line, and a curve that flattens."""
    i = np.arange(31)
    found = [noise_level((trend(i) + 0.3 * np.random.default_rng(s).standard_normal(31)).tolist()) for s in range(300)]
    assert np.median(found) == pytest.approx(0.3, rel=0.15)


def test_the_noise_level_of_few_points_is_unknown():
    """Fewer than five losses give an infinite noise level; five on a straight line give 0."""
    assert noise_level([1.0, 2.0, 3.0, 4.0]) == math.inf
    assert noise_level([1.0, 2.0, 3.0, 4.0, 5.0]) == 0


def test_falling_needs_more_than_noise():
    """A fall far beyond the noise counts; one smaller than required, pure noise and four points do not."""
    noise = 0.01 * np.random.default_rng(0).standard_normal(30)
    assert is_falling((np.linspace(1, 0.5, 30) + noise).tolist(), 0.01)
    assert not is_falling((np.linspace(1, 0.5, 30) + noise).tolist(), 0.5)
    assert not is_falling((1 + noise).tolist(), 0.0)
    assert not is_falling([1.0, 0.5, 0.2, 0.1], 0.0)


def trend(rule):
    """Count, total and moment of a rule's trend."""
    return rule._trend.count, rule._trend.total, rule._trend.moment


def test_the_trend_restarts_at_each_new_minimum():
    """The rule's line goes through the losses after the last minimum only, at either of the two candidates."""
    val = [1.0, 0.9, 0.8, 0.7, 0.6, 0.3, 0.4, 0.5, 0.7]
    rule = OverfittingRule(span=1)
    for loss in val:
        rule.update(1.0, loss)
    assert trend(rule) == pytest.approx((3, 0.1 + 0.2 + 0.4, 0.1 + 2 * 0.2 + 3 * 0.4))
    rule.update(1.0, 0.1)
    assert trend(rule) == (0, 0.0, 0.0)
    slow = OverfittingRule()  # its mean still falls at the loss after the lowest one
    for loss in [*val[:6], 0.35]:
        slow.update(1.0, loss)
    assert trend(slow) == pytest.approx((1, 0.05, 0.05))
