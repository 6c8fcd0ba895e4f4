"""Patience: when to stop."""

import json
import math

import numpy as np
import pytest

from fitwatch.rules.stopping import Patience

NAN = math.nan


def stops_at(values, **options):
    """Index of the evaluation that stops, or None."""
    rule = Patience(**options)
    return next((i for i, value in enumerate(values) if rule.update(value)), None)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 2, 2, 2, 2], {"patience": 3}, 4),  # the third in a row, as in Keras and Lightning
        ([3, 2, 2, 2, 1, 1, 1, 1], {"patience": 3}, 7),
        ([3, 2, 1, 0], {"patience": 1}, None),
        ([1, 1], {"patience": 1}, 1),
        ([1, 2, 3, 3, 3], {"patience": 2, "mode": "max"}, 4),
        ([1, 0.95, 0.9, 0.85, 0.8, 0.75], {"patience": 3, "min_delta": 0.08}, None),  # small gains add up
        ([1, 0.99, 0.98, 0.97], {"patience": 3, "min_delta": 0.08}, 3),
        ([1, 0.5, 0.5], {"patience": 1, "min_delta": 0.5}, 1),  # must exceed, not equal
        # relative, also for negative values, where best * (1 - delta) points the wrong way
        ([-100, -105, -108, -109], {"patience": 3, "min_delta": 0.1, "relative": True}, 3),
        ([-100, -111, -123, -136, -150], {"patience": 1, "min_delta": 0.1, "relative": True}, None),
        ([-100, -95, -85, -75], {"patience": 1, "min_delta": 0.1, "relative": True, "mode": "max"}, 1),
        ([-100, -89, -80, -71], {"patience": 1, "min_delta": 0.1, "relative": True, "mode": "max"}, None),
        ([0, -1e-9, -1], {"patience": 1, "min_delta": 0.1, "relative": True}, None),
        # NaN
        ([NAN, 3, 2, 1, 0], {"patience": 2}, None),  # Keras and others get stuck on a first NaN
        ([NAN] * 5, {"patience": 3}, 2),
        ([3, 2, NAN, NAN, NAN, NAN], {"patience": 3}, 4),  # Ignite never stops
        ([3, 2, NAN, 1, NAN, 0.5], {"patience": 2}, None),
        ([3, 2, -math.inf, 1, 0], {"patience": 2}, None),
        ([3, math.inf, math.inf], {"patience": 2, "mode": "max"}, 2),
        # warm-up
        ([1, 2, 2, 2, 2, 2], {"patience": 2, "start": 3}, 4),
        ([1, 2, 3], {"patience": 2, "start": 1}, 2),
        ([NAN] * 6, {"patience": 2, "start": 2}, 3),
        ([5, 1, 2, 2, 2], {"patience": 1, "start": 2}, 2),  # what warm-up reached must be improved on
    ],
)
def test_stop_comes_at_the_expected_evaluation(values, options, expected):
    """Each rule of patience, min_delta, NaN and warm-up, with the evaluation counted out by hand."""
    assert stops_at(values, **options) == expected


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [1, 3, 8])
def test_stop_agrees_with_a_search_over_the_whole_sequence(mode, patience):
    """With min_delta 0, it stops at the first point whose last `patience` values do not beat the best before them."""
    for seed in range(30):
        values = np.random.default_rng(seed).standard_normal(60).round(1)
        x = values if mode == "min" else -values
        ends = (i for i in range(patience, 60) if x[i - patience + 1 : i + 1].min() >= x[: i - patience + 1].min())
        assert stops_at(values, patience=patience, mode=mode) == next(ends, None)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_strict_best_is_kept_apart_from_the_reference(mode):
    """A gain below min_delta resets no wait, but it is the best all the same."""
    sign = 1 if mode == "min" else -1
    rule = Patience(patience=5, min_delta=0.1, mode=mode)
    for value in (1.0, 0.95, NAN, 0.92, 0.97):
        rule.update(sign * value)
    assert (rule.best, rule.wait, rule.evaluations) == (sign * 0.92, 4, 5)


def test_best_is_tracked_during_warm_up_and_never_non_finite():
    """The warm-up counts no waiting, but what it reached is the best; no NaN or infinity ever is."""
    rule = Patience(patience=1, start=4)
    assert [rule.update(v) for v in (NAN, 0.5, -math.inf, 2.0)] == [False] * 4
    assert (rule.best, rule.wait) == (0.5, 0)
    nothing = Patience(patience=2, mode="max")
    nothing.update(math.inf)
    assert nothing.best is None


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([0.7334] + [0.733] * 10, {"patience": 10, "min_delta": 0.001},
         "no improvement of more than 0.001 over 0.7334 in 10 evaluations"),
        ([2.0, 2.0], {"patience": 1}, "no improvement over 2 in 1 evaluation"),
        ([2.0, 2.0, 2.0], {"patience": 2, "min_delta": 0.01, "relative": True},
         "no improvement of more than 1 % over 2 in 2 evaluations"),
        ([NAN] * 3, {"patience": 3}, "no finite value in 3 evaluations"),
    ],
)  # fmt: skip
def test_reason_gives_the_figures(values, options, expected):
    """The reason is a sentence with what was asked, what stands and for how long; there is none before."""
    rule = Patience(**options)
    for value in values[:-1]:
        assert not rule.update(value)
        assert rule.reason is None
    assert rule.update(values[-1])
    assert rule.reason == expected


def test_it_says_stop_until_there_is_an_improvement():
    """A caller who goes on is told again, until the value improves; then the reason is gone."""
    rule = Patience(patience=1)
    assert [rule.update(v) for v in (1, 2, 2, 0.5)] == [False, True, True, False]
    assert rule.reason is None


def test_state_round_trip_keeps_the_counter():
    """Interrupted anywhere, it stops at the same evaluation as if never interrupted, for the same reason."""
    values = [3.0, 2.0, NAN, 2.5, 1.95, 1.97, 2.2, 2.1, 2.3]
    options = {"patience": 4, "min_delta": 0.1, "start": 1}
    whole = Patience(**options)
    expected = [(whole.update(v), whole.best, whole.wait, whole.reason) for v in values]
    assert [stop for stop, *_ in expected].index(True) == 5
    for cut in range(len(values)):
        first, second = Patience(**options), Patience(**options)
        for v in values[:cut]:
            first.update(v)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [(second.update(v), second.best, second.wait, second.reason) for v in values[cut:]] == expected[cut:]


def test_reset_forgets_everything():
    """After a reset it is as new: no best, no counter, no reason, no reference."""
    rule = Patience(patience=1)
    rule.update(1.0)
    rule.update(2.0)
    rule.reset()
    assert rule == Patience(patience=1)
    assert not rule.update(5.0)
    assert rule.best == 5.0


def test_foreign_state_is_refused_with_its_keys():
    """A state with other keys is refused and the keys are named."""
    with pytest.raises(ValueError, match=r"evaluations.*surprise"):
        Patience(patience=1).load_state_dict({"best": 1.0, "wait": 0, "reason": None, "reference": 1.0, "surprise": 1})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"patience": 0}, "patience"),
        ({"patience": 3, "min_delta": -0.1}, "min_delta"),
        ({"patience": 3, "min_delta": NAN}, "min_delta"),
        ({"patience": 3, "start": -1}, "start"),
        ({"patience": 3, "mode": "auto"}, "mode"),
    ],
)
def test_options_out_of_range_are_refused(options, name):
    """An option out of range is refused when the rule is built, with its name."""
    with pytest.raises(ValueError, match=name):
        Patience(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"patience": 2.0}, "patience"), ({"patience": 1, "relative": "no"}, "relative"), ({}, "patience")],
)
def test_options_of_the_wrong_type_are_refused(options, name):
    """An option of the wrong type, or a missing patience, is refused; positional ones are too."""
    with pytest.raises(TypeError, match=name):
        Patience(**options)
    with pytest.raises(TypeError):
        Patience(3)
